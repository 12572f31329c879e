// Attention over packed sequences on a CPU, and the significance of its keys from the same probabilities.
//
// A unit of work is a head of a sequence, or some blocks of its queries where there are few heads. A block is worked
// through in strips of queries, whose logits and softmax stay near in the cache of one core. Sums of scores go by block,
// then head: their order depends neither on the number of threads nor on what else is in the batch.

#include "common.h"

namespace dtbert {
namespace {

// Queries of a block, and keys that one product takes.
constexpr int64_t kQueries = 64, kKeys = 64;
// Queries of a strip; to the matrix unit a whole block: few shapes, for each is compiled once.
template <typename T>
constexpr int64_t kStrip = kOwn<T> ? 24 : kQueries;

// In the order of `SCORES` in __init__.py.
enum Score : int64_t { kNone, kReceived, kOffDiagonal, kMax, kCls, kFromQuestion, kValueNorm };

template <typename T>
struct Work {
  const T* qkv;  // [T, 3 * H]
  int64_t row_stride, heads, head_size;
  const int32_t* begins;        // [B + 1]
  const int64_t* chosen;        // rows of the queries, or null: all
  const int32_t* query_begins;  // [B + 1], of the chosen
  T* context;                   // [K, H], or null
  float* columns;               // [sequence, head, block, key], or null
  Score score;
  int64_t longest;  // keys, rounded up to kKeys
};

// What one thread needs for a unit.
template <typename T>
struct Scratch {
  T *keys, *values, *queries, *powers;
  float *logits, *context;

  Scratch(const Work<T>& work)
      : keys(kept_room<T, 0>(work.longest * work.head_size)),
        values(kept_room<T, 1>(work.longest * work.head_size)),
        queries(kept_room<T, 2>(kStrip<T> * work.head_size)),
        powers(std::is_same_v<T, float> ? nullptr : kept_room<T, 3>(kStrip<T> * work.longest)),
        logits(kept_room<float, 4>(kStrip<T> * work.longest)),
        context(kept_room<float, 5>(kStrip<T> * work.head_size)) {}
};

// Keys and values as the matrix instructions take them: pairs of neighbours along the summed dimension side by side, in
// blocks of kKeys keys; 0 past the end.
void pack(const BFloat16* key, const BFloat16* value, int64_t stride, int64_t n, int64_t d, Scratch<BFloat16>& scratch) {
  const int64_t padded = round_up(n, kKeys), pairs = d / 2;
  uint32_t* to_keys = reinterpret_cast<uint32_t*>(scratch.keys);
  BFloat16* to_values = scratch.values;
  for (int64_t block = 0; block < padded; block += kKeys, to_keys += kKeys * pairs, to_values += kKeys * d) {
    const int64_t real = std::min(kKeys, n - block);
    for (int64_t j = 0; j < kKeys; ++j) {
      if (j >= real) {
        for (int64_t i = 0; i < pairs; ++i) to_keys[i * kKeys + j] = 0;
        continue;
      }
      const BFloat16* from = key + (block + j) * stride;
      for (int64_t i = 0; i < pairs; ++i) to_keys[i * kKeys + j] = bits_at(from + 2 * i);
    }
    for (int64_t j = 0; j < kKeys; j += 2) {
      uint16_t* to = reinterpret_cast<uint16_t*>(to_values + j * d);
      const uint16_t* from = reinterpret_cast<const uint16_t*>(value + (block + j) * stride);
      if (j + 1 < real) {
        for (int64_t i = 0; i < d; ++i) to[2 * i] = from[i], to[2 * i + 1] = from[stride + i];
      } else {
        const bool one = j < real;
        for (int64_t i = 0; i < d; ++i) to[2 * i] = one ? from[i] : 0, to[2 * i + 1] = 0;
      }
    }
  }
}

// In blocks of kKeys keys: these transposed, values as they are.
void pack(const float* key, const float* value, int64_t stride, int64_t n, int64_t d, Scratch<float>& scratch) {
  float *to_keys = scratch.keys, *to_values = scratch.values;
  for (int64_t block = 0; block < n; block += kKeys, to_keys += kKeys * d) {
    const int64_t real = std::min(kKeys, n - block);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < kKeys; ++j) to_keys[i * kKeys + j] = j < real ? key[(block + j) * stride + i] : 0;
  }
  for (int64_t j = 0; j < n; ++j) std::copy(value + j * stride, value + j * stride + d, to_values + j * d);
}

// logits [rows, n] = queries [rows, D] x keys
template <typename T>
void multiply_keys(const Work<T>& work, int64_t rows, int64_t n, Scratch<T>& s) {
  const int64_t d = work.head_size;
  for (int64_t block = 0; block < n; block += kKeys) {
    const T* keys = s.keys + block * d;
    multiply(rows, kKeys, d, s.queries, d, keys, kKeys, s.logits + block, work.longest, keys);
  }
}

// context [rows, D] = powers [rows, n] x values
template <typename T>
void multiply_values(const Work<T>& work, int64_t rows, int64_t n, Scratch<T>& s) {
  const int64_t d = work.head_size;
  const T* values = s.values;
  if constexpr (std::is_same_v<T, float>) {
    multiply(rows, d, n, s.logits, work.longest, values, d, s.context, d, values);
  } else if constexpr (kOwn<T>) {
    multiply(rows, d, round_up(n, kNeighbours<T>), s.powers, work.longest, values, d, s.context, d, values);
  } else {
    for (int64_t block = 0; block < n; block += kKeys)
      at::native::cpublas::brgemm(rows, d, kKeys, work.longest, d, d, block > 0, s.powers + block,
                                  values + block * d, s.context, true);
  }
}

// Softmax of a row without its quotient: powers of the logits, as many as `columns`, of which n are real; and their sum,
// which is NaN if a logit is NaN, or the greatest infinite.
template <typename P>
float powers_of(float* logits, int64_t n, int64_t columns, float scale, P* powers) {
  for (int64_t k = n; k < columns; ++k) logits[k] = -std::numeric_limits<float>::infinity();
  Vector most = load(logits), total{};
  for (int64_t k = kTile; k < columns; k += kTile) most = larger(most, load(logits + k));
  const float shift = largest_of(most) * scale;
  for (int64_t k = 0; k < columns; k += kTile) {
    const Vector exponent = load(logits + k) * scale - shift;
    const Vector power = std::is_same_v<P, float> ? exp2_of(exponent) : exp2_near(exponent);
    store(powers + k, power);
    total += power;
  }
  return sum_of(total);
}

// The powers of `count` rows of logits, and the inverse of each row's sum. For scores they take the logits' place, too.
template <typename T>
void soften(const Work<T>& work, int64_t count, int64_t n, Scratch<T>& s, float* inverse) {
  const float scale = static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(work.head_size)));
  const int64_t columns = round_up(n, kTile);
  for (int64_t row = 0; row < count; ++row) {
    float* logits = s.logits + row * work.longest;
    if constexpr (std::is_same_v<T, float>) {
      inverse[row] = 1.0f / powers_of(logits, n, columns, scale, logits);
    } else {
      T* powers = s.powers + row * work.longest;
      if (work.columns == nullptr) {
        inverse[row] = 1.0f / powers_of(logits, n, columns, scale, powers);
      } else {
        inverse[row] = 1.0f / powers_of(logits, n, columns, scale, logits);
        for (int64_t k = 0; k < columns; k += kTile) store(powers + k, load(logits + k));
      }
      if (!kOwn<T>) std::fill(powers + columns, powers + round_up(n, kKeys), static_cast<T>(0));
    }
  }
}

