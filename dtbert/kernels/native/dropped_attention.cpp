// Attention as training computes it on a CPU: some of its probabilities dropped, and its gradient.
//
// A unit of work is a head of a sequence. Its probabilities [queries, keys] are held for the gradient, rows padded to a
// multiple of kHeld; those that are dropped have a sign. What is dropped is of the seed and the unit, not of the number of
// threads.

#include "dropout.h"
#include "heads.h"

namespace dtbert {
namespace {

// Whatever kTile is, which divides it.
constexpr int64_t kHeld = kWidthStep;

// Queries over which the gradient of keys and values is summed at a time.
template <typename T>
constexpr int64_t kBlock = kOwn<T> ? 4 * kStrip<T> : kStrip<T>;
// Of its rows so many columns lie together: rows further apart would share few sets of the nearest cache.
constexpr int64_t kPanel = 4 * kTile;

// Of a head of a sequence: the rows that its queries and keys have, and the place of what is held.
struct Unit {
  int64_t sequence, head, first_key, keys, first_query, queries, held;

  int64_t held_stride() const { return round_up(keys, kHeld); }
};

// Its query_begins are never null.
template <typename T>
struct Work : Heads<T> {
  std::vector<int64_t> held;  // [B + 1], where each sequence's probabilities begin

  Work(const Tensor& all, const Tensor& cu_seqlens, int64_t most_keys, int64_t num_heads, const std::optional<Tensor>& rows,
       const std::optional<Tensor>& cu_rows)
      : Heads<T>{all.const_data_ptr<T>(), all.stride(0), num_heads, all.size(1) / (3 * num_heads),
                 cu_seqlens.const_data_ptr<int32_t>(), rows.has_value() ? rows->const_data_ptr<int64_t>() : nullptr,
                 (rows.has_value() ? *cu_rows : cu_seqlens).const_data_ptr<int32_t>(), round_up(most_keys, kKeys)},
        held(cu_seqlens.size(0), 0) {
    for (size_t one = 0; one + 1 < held.size(); ++one) {
      const Unit first = unit(one * num_heads);
      held[one + 1] = held[one] + num_heads * first.queries * first.held_stride();
    }
  }

  int64_t units() const { return (held.size() - 1) * this->heads; }

  Unit unit(int64_t index) const {
    const int64_t sequence = index / this->heads, head = index % this->heads;
    const int32_t *keys = this->begins + sequence, *queries = this->query_begins + sequence;
    Unit one{sequence, head, keys[0], keys[1] - keys[0], queries[0], queries[1] - queries[0], 0};
    one.held = held[sequence] + head * one.queries * one.held_stride();
    return one;
  }
};

// Rows of some queries of a head, which `from` finds, to [rows, D]; those past `count` repeat the last.
template <typename T, typename From>
void gather(int64_t count, int64_t rows, int64_t d, T* to, const From& from) {
  for (int64_t row = 0; row < rows; ++row) std::copy_n(from(std::min(row, count - 1)), d, to + row * d);
}

template <typename T>
struct Forward {
  Tiles<T> tiles;
  T *keys, *values, *queries, *kept;
  float *logits, *context;

