// What attention and its gradient share: a head's rows as products take them, and the softmax of a row.
#pragma once

#include "common.h"

namespace dtbert {

// Keys that one product takes.
constexpr int64_t kKeys = 64;
// Queries that are worked through at a time; the matrix unit gets few shapes, for each is compiled once.
template <typename T>
constexpr int64_t kStrip = kOwn<T> ? 24 : kKeys;

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

// Rows [n, D] for products that sum over D: transposed, neighbours side by side, in blocks of kKeys; 0 past the end.
inline void pack_columns(const BFloat16* from, int64_t stride, int64_t n, int64_t d, BFloat16* to) {
  const int64_t pairs = d / 2;
  uint32_t* words = reinterpret_cast<uint32_t*>(to);
  for (int64_t block = 0; block < n; block += kKeys, words += kKeys * pairs) {
    const int64_t real = std::min(kKeys, n - block);
    for (int64_t j = 0; j < kKeys; ++j) {
      const BFloat16* row = from + (block + j) * stride;
      for (int64_t i = 0; i < pairs; ++i) words[i * kKeys + j] = j < real ? bits_at(row + 2 * i) : 0;
    }
  }
}

inline void pack_columns(const float* from, int64_t stride, int64_t n, int64_t d, float* to) {
  for (int64_t block = 0; block < n; block += kKeys, to += kKeys * d) {
    const int64_t real = std::min(kKeys, n - block);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < kKeys; ++j) to[i * kKeys + j] = j < real ? from[(block + j) * stride + i] : 0;
  }
}

// Rows [n, D] for products that sum over n: neighbours side by side; 0 past the end, up to kKeys.
inline void pack_rows(const BFloat16* from, int64_t stride, int64_t n, int64_t d, BFloat16* to) {
  const int64_t padded = round_up(n, kKeys);
  for (int64_t j = 0; j < padded; j += 2) {
    uint16_t* pair = reinterpret_cast<uint16_t*>(to + j * d);
    const uint16_t* row = reinterpret_cast<const uint16_t*>(from + j * stride);
    if (j + 1 < n) {
      for (int64_t i = 0; i < d; ++i) pair[2 * i] = row[i], pair[2 * i + 1] = row[stride + i];
    } else {
      const bool one = j < n;
      for (int64_t i = 0; i < d; ++i) pair[2 * i] = one ? row[i] : 0, pair[2 * i + 1] = 0;
    }
  }
}

inline void pack_rows(const float* from, int64_t stride, int64_t n, int64_t d, float* to) {
  for (int64_t j = 0; j < n; ++j) std::copy(from + j * stride, from + j * stride + d, to + j * d);
}

// to [rows, n] = x [rows, D] x what `pack_columns` made of [n, D].
template <typename T>
void multiply_by_columns(int64_t rows, int64_t n, int64_t d, const T* x, const T* packed, float* to, int64_t to_stride) {
  for (int64_t block = 0; block < n; block += kKeys) {
    const T* columns = packed + block * d;
    multiply(rows, kKeys, d, x, d, columns, kKeys, to + block, to_stride, columns);
  }
}

// to [rows, D] = x [rows, n] x what `pack_rows` made of [n, D]. Past n, x is 0 up to a neighbour, or to kKeys for the
// matrix unit.
template <typename T>
void multiply_by_rows(int64_t rows, int64_t n, int64_t d, const T* x, int64_t x_stride, const T* packed, float* to) {
  if constexpr (kOwn<T>) {
    multiply(rows, d, round_up(n, kNeighbours<T>), x, x_stride, packed, d, to, d, packed);
  } else {
    for (int64_t block = 0; block < n; block += kKeys)
      multiply(rows, d, kKeys, x + block, x_stride, packed + block * d, d, to, d, packed, block > 0);
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

// Of logits that are to be divided by the root of D, and powers of 2.
inline float softmax_scale(int64_t d) { return static_cast<float>(M_LOG2E / std::sqrt(static_cast<double>(d))); }

}  // namespace dtbert
