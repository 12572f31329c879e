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
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace dtbert {

using at::BFloat16;
using at::Tensor;

// Values that a register holds; where it holds fewer, a compiler keeps sums of such vectors in memory.
#if defined(__AVX__) && !defined(__AVX512F__)
constexpr int64_t kTile = 8;
#else
constexpr int64_t kTile = 16;
#endif

inline int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

typedef float Vector __attribute__((vector_size(4 * kTile), aligned(4)));
typedef int32_t Integers __attribute__((vector_size(4 * kTile), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * kTile), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * kTile), aligned(2)));

inline Vector all(float x) { return x - Vector{}; }

// Of a NaN and another value these give x. Left to the compiler they are a comparison and a choice.
inline Vector larger(Vector x, Vector y) {
#ifdef __AVX512F__
  return (Vector)_mm512_max_ps((__m512)y, (__m512)x);
#elif defined(__AVX__)
  return (Vector)_mm256_max_ps((__m256)y, (__m256)x);
#else
  return y > x ? y : x;
#endif
}

inline Vector smaller(Vector x, Vector y) {
#ifdef __AVX512F__
  return (Vector)_mm512_min_ps((__m512)y, (__m512)x);
#elif defined(__AVX__)
  return (Vector)_mm256_min_ps((__m256)y, (__m256)x);
#else
  return y < x ? y : x;
#endif
}

// Lanes of two vectors, counted through both.
template <int... lane>
inline Integers shuffled(Integers one, Integers other) {
#ifdef __clang__
  return __builtin_shufflevector(one, other, lane...);
#else
  return __builtin_shuffle(one, other, Integers{lane...});
#endif
}

// op over the values of a vector, half with half: few steps, always in the same order.
template <typename Op>
inline float folded(Vector x, const Op& op) {
  typedef float Half __attribute__((vector_size(2 * kTile)));
  typedef float Four __attribute__((vector_size(16)));
  struct Halves2 { Half low, high; };
  struct Fours { Four part[kTile / 8]; };
  const auto halves = std::bit_cast<Halves2>(x);
  const auto fours = std::bit_cast<Fours>(op(halves.low, halves.high));
  const Four four = kTile == 8 ? fours.part[0] : op(fours.part[0], fours.part[kTile / 8 - 1]);
  return op(op(four[0], four[2]), op(four[1], four[3]));
}

inline float sum_of(Vector x) {
  return folded(x, [](auto one, auto other) { return one + other; });
}

inline float largest_of(Vector x) {
  return folded(x, [](auto one, auto other) { return one > other ? one : other; });
}

// 2^x for x <= 0, to 2 units in the last place; below 2^-126 that, or what is nearer; NaN for NaN.
inline Vector exp2_of(Vector x) {
#ifdef __AVX512DQ__
  const Vector part = (Vector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  x = larger(x, all(-126.0f));
  const Vector shifted = x + kMagic, part = x - (shifted - kMagic);
#endif
  Vector power = 0.00133908634f * part + 0.00967603192f;
  power = power * part + 0.0555035711f;
  power = power * part + 0.240221075f;
  power = power * part + 0.693147188f;
  power = power * part + 1.00000008f;
#ifdef __AVX512DQ__
  return (Vector)_mm512_scalef_ps((__m512)power, (__m512)(x - part));
#else
  // A product: added to an exponent, the bits of a NaN would make some number.
  return power * (Vector)(((Integers)shifted - (std::bit_cast<int32_t>(kMagic) - 127)) << 23);
#endif
}

// The same to 1e-4, where there are instructions for it: a twentieth of what bfloat16 rounds off.
inline Vector exp2_near(Vector x) {
#ifdef __AVX512DQ__
  const Vector part = (Vector)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vector power = ((0.0780245226f * part + 0.226067155f) * part + 0.69583354f) * part + 0.999925219f;
  return (Vector)_mm512_scalef_ps((__m512)power, (__m512)x);  // by 2 to the whole number below x
#else
  return exp2_of(x);
#endif
}

inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline Integers load(const int32_t* from) { return *reinterpret_cast<const Integers*>(from); }

inline Vector load(const BFloat16* from) {
#ifdef __AVX512F__
  // As one conversion, not in halves.
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (Vector)_mm512_slli_epi32(bits, 16);
#else
  return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Bits) << 16);
#endif
}

inline void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }
inline void store(int32_t* to, Integers x) { *reinterpret_cast<Integers*>(to) = x; }

inline void store(BFloat16* to, Vector x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  const Bits bits = (Bits)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const Bits kept = x == x ? rounded : bits | 0x400000;  // rounded up, a NaN may become 0
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector(kept >> 16, Halves);
#endif
}

inline float value(float x) { return x; }
inline float value(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

// Values that lie side by side along the summed dimension, 32 bits of them, as the instructions of their kind take them.
template <typename T>
constexpr int64_t kNeighbours = 4 / sizeof(T);

// What products of a kind are summed in, for kTile columns.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, int8_t>, Integers, Vector>;

// Whether products of a kind are computed here, by vectors; the others are the matrix unit's.
template <typename T>
constexpr bool kOwn = true;
#if defined(__AMX_BF16__) || !defined(__AVX512BF16__)
template <>
constexpr bool kOwn<BFloat16> = false;
#endif
#ifdef __AMX_INT8__
template <>
constexpr bool kOwn<int8_t> = false;
#endif

// Rows that are computed for so many: the matrix unit takes kTile at a time.
template <typename T>
int64_t padded(int64_t count) {
  return kOwn<T> ? count : round_up(count, kTile);
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__AMX_INT8__)
constexpr bool kHasInt8 = true;
#else
constexpr bool kHasInt8 = false;
#endif

// sum + a x b: neighbours of a row, by those of kTile columns. int8 is of b; those of a have no sign.
template <typename T>
inline Sum<T> add_product(Sum<T> sum, int32_t a, Integers b) {
  if constexpr (std::is_same_v<T, float>) return sum + std::bit_cast<float>(a) * (Vector)b;
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>)
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#endif
#ifdef __AVX512VNNI__
  if constexpr (std::is_same_v<T, int8_t>)
    return (Integers)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(a), (__m512i)b);