void add_columns(float* columns, const float* powers, int64_t stride, int64_t rows, int64_t n, const float* inverse) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) {
    const float *p0 = powers + row * stride, *p1 = p0 + stride, *p2 = p1 + stride, *p3 = p2 + stride;
    const float i0 = inverse[row], i1 = inverse[row + 1], i2 = inverse[row + 2], i3 = inverse[row + 3];
    for (int64_t k = 0; k < n; k += kTile)
      store(columns + k, load(columns + k) + ((load(p0 + k) * i0 + load(p1 + k) * i1) + (load(p2 + k) * i2 + load(p3 + k) * i3)));
  }
  for (; row < rows; ++row)
    for (int64_t k = 0; k < n; k += kTile)
      store(columns + k, load(columns + k) + load(powers + row * stride + k) * inverse[row]);
}

void max_columns(float* columns, const float* powers, int64_t stride, int64_t rows, int64_t n, const float* inverse) {
  for (int64_t row = 0; row < rows; ++row)
    if (std::isnan(inverse[row]))
      std::fill(columns, columns + n, inverse[row]);
    else
      for (int64_t k = 0; k < n; k += kTile)
        store(columns + k, larger(load(columns + k), load(powers + row * stride + k) * inverse[row]));
}

// NaN if one is.
float greater(float x, float y) { return x > y || std::isnan(x) ? x : y; }

// A unit's queries, and how many keys they read.
struct Span {
  int64_t first_query, queries, keys;
};