  Forward(const Work<T>& work)
      : keys(kept_room<T, 0>(work.longest * work.head_size)),
        values(kept_room<T, 1>(work.longest * work.head_size)),
        queries(kept_room<T, 2>(kStrip<T> * work.head_size)),
        kept(kept_room<T, 3>(kStrip<T> * work.longest)),
        logits(kept_room<float, 4>(kStrip<T> * work.longest)),
        context(kept_room<float, 5>(kStrip<T> * work.head_size)) {}
};

template <typename T>
void attend(const Work<T>& work, const Unit& unit, const Dropout& dropout, T* held, T* context, Forward<T>& s) {
  const int64_t d = work.head_size, hidden = work.hidden(), n = unit.keys, columns = unit.held_stride();
  const T* head = work.qkv + unit.head * d;
  pack_columns(head + unit.first_key * work.row_stride + hidden, work.row_stride, n, d, s.keys);
  pack_rows(head + unit.first_key * work.row_stride + 2 * hidden, work.row_stride, n, d, s.values);
  Draws draws(dropout.seed, unit.sequence * work.heads + unit.head);
  for (int64_t start = 0; start < unit.queries; start += kStrip<T>) {
    const int64_t count = std::min(kStrip<T>, unit.queries - start), rows = padded<T>(count);
    const int64_t first = unit.first_query + start;
    gather(count, rows, d, s.queries, [&](int64_t row) { return head + work.row_of(first + row) * work.row_stride; });
    multiply_by_columns(rows, n, d, s.queries, d, s.keys, s.logits, work.longest);
    for (int64_t row = 0; row < count; ++row) {
      float* logits = s.logits + row * work.longest;
      const float inverse = 1.0f / powers_of(logits, n, columns, softmax_scale(d), logits);
      T *probabilities = held + unit.held + (start + row) * columns, *kept = s.kept + row * work.longest;
      for (int64_t k = 0; k < columns; k += kTile) {
        Vector probability = load(logits + k) * inverse;
        if (dropout.below != 0) probability = negated_where(draws.dropped(dropout.below), probability);
        store(probabilities + k, probability);
        store(kept + k, without_signed(probability));
      }
      if (!kOwn<T>) std::fill(kept + columns, kept + round_up(n, kDepthStep<T>), static_cast<T>(0));
    }
    multiply_by_rows(rows, n, d, s.kept, work.longest, s.values, s.context);
    for (int64_t row = 0; row < count; ++row)
      for (int64_t i = 0; i < d; i += kTile)
        store(context + (first + row) * hidden + unit.head * d + i, load(s.context + row * d + i) * dropout.scale);
  }
}

template <typename T>
struct Backward {
  Tiles<T> tiles;
  T *keys, *values;
  // Of a strip of queries [kStrip, D] and [kStrip, longest].
  T *queries, *of_context, *kept, *of_logits;
  float *of_query, *of_kept;
  // Of a block, what is summed over its queries in neighbours along them, panels [kBlock, kPanel], and the factors [D, kBlock].
  T *block_kept, *block_of_logits, *block_queries, *block_of_context;
  float *of_keys, *of_values;  // [D, longest]

