// Attention over packed sequences on a CPU, and the significance of its keys from the same probabilities.
//
// A unit of work is a head of a sequence, or some blocks of its queries where there are few heads. A block is worked
// through in strips of queries, whose logits and softmax stay near in the cache of one core. Sums of scores go by block,
// then head: their order depends neither on the number of threads nor on what else is in the batch.

#include "heads.h"

namespace dtbert {
namespace {

// Queries of a block.
constexpr int64_t kQueries = kKeys;

// In the order of `SCORES` in __init__.py.
enum Score : int64_t { kNone, kReceived, kOffDiagonal, kMax, kCls, kFromQuestion, kValueNorm };

template <typename T>
struct Work : Heads<T> {
  T* context;      // [K, H], or null
  float* columns;  // [sequence, head, block, key], or null
  Score score;
};

// What one thread needs for a unit. Powers of float32 take the logits' place.
template <typename T>
struct Scratch {
  Tiles<T> tiles;
  T *keys, *values, *queries;
  float *logits, *context;
  T* powers;

  Scratch(const Work<T>& work)
      : keys(kept_room<T, 0>(work.longest * work.head_size)),
        values(kept_room<T, 1>(work.longest * work.head_size)),
        queries(kept_room<T, 2>(kStrip<T> * work.head_size)),
        logits(kept_room<float, 4>(kStrip<T> * work.longest)),
        context(kept_room<float, 5>(kStrip<T> * work.head_size)) {
    if constexpr (std::is_same_v<T, float>) powers = logits;
    else powers = kept_room<T, 3>(kStrip<T> * work.longest);
  }
};

// The powers of `count` rows of logits, and the inverse of each row's sum. For scores they take the logits' place, too.
template <typename T>
void soften(const Work<T>& work, int64_t count, int64_t n, Scratch<T>& s, float* inverse) {
  const float scale = softmax_scale(work.head_size);
  const int64_t columns = round_up(n, kTile);
  for (int64_t row = 0; row < count; ++row) {
    float* logits = s.logits + row * work.longest;
    if constexpr (std::is_same_v<T, float>) {
      inverse[row] = 1.0f / powers_of(logits, n, columns, scale, logits);
    } else {
      T* powers = s.powers + row * work.longest;
      inverse[row] = 1.0f / powers_of(logits, n, columns, scale, powers, work.columns != nullptr);
      if (!kOwn<T>) std::fill(powers + columns, powers + round_up(n, kDepthStep<T>), static_cast<T>(0));
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
  const int64_t d = work.head_size, hidden = work.hidden(), rows = padded<T>(count);
  const T *all = work.qkv + head * d, *queries = s.queries;
  int64_t stride = d;
  if (work.chosen == nullptr && rows == count) {
    queries = all + (span.first_query + start) * work.row_stride;
    stride = work.row_stride;
  } else {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = span.first_query + start + std::min(row, count - 1);
      std::copy_n(all + work.row_of(at) * work.row_stride, d, s.queries + row * d);
    }
  }
  multiply_by_columns(rows, span.keys, d, queries, stride, s.keys, s.logits, work.longest);
  float inverse[kStrip<T>];
  soften(work, count, span.keys, s, inverse);
  if (sums != nullptr) add_scores(work, start, count, span.keys, s, inverse, sums);
  if (work.context == nullptr) return;
  multiply_by_rows(rows, span.keys, d, s.powers, work.longest, s.values, s.context);
  for (int64_t row = 0; row < count; ++row) {
    const float* from = s.context + row * d;
    T* to = work.context + (span.first_query + start + row) * hidden + head * d;
    for (int64_t i = 0; i < d; i += kTile) store(to + i, load(from + i) * inverse[row]);
  }
}

template <typename T>
void attend(const Work<T>& work, int64_t sequence, int64_t head, int64_t block, int64_t blocks, Scratch<T>& scratch) {
  const int64_t d = work.head_size, hidden = work.hidden(), begin = work.begins[sequence];
  const int64_t n = work.begins[sequence + 1] - begin;
  Span span{begin, n, n};
  if (work.query_begins != nullptr) {
    span.first_query = work.query_begins[sequence];
    span.queries = work.query_begins[sequence + 1] - span.first_query;
  }
  const T* key = work.qkv + begin * work.row_stride + hidden + head * d;
  pack_columns(key, work.row_stride, n, d, scratch.keys);
  pack_rows(key + hidden, work.row_stride, n, d, scratch.values);
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
  const int64_t hidden = work.hidden(), in_all = work.longest / kQueries;
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