#elif defined(__AVXVNNI__)
  if constexpr (std::is_same_v<T, int8_t>)
    return (Integers)_mm256_dpbusd_avx_epi32((__m256i)sum, _mm256_set1_epi32(a), (__m256i)b);
#endif
  __builtin_unreachable();
}

// Of products under way, each of kTile values; and the summed dimension is cut where kRegisters / 6 of them over it would
// outgrow the nearest cache.
#ifdef __AVX512F__
constexpr int kRegisters = 24;
constexpr int64_t kDepth = std::numeric_limits<int64_t>::max();
#else
constexpr int kRegisters = 12;
constexpr int64_t kDepth = 384;
#endif

inline int32_t bits_at(const void* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

// c [ROWS, kTile * VECTORS] = a [ROWS, inner] x b [inner, kTile * VECTORS], or is added to; meanwhile kTile * inner values
// come nearer that are needed next.
template <typename T, int ROWS, int VECTORS, typename A, typename C>
void multiply(int64_t inner, const A* a, int64_t a_stride, const T* b, int64_t b_stride, C* c, int64_t c_stride,
              const T* next, bool add) {
  Sum<T> sums[ROWS][VECTORS] = {};
  if (add) {
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = load(c + r * c_stride + v * kTile);
  }
  for (int64_t k = 0; k < inner; k += kNeighbours<T>) {
    Integers row[VECTORS];
    __builtin_prefetch(next + k * kTile, 0, 2);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row[v] = *reinterpret_cast<const Integers*>(b + k * b_stride + v * kTile * kNeighbours<T>);
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r) {
      const int32_t factor = bits_at(a + r * a_stride + k);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = add_product<T>(sums[r][v], factor, row[v]);
    }
  }
  // Unrolled too, else the sums lie in memory between.
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(c + r * c_stride + v * kTile, sums[r][v]);
}

template <typename T, int ROWS, int VECTORS, typename A, typename C>
void multiply_rows(int64_t rows, int64_t inner, const A* a, int64_t a_stride, const T* b, int64_t b_stride, C* c,
                   int64_t c_stride, const T* next, bool add) {
  int64_t row = 0;
  for (int64_t part = 0; row + ROWS <= rows; row += ROWS, ++part)
    multiply<T, ROWS, VECTORS>(inner, a + row * a_stride, a_stride, b, b_stride, c + row * c_stride, c_stride,
                               next + std::min<int64_t>(part, VECTORS - 1) * kTile * inner, add);
  if constexpr (ROWS > 1)
    multiply_rows<T, (ROWS > 4 ? 4 : ROWS / 2), VECTORS>(rows - row, inner, a + row * a_stride, a_stride, b, b_stride,
                                                        c + row * c_stride, c_stride, next, add);
}

// c [rows, columns] = a [rows, inner] x b [inner, columns], or is added to; b in neighbours of which `b_stride` columns lie
// in a row; columns and strides are multiples of kTile, and inner of the neighbours. int8 is b's kind: its a has no sign.
// `next`, of b's size, is what comes after b.
template <typename T, typename A, typename C>
void multiply(int64_t rows, int64_t columns, int64_t inner, const A* a, int64_t a_stride, const T* b, int64_t b_stride,
              C* c, int64_t c_stride, const T* next, bool add = false) {
  if constexpr (!kOwn<T>) {
    at::native::cpublas::brgemm(rows, columns, inner, a_stride, b_stride, c_stride, add, a, b, c, true);
    return;
  } else {
    constexpr int64_t n = kNeighbours<T>;
    for (int64_t from = 0; from < inner; from += kDepth) {
      const int64_t depth = std::min(kDepth, inner - from);
      const auto some = [&]<int ROWS, int VECTORS>(int64_t at) {
        multiply_rows<T, ROWS, VECTORS>(rows, depth, a + from, a_stride, b + from * b_stride + at * n, b_stride, c + at,
                                        c_stride, next + from * kTile * VECTORS, add || from > 0);
      };
      int64_t at = 0;
      if constexpr (kRegisters >= 24)
        for (; at + 4 * kTile <= columns; at += 4 * kTile) some.template operator()<kRegisters / 4, 4>(at);
      for (; at + 2 * kTile <= columns; at += 2 * kTile) some.template operator()<kRegisters / 2, 2>(at);
      for (; at < columns; at += kTile) some.template operator()<6, 1>(at);
      if (depth == inner) break;  // kDepth may be the greatest number
    }
  }
}

// Memory that a thread keeps from step to step, a place of it for each use; what lies in it is of the step before. Fresh
// memory would cost a fault for each of its pages.
template <typename T, int place>
T* kept_room(int64_t count) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kLine); }
  };
  thread_local std::unique_ptr<T, Free> memory;
  thread_local int64_t held = 0;
  if (count > held) {
    memory.reset(static_cast<T*>(::operator new(count * sizeof(T), kLine)));
    held = count;
  }
  return memory.get();
}

// work(T) for the kind of some states.
template <typename Do>
void by_states(const Tensor& states, const Do& work) {
  if (states.scalar_type() == at::kFloat) return work(float{});
  TORCH_CHECK_TYPE(states.scalar_type() == at::kBFloat16, "the compiled steps take states in float32 or bfloat16, not in ",
                   states.scalar_type());
  work(BFloat16{});
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