  Backward(const Work<T>& work)
      : keys(kept_room<T, 0>(work.longest * work.head_size)),
        values(kept_room<T, 1>(work.longest * work.head_size)),
        queries(kept_room<T, 2>(kStrip<T> * work.head_size)),
        of_context(kept_room<T, 13>(kStrip<T> * work.head_size)),
        kept(kept_room<T, 3>(kStrip<T> * work.longest)),
        of_logits(kept_room<T, 12>(kStrip<T> * work.longest)),
        of_query(kept_room<float, 5>(kStrip<T> * work.head_size)),
        of_kept(kept_room<float, 4>(kStrip<T> * work.longest)),
        block_kept(kept_room<T, 8>(kBlock<T> * work.longest)),
        block_of_logits(kept_room<T, 9>(kBlock<T> * work.longest)),
        block_queries(kept_room<T, 10>(kBlock<T> * work.head_size)),
        block_of_context(kept_room<T, 11>(kBlock<T> * work.head_size)),
        of_keys(kept_room<float, 6>(work.head_size * work.longest)),
        of_values(kept_room<float, 7>(work.head_size * work.longest)) {}
};

// The gradient of the logits of a strip, and its kept probabilities, each [count, columns]. Those of a row sum to 0.
template <typename T>
void soften_gradient(const Work<T>& work, const T* held, int64_t count, int64_t columns, float scale, Backward<T>& s) {
  for (int64_t row = 0; row < count; ++row, held += columns) {
    const float* of_kept = s.of_kept + row * work.longest;
    T *kept = s.kept + row * work.longest, *of_logits = s.of_logits + row * work.longest;
    Vector total{};
    for (int64_t k = 0; k < columns; k += kTile) {
      const Vector one = without_signed(load(held + k));
      store(kept + k, one);
      total += one * load(of_kept + k);
    }
    const float mean = sum_of(total) * scale;
    for (int64_t k = 0; k < columns; k += kTile) {
      const Vector probability = load(held + k);
      const Vector of_probability = (Integers)probability < 0 ? Vector{} : load(of_kept + k) * scale;
      store(of_logits + k, unsigned_of(probability) * (of_probability - mean));
    }
    if (!kOwn<T>) std::fill(of_logits + columns, of_logits + round_up(columns, kDepthStep<T>), static_cast<T>(0));
  }
}

// Adds what a strip's rows are multiplied by and with to its block, from the row `at` on.
template <typename T>
void add_to_block(const Work<T>& work, int64_t at, int64_t count, int64_t columns, Backward<T>& s) {
  constexpr int64_t n = kNeighbours<T>;
  const int64_t d = work.head_size;
  for (int64_t row = 0; row < count; row += n) {
    const bool two = row + 1 < count;
    for (const auto& [from, to] : {std::pair{s.kept, s.block_kept}, std::pair{s.of_logits, s.block_of_logits}}) {
      const T* one = from + row * work.longest;
      for (int64_t k = 0; k < columns; k += kPanel)
        pair(one + k, two ? one + work.longest + k : nullptr, std::min(kPanel, columns - k),
             to + k * kBlock<T> + (at + row) * kPanel);
    }
  }
  for (const auto& [from, to] : {std::pair{s.queries, s.block_queries}, std::pair{s.of_context, s.block_of_context}})
    for (int64_t row = 0; row < count; row += kTile)
      for (int64_t i = 0; i < d; i += kTile) {
        const int64_t some = std::min(kTile, count - row);
        const Square square([&, from = from](int64_t lane) {
          return lane < some ? (Integers)load(from + (row + lane) * d + i) : Integers{};
        });
        for (int64_t lane = 0; lane < kTile; ++lane) {
          T values[kTile];
          store(values, (Vector)square.rows[lane]);
          std::copy_n(values, some, to + (i + lane) * kBlock<T> + at + row);
        }
      }
}

// of_keys and of_values [D, n] += queries and gradients [D, rows] x the logits' gradients and probabilities [rows, n].
template <typename T>
void sum_block(const Work<T>& work, int64_t rows, int64_t columns, Backward<T>& s) {
  const int64_t d = work.head_size, depth = round_up(rows, kDepthStep<T>);
  for (T* one : {s.block_queries, s.block_of_context})
    for (int64_t i = 0; i < d; ++i) std::fill(one + i * kBlock<T> + rows, one + i * kBlock<T> + depth, static_cast<T>(0));
  const int64_t real = round_up(rows, kNeighbours<T>);
  const auto add = [&](const T* factors, T* summed, float* to) {
    for (int64_t k = 0; k < columns; k += kPanel) {
      T* panel = summed + k * kBlock<T>;
      std::fill_n(panel + real * kPanel, (depth - real) * kPanel, static_cast<T>(0));
      const int64_t width = std::min(kPanel, columns - k);
      multiply_head(d, width, depth, factors, kBlock<T>, panel, kPanel, to + k, work.longest, true);
    }
  };
  add(s.block_queries, s.block_of_logits, s.of_keys);
  add(s.block_of_context, s.block_kept, s.of_values);
}

// Columns [D, n], of which kTile can be read at a time, times a factor to rows [n, D], `stride` apart.
template <typename T>
void store_rows(const float* columns, int64_t columns_stride, int64_t n, int64_t d, float factor, T* to, int64_t stride) {
  for (int64_t j = 0; j < n; j += kTile)
    for (int64_t i = 0; i < d; i += kTile) {
      const Square square([&](int64_t lane) { return (Integers)load(columns + (i + lane) * columns_stride + j); });
      for (int64_t row = 0; row < std::min(kTile, n - j); ++row)
        store(to + (j + row) * stride + i, (Vector)square.rows[row] * factor);
    }
}

// Of a unit's queries, keys and values; `of_context` [K, H] is the context's.
template <typename T>
void attend_backward(const Work<T>& work, const Unit& unit, float scale, const T* held, const T* of_context, T* of_qkv,
                     Backward<T>& s) {
  const int64_t d = work.head_size, hidden = work.hidden(), n = unit.keys, columns = unit.held_stride();
  const float root = 1.0f / std::sqrt(static_cast<float>(d));
  const T* head = work.qkv + unit.head * d;
  pack_rows(head + unit.first_key * work.row_stride + hidden, work.row_stride, n, d, s.keys);
  pack_columns(head + unit.first_key * work.row_stride + 2 * hidden, work.row_stride, n, d, s.values);
  std::fill_n(s.of_keys, d * work.longest, 0.0f);
  std::fill_n(s.of_values, d * work.longest, 0.0f);
  for (int64_t block = 0; block < unit.queries; block += kBlock<T>) {
    const int64_t in_block = std::min(kBlock<T>, unit.queries - block);
    for (int64_t at = 0; at < in_block; at += kStrip<T>) {
      const int64_t count = std::min(kStrip<T>, in_block - at), rows = padded<T>(count), first = unit.first_query + block + at;
      gather(count, rows, d, s.of_context, [&](int64_t row) { return of_context + (first + row) * hidden + unit.head * d; });
      gather(count, count, d, s.queries, [&](int64_t row) { return head + work.row_of(first + row) * work.row_stride; });
      multiply_by_columns(rows, n, d, s.of_context, d, s.values, s.of_kept, work.longest);
      soften_gradient(work, held + unit.held + (block + at) * columns, count, columns, scale, s);
      add_to_block(work, at, count, columns, s);
      multiply_by_rows(rows, n, d, s.of_logits, work.longest, s.keys, s.of_query);
      for (int64_t row = 0; row < count; ++row)
        for (int64_t i = 0; i < d; i += kTile)
          store(of_qkv + work.row_of(first + row) * 3 * hidden + unit.head * d + i, load(s.of_query + row * d + i) * root);
    }
    sum_block(work, in_block, columns, s);
  }
  T* to = of_qkv + unit.first_key * 3 * hidden + unit.head * d;
  store_rows(s.of_keys, work.longest, n, d, root, to + hidden, 3 * hidden);
  store_rows(s.of_values, work.longest, n, d, scale, to + 2 * hidden, 3 * hidden);
}

// Context [T or K, H], and the probabilities that its gradient takes, the dropped ones with a sign.
std::tuple<Tensor, Tensor> attention(const Tensor& qkv, const Tensor& cu_seqlens, int64_t longest, int64_t heads, double dropped,
                                     int64_t seed, const std::optional<Tensor>& rows, const std::optional<Tensor>& cu_rows) {
  Tensor context = at::empty({rows.has_value() ? rows->size(0) : qkv.size(0), qkv.size(1) / 3}, qkv.options()), held;
  const Dropout dropout(dropped, seed);
  by_states(qkv, [&](auto zero) {
    using T = decltype(zero);
    const Work<T> work(qkv, cu_seqlens, longest, heads, rows, cu_rows);
    held = at::empty({work.held.back()}, qkv.options());
    T *to = context.mutable_data_ptr<T>(), *probabilities = held.mutable_data_ptr<T>();
    share(work.units(), [&] { return Forward<T>(work); }, [&](int64_t unit, Forward<T>& scratch) {
      attend(work, work.unit(unit), dropout, probabilities, to, scratch);
    });
  });
  return {context, held};
}

// The gradient of qkv [T, 3 * H].
Tensor attention_gradient(const Tensor& gradient, const Tensor& qkv, const Tensor& held, const Tensor& cu_seqlens,
                          int64_t longest, int64_t heads, double dropped, const std::optional<Tensor>& rows,
                          const std::optional<Tensor>& cu_rows) {
  Tensor of_qkv = at::empty({qkv.size(0), qkv.size(1)}, qkv.options());
  by_states(qkv, [&](auto zero) {
    using T = decltype(zero);
    const Work<T> work(qkv, cu_seqlens, longest, heads, rows, cu_rows);
    TORCH_CHECK(held.numel() == work.held.back(), held.numel(), " probabilities are held, not ", work.held.back());
    T* to = of_qkv.mutable_data_ptr<T>();
    // A query that nobody asked for has no gradient.
    if (work.chosen != nullptr)
      for (int64_t row = 0; row < qkv.size(0); ++row) std::fill_n(to + row * qkv.size(1), work.hidden(), static_cast<T>(0));
    const T *from = gradient.const_data_ptr<T>(), *probabilities = held.const_data_ptr<T>();
    share(work.units(), [&] { return Backward<T>(work); }, [&](int64_t unit, Backward<T>& scratch) {
      attend_backward(work, work.unit(unit), Dropout(dropped, 0).scale, probabilities, from, to, scratch);
    });
  });
  return of_qkv;
}

}  // namespace
}  // namespace dtbert

TORCH_LIBRARY_FRAGMENT(dtbert_native, library) {
  library.def("dropped_attention(Tensor qkv, Tensor cu_seqlens, int longest, int heads, float dropped, int seed, "
              "Tensor? rows, Tensor? cu_rows) -> (Tensor, Tensor)");
  library.def("dropped_attention_gradient(Tensor gradient, Tensor qkv, Tensor held, Tensor cu_seqlens, int longest, int heads, "
              "float dropped, Tensor? rows, Tensor? cu_rows) -> Tensor");
}

TORCH_LIBRARY_IMPL(dtbert_native, CPU, library) {
  library.impl("dropped_attention", dtbert::attention);
  library.impl("dropped_attention_gradient", dtbert::attention_gradient);
}
