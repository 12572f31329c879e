// What attention and its gradient share: a head's rows as products take them, and the softmax of a row.
#pragma once

#include "common.h"
#include "tiles.h"

namespace dtbert {

// Keys that one product takes.
constexpr int64_t kKeys = 64;
// Queries that are worked through at a time.
template <typename T>
constexpr int64_t kStrip = kOwn<T> ? 24 : kKeys;
// What the summed dimension is rounded up to where it is keys or queries.
template <typename T>
constexpr int64_t kDepthStep = kOwn<T> ? kNeighbours<T> : 32;
// What keys are rounded up to in a row of logits.
constexpr int64_t kWidthStep = 16;

// What attention reads: queries, keys and values of packed sequences.
template <typename T>
struct Heads {
  const T* qkv;  // [T, 3 * H]
  int64_t row_stride, heads, head_size;
  const int32_t* begins;        // [B + 1]
  const int64_t* chosen;        // rows of the queries, or null: all
  const int32_t* query_begins;  // [B + 1], of the chosen, or null
  int64_t longest;              // keys, rounded up to kKeys

  int64_t hidden() const { return heads * head_size; }
  int64_t row_of(int64_t query) const { return chosen == nullptr ? query : chosen[query]; }
};

// kTile rows of as many words each, that `row_of` gives, transposed.
struct Square {
  Integers rows[kTile];

  template <typename Row>
  explicit Square(const Row& row_of) {
    for (int64_t row = 0; row < kTile; ++row) rows[row] = row_of(row);
    transpose<kTile / 2>();
  }

 private:
  // Swaps blocks of `width` beside the diagonal, then smaller ones within each.
  template <int width>
  void transpose() {
    const auto pass = [&]<int... lane>(std::integer_sequence<int, lane...>) {
      for (int row = 0; row < kTile; ++row) {
        if (row & width) continue;
        const Integers upper = rows[row], lower = rows[row + width];
        rows[row] = shuffled<(lane & width ? kTile + lane - width : lane)...>(upper, lower);
        rows[row + width] = shuffled<(lane & width ? kTile + lane : lane + width)...>(upper, lower);
      }
    };
    pass(std::make_integer_sequence<int, kTile>());
    if constexpr (width > 1) transpose<width / 2>();
  }
};

// Rows [n, D] for products that sum over D: transposed, neighbours side by side, in blocks of kKeys; 0 past the end.
template <typename T>
void pack_columns(const T* from, int64_t stride, int64_t n, int64_t d, T* to) {
  const int64_t words = d / kNeighbours<T>;
  int32_t* out = reinterpret_cast<int32_t*>(to);
  for (int64_t block = 0; block < n; block += kKeys, out += kKeys * words)
    for (int64_t j = 0; j < kKeys; j += kTile)
      for (int64_t i = 0; i < words; i += kTile) {
        const Square square([&](int64_t row) {
          Integers some{};
          const T* at = from + (block + j + row) * stride + i * kNeighbours<T>;
          if (block + j + row >= n) return some;
          if (words - i >= kTile) return load(reinterpret_cast<const int32_t*>(at));
          std::memcpy(&some, at, (words - i) * sizeof(int32_t));
          return some;
        });
        for (int64_t row = 0; row < std::min(kTile, words - i); ++row) store(out + (i + row) * kKeys + j, square.rows[row]);
      }
}

// Two rows with neighbours side by side; where `other` is null it is 0.
inline void pair(const BFloat16* one, const BFloat16* other, int64_t columns, BFloat16* to) {
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  for (int64_t k = 0; k < columns; k += kTile) {
    const auto bits = [&](const BFloat16* from) {
      return __builtin_convertvector(*reinterpret_cast<const Halves*>(from + k), Bits);
    };
    Bits word = bits(one);
    if (other != nullptr) word |= bits(other) << 16;
    *reinterpret_cast<Bits*>(words + k) = word;
  }
}

inline void pair(const float* one, const float*, int64_t columns, float* to) { std::copy_n(one, columns, to); }

// Rows [n, D] for products that sum over n: neighbours side by side; 0 past the end, up to kKeys.
template <typename T>
void pack_rows(const T* from, int64_t stride, int64_t n, int64_t d, T* to) {
  for (int64_t j = 0; j < n; j += kNeighbours<T>) {
    const T* row = from + j * stride;
    pair(row, j + 1 < n ? row + stride : nullptr, d, to + j * d);
  }
  const int64_t end = round_up(n, kNeighbours<T>);
  std::fill_n(to + end * d, (round_up(n, kKeys) - end) * d, static_cast<T>(0));
}

// As `multiply`, of rows that `padded` counts.
template <typename T>
void multiply_head(int64_t rows, int64_t columns, int64_t inner, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
                   float* c, int64_t c_stride, bool add = false) {
  if constexpr (kTiled<T>) multiply_by_tiles(rows, columns, inner, a, a_stride, b, b_stride, c, c_stride, add);
  else multiply(rows, columns, inner, a, a_stride, b, b_stride, c, c_stride, b, add);
}

// to [rows, n], n rounded up to kWidthStep, = x [rows, D] x what `pack_columns` made of [n, D].
template <typename T>
void multiply_by_columns(int64_t rows, int64_t n, int64_t d, const T* x, int64_t x_stride, const T* packed, float* to,
                         int64_t to_stride) {
  for (int64_t block = 0; block < n; block += kKeys)
    multiply_head(rows, std::min(kKeys, round_up(n - block, kWidthStep)), d, x, x_stride, packed + block * d, kKeys, to + block,
                  to_stride);
}

// to [rows, D] = x [rows, n] x what `pack_rows` made of [n, D]. Past n, x is 0 up to kDepthStep.
template <typename T>
void multiply_by_rows(int64_t rows, int64_t n, int64_t d, const T* x, int64_t x_stride, const T* packed, float* to) {
  multiply_head(rows, d, round_up(n, kDepthStep<T>), x, x_stride, packed, d, to, d);
}

// Softmax of a row without its quotient: powers of the logits, as many as `columns`, of which n are real; and their sum,
// which is NaN if a logit is NaN, or the greatest infinite. `twice`: the powers, as of float32,
// take the logits' place, too.
template <typename P>
float powers_of(float* logits, int64_t n, int64_t columns, float scale, P* powers, bool twice = false) {
  for (int64_t k = n; k < columns; ++k) logits[k] = -std::numeric_limits<float>::infinity();
  // Two at a time, for each waits for the one before.
  Vector most = load(logits), other = most, total{};
  int64_t at = kTile;
  for (; at + kTile < columns; at += 2 * kTile) {
    most = larger(most, load(logits + at));
    other = larger(other, load(logits + at + kTile));
  }
  if (at < columns) most = larger(most, load(logits + at));
  const float shift = largest_of(larger(most, other)) * scale;
  for (int64_t k = 0; k < columns; k += kTile) {
    const Vector exponent = load(logits + k) * scale - shift;
    const Vector power = std::is_same_v<P, float> || twice ? exp2_of(exponent) : exp2_near(exponent);
    store(powers + k, power);
    if (twice) store(logits + k, power);
    total += power;
  }
  // What is nearly 0 becomes, divided, a subnormal number, and many a processor takes a hundred cycles for each.
  std::fill(powers + n, powers + columns, static_cast<P>(0));
  return sum_of(total);
}

// Of logits that are to be divided by the root of D, and powers of 2.
inline float softmax_scale(int64_t d) { return static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(d))); }

}  // namespace dtbert