// Adds a strip's share to a block's scores; `start` is its first query's place in the sequence.
template <typename T>
void add_scores(const Work<T>& work, int64_t start, int64_t count, int64_t n, const Scratch<T>& s, const float* inverse,
                float* sums) {
  const float* powers = s.logits;
  if (work.score == kMax) max_columns(sums, powers, work.longest, count, n, inverse);
  else add_columns(sums, powers, work.longest, count, n, inverse);
  if (work.score == kOffDiagonal)
    for (int64_t row = 0; row < count; ++row) sums[start + row] -= powers[row * work.longest + start + row] * inverse[row];
}

// Logits, softmax, scores and context of some queries of a head, the first of them at `start` among the span's.
template <typename T>
void attend_strip(const Work<T>& work, const Span& span, int64_t head, int64_t start, int64_t count, Scratch<T>& s,
                  float* sums) {
  const int64_t d = work.head_size, hidden = work.heads * d, rows = kOwn<T> ? count : round_up(count, kTile);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = span.first_query + start + std::min(row, count - 1);
    const T* from = work.qkv + head * d + (work.chosen == nullptr ? at : work.chosen[at]) * work.row_stride;
    std::copy(from, from + d, s.queries + row * d);
  }
  multiply_keys(work, rows, span.keys, s);
  float inverse[kStrip<T>];
  soften(work, count, span.keys, s, inverse);
  if (sums != nullptr) add_scores(work, start, count, span.keys, s, inverse, sums);
  if (work.context == nullptr) return;
  multiply_values(work, rows, span.keys, s);
  for (int64_t row = 0; row < count; ++row) {
    const float* from = s.context + row * d;
    T* to = work.context + (span.first_query + start + row) * hidden + head * d;
    for (int64_t i = 0; i < d; i += kTile) store(to + i, load(from + i) * inverse[row]);
  }
}

template <typename T>
void attend(const Work<T>& work, int64_t sequence, int64_t head, int64_t block, int64_t blocks, Scratch<T>& scratch) {
  const int64_t d = work.head_size, hidden = work.heads * d, begin = work.begins[sequence];
  const int64_t n = work.begins[sequence + 1] - begin;
  Span span{begin, n, n};
  if (work.query_begins != nullptr) {
    span.first_query = work.query_begins[sequence];
    span.queries = work.query_begins[sequence + 1] - span.first_query;
  }
  const T* key = work.qkv + begin * work.row_stride + hidden + head * d;
  pack(key, key + hidden, work.row_stride, n, d, scratch);
  const int64_t end = std::min(span.queries, (block + blocks) * kQueries);
  for (; block * kQueries < end; ++block) {
    const int64_t start = block * kQueries, stop = std::min(end, start + kQueries);
    float* sums = nullptr;
    if (work.columns != nullptr) {
      sums = work.columns + ((sequence * work.heads + head) * (work.longest / kQueries) + block) * work.longest;
      std::fill(sums, sums + round_up(n, kTile), 0.0f);
    }
    for (int64_t strip = start; strip < stop; strip += kStrip<T>)
      attend_strip(work, span, head, strip, std::min(kStrip<T>, stop - strip), scratch, sums);
  }
}

template <typename T>
void sum_columns(const Work<T>& work, int64_t sequences, float* significance) {
  const int64_t hidden = work.heads * work.head_size, in_all = work.longest / kQueries;
  at::parallel_for(0, sequences, 1, [&](int64_t from, int64_t to) {
    for (int64_t sequence = from; sequence < to; ++sequence) {
      const int64_t begin = work.begins[sequence], n = work.begins[sequence + 1] - begin;
      const int64_t asked = work.query_begins == nullptr
          ? n : work.query_begins[sequence + 1] - work.query_begins[sequence];
      float* sums = significance + begin;
      std::fill(sums, sums + n, 0.0f);
      std::vector<float> of_head(n);
      for (int64_t head = 0; head < work.heads; ++head) {
        std::fill(of_head.begin(), of_head.end(), 0.0f);
        for (int64_t block = 0; block * kQueries < asked; ++block) {
          const float* columns = work.columns + ((sequence * work.heads + head) * in_all + block) * work.longest;
          for (int64_t k = 0; k < n; ++k)
            of_head[k] = work.score == kMax ? greater(of_head[k], columns[k]) : of_head[k] + columns[k];
        }
        if (work.score == kValueNorm)
          for (int64_t k = 0; k < n; ++k) {
            const T* value = work.qkv + (begin + k) * work.row_stride + 2 * hidden + head * work.head_size;
            float squares = 0;
            for (int64_t i = 0; i < work.head_size; ++i) squares += dtbert::value(value[i]) * dtbert::value(value[i]);
            of_head[k] *= std::sqrt(squares);
          }
        for (int64_t k = 0; k < n; ++k) sums[k] = work.score == kMax ? greater(sums[k], of_head[k]) : sums[k] + of_head[k];
      }
    }
  });
}

