// What the steps share: numbers, rows of them, and products that float32 takes.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace dtbert {

using at::BFloat16;
using at::Tensor;

constexpr int64_t kTile = 16;

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// kTile values at a time, whatever the registers hold.
typedef float Vector __attribute__((vector_size(4 * kTile), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * kTile), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * kTile), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * kTile), aligned(2)));

inline Vector all(float x) { return x - Vector{}; }
inline Vector larger(Vector x, Vector y) { return x > y ? x : y; }

inline float sum_of(Vector x) {
  float total = 0;
  for (int i = 0; i < kTile; ++i) total += x[i];
  return total;
}

inline float largest_of(Vector x) {
  float found = x[0];
  for (int i = 1; i < kTile; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

// 2^x for x <= 0, to 2 units in the last place; 2^-126 below that.
inline Vector exp2_of(Vector x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = larger(x, all(-126.0f));
  const Vector shifted = x + kMagic, part = x - (shifted - kMagic);
  Vector power = 0.00133908634f * part + 0.00967603192f;
  power = power * part + 0.0555035711f;
  power = power * part + 0.240221075f;
  power = power * part + 0.693147188f;
  power = power * part + 1.00000008f;
  return (Vector)((Integers)power + (((Integers)shifted - std::bit_cast<int32_t>(kMagic)) << 23));
}

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }

inline Vector load(const BFloat16* from) {
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
}

inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }

inline void store(BFloat16* to, Vector x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const Bits bits = (Bits)x;
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
#endif
}

inline float value(float x) { return x; }
inline float value(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

#ifdef __AVX512F__
constexpr int kRegisters = 24;  // of products under way, each of kTile values
#else
constexpr int kRegisters = 6;
#endif
// c [ROWS, kTile * VECTORS] = a [ROWS, inner] x b [inner, kTile * VECTORS]
template <int ROWS, int VECTORS>
void multiply(int64_t inner, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  Vector sums[ROWS][VECTORS] = {};
  for (int64_t k = 0; k < inner; ++k) {
    Vector row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row[v] = *reinterpret_cast<const Vector*>(b + k * b_stride + v * kTile);
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a[r * a_stride + k];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] += factor * row[v];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(c + r * c_stride + v * kTile) = sums[r][v];
}

template <int ROWS, int VECTORS>
void multiply_rows(int64_t rows, int64_t inner, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                   int64_t c_stride) {
  int64_t row = 0;
  for (; row + ROWS <= rows; row += ROWS)
    multiply<ROWS, VECTORS>(inner, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride);
  if constexpr (ROWS > 1)
    multiply_rows<(ROWS > 4 ? 4 : ROWS / 2), VECTORS>(rows - row, inner, a + row * a_stride, a_stride, b, b_stride,
                                                     c + row * c_stride, c_stride);
}

// c [rows, columns] = a [rows, inner] x b [inner, columns]; columns are a multiple of kTile.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const float* a, int64_t a_stride, const float* b,
              int64_t b_stride, float* c, int64_t c_stride) {
  int64_t at = 0;
  if constexpr (kRegisters >= 24)
    for (; at + 4 * kTile <= columns; at += 4 * kTile)
      multiply_rows<kRegisters / 4, 4>(rows, inner, a, a_stride, b + at, b_stride, c + at, c_stride);
  if constexpr (kRegisters >= 24)
    for (; at + 2 * kTile <= columns; at += 2 * kTile)
      multiply_rows<kRegisters / 2, 2>(rows, inner, a, a_stride, b + at, b_stride, c + at, c_stride);
  for (; at < columns; at += kTile) multiply_rows<6, 1>(rows, inner, a, a_stride, b + at, b_stride, c + at, c_stride);
}

// Calls work(unit, scratch) for each unit, whoever is free the next one; each thread makes its scratch once.
template <typename Make, typename Do>
void share(int64_t units, const Make& make, const Do& work) {
  if (units == 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), units), 1, [&](int64_t from, int64_t to) {
    for (; from < to; ++from) {
      auto scratch = make();
      for (int64_t unit = next++; unit < units; unit = next++) work(unit, scratch);
      at::native::cpublas::brgemm_release();  // the matrix unit's tiles
    }
  });
}

}  // namespace dtbert