template <typename T>
void run(Work<T> work, int64_t sequences, float* significance) {
  const auto asked_of = [&](int64_t sequence) {
    const int32_t* begins = work.query_begins == nullptr ? work.begins : work.query_begins;
    return static_cast<int64_t>(begins[sequence + 1] - begins[sequence]);
  };
  int64_t most = 0;
  for (int64_t sequence = 0; sequence < sequences; ++sequence) most = std::max(most, asked_of(sequence));
  const int64_t threads = at::get_num_threads(), blocks = (most + kQueries - 1) / kQueries;
  // Few heads for many threads: each takes some of a head's blocks.
  const int64_t parts = std::min(blocks, std::max<int64_t>(1, 2 * threads / std::max<int64_t>(1, sequences * work.heads)));
  const int64_t part = parts == 0 ? 0 : (blocks + parts - 1) / parts;
  const int64_t units = sequences * work.heads * parts;
  share(units, [&] { return Scratch<T>(work); }, [&](int64_t unit, Scratch<T>& scratch) {
    attend(work, unit / (work.heads * parts), unit / parts % work.heads, unit % parts * part, part, scratch);
  });
  if (significance != nullptr) sum_columns(work, sequences, significance);
}

template <typename T>
void dispatch(const Tensor& qkv, const int32_t* begins, int64_t sequences, int64_t longest, int64_t heads,
              const int64_t* chosen, const int32_t* query_begins, Score score, Tensor& context, Tensor& significance) {
  Work<T> work{};
  work.qkv = qkv.const_data_ptr<T>();
  work.row_stride = qkv.stride(0);
  work.heads = heads;
  work.head_size = qkv.size(1) / (3 * heads);
  work.begins = begins;
  work.chosen = chosen;
  work.query_begins = query_begins;
  work.context = context.numel() == 0 ? nullptr : context.mutable_data_ptr<T>();
  work.score = score;
  work.longest = round_up(longest, kKeys);
  Tensor columns;
  if (score != kNone) {
    columns = at::empty({sequences * heads * (work.longest / kQueries) * work.longest}, significance.options());
    work.columns = columns.mutable_data_ptr<float>();
  }
  run(work, sequences, score == kNone ? nullptr : significance.mutable_data_ptr<float>());
}

// Context [T or K, H] and significance [T]; what was not asked for is empty.
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t longest, int64_t heads,
                                     bool with_context, int64_t score, const std::optional<Tensor>& segments,
                                     const std::optional<Tensor>& rows, const std::optional<Tensor>& cu_rows) {
  const int64_t tokens = qkv.size(0), hidden = qkv.size(1) / 3, sequences = cu_seqlens.size(0) - 1;
  const int32_t* begins = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t* chosen = rows.has_value() ? rows->const_data_ptr<int64_t>() : nullptr;
  const int32_t* query_begins = rows.has_value() ? cu_rows->const_data_ptr<int32_t>() : nullptr;
  Score kind = static_cast<Score>(score);
  std::vector<int64_t> own;
  std::vector<int32_t> own_begins;
  if (kind == kCls || kind == kFromQuestion) {
    // They sum over some queries what `received` sums over all.
    const int64_t* segment = kind == kFromQuestion ? segments->const_data_ptr<int64_t>() : nullptr;
    own_begins.push_back(0);
    for (int64_t sequence = 0; sequence < sequences; ++sequence) {
      for (int64_t token = begins[sequence]; token < begins[sequence + 1]; ++token)
        if (segment == nullptr ? token == begins[sequence] : segment[token] == 0) own.push_back(token);
      own_begins.push_back(static_cast<int32_t>(own.size()));
    }
    chosen = own.data();
    query_begins = own_begins.data();
    kind = kReceived;
  }
  Tensor context = at::empty({with_context ? (rows.has_value() ? rows->size(0) : tokens) : 0, hidden}, qkv.options());
  Tensor significance = at::empty({score == kNone ? 0 : tokens}, qkv.options().dtype(at::kFloat));
  if (tokens == 0) return {context, significance};
  if (qkv.scalar_type() == at::kBFloat16)
    dispatch<BFloat16>(qkv, begins, sequences, longest, heads, chosen, query_begins, kind, context, significance);
  else
    dispatch<float>(qkv, begins, sequences, longest, heads, chosen, query_begins, kind, context, significance);
  return {context, significance};
}

}  // namespace
}  // namespace dtbert

TORCH_LIBRARY_FRAGMENT(dtbert_native, library) {
  library.def("attention(Tensor qkv, Tensor cu_seqlens, int longest, int heads, bool with_context, int score, "
              "Tensor? segments, Tensor? rows, Tensor? cu_rows) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dtbert_native, CPU, library) { library.impl("attention", dtbert::attention); }
