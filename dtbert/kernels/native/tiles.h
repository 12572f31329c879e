// Small products by the matrix unit of x86 (AMX), without a library's call for each: attention has one for every 64 keys of
// 64 queries.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dtbert {

// Whether products of a kind go by tiles.
template <typename T>
constexpr bool kTiled = false;

// While it lives, a thread's tiles are set up for products of a kind, all of full size.
template <typename T>
class Tiles {};

#ifdef __AMX_BF16__

template <>
constexpr bool kTiled<at::BFloat16> = true;

// Rows of a tile, and bytes in each.
constexpr int64_t kTileRows = 16, kTileBytes = 64;

// What was written to some memory is there: GCC does not know that a tile's loads read.
inline void written(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

template <>
class Tiles<at::BFloat16> {
 public:
  Tiles() {
    // Linux lets a process use them once it has asked: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
    static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    TORCH_CHECK(allowed, "this system does not let a process use the processor's matrix unit (AMX)");
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = kTileBytes, config[48 + tile] = kTileRows;
    written(config);
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

// c = a x b, or is added to: ROWS x COLUMNS tiles of it, either of which is 1 or 2. Strides are in bytes, and so is `inner`,
// what is taken of a row of a.
template <int ROWS, int COLUMNS>
void multiply_tiles(int64_t inner, const char* a, int64_t a_stride, const char* b, int64_t b_stride, char* c,
                    int64_t c_stride, bool add) {
  written(a);
  const int64_t a_down = kTileRows * a_stride, c_down = kTileRows * c_stride;
  // Tiles 0 to 3 are of c, 4 and 5 of a, 6 and 7 of b.
  if (add) {
    _tile_loadd(0, c, c_stride);
    if constexpr (COLUMNS == 2) _tile_loadd(1, c + kTileBytes, c_stride);
    if constexpr (ROWS == 2) _tile_loadd(2, c + c_down, c_stride);
    if constexpr (ROWS + COLUMNS == 4) _tile_loadd(3, c + c_down + kTileBytes, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (COLUMNS == 2) _tile_zero(1);
    if constexpr (ROWS == 2) _tile_zero(2);
    if constexpr (ROWS + COLUMNS == 4) _tile_zero(3);
  }
  const auto step = [](const char* left, int64_t left_stride, int64_t left_down, const char* right, int64_t right_stride,
                       int64_t right_on) {
    _tile_loadd(4, left, left_stride);
    _tile_loadd(6, right, right_stride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (COLUMNS == 2) {
      _tile_loadd(7, right + right_on, right_stride);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (ROWS == 2) {
      _tile_loadd(5, left + left_down, left_stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (ROWS + COLUMNS == 4) _tile_dpbf16ps(3, 5, 7);
  };
  for (; inner >= kTileBytes; inner -= kTileBytes, a += kTileBytes, b += kTileRows * b_stride)
    step(a, a_stride, a_down, b, b_stride, kTileBytes);
  if (inner > 0) {
    // What does not fill a tile, beside zeros.
    alignas(64) char left[ROWS * kTileRows][kTileBytes] = {}, right[COLUMNS][kTileRows][kTileBytes] = {};
    for (int64_t row = 0; row < ROWS * kTileRows; ++row) std::memcpy(left[row], a + row * a_stride, inner);
    for (int64_t row = 0; row < inner / 4; ++row)
      for (int64_t column = 0; column < COLUMNS; ++column)
        std::memcpy(right[column][row], b + row * b_stride + column * kTileBytes, kTileBytes);
    written(left), written(right);
    step(left[0], kTileBytes, kTileRows * kTileBytes, right[0][0], kTileBytes, kTileRows * kTileBytes);
  }
  _tile_stored(0, c, c_stride);
  if constexpr (COLUMNS == 2) _tile_stored(1, c + kTileBytes, c_stride);
  if constexpr (ROWS == 2) _tile_stored(2, c + c_down, c_stride);
  if constexpr (ROWS + COLUMNS == 4) _tile_stored(3, c + c_down + kTileBytes, c_stride);
}

// As `multiply` in common.h; rows and columns are multiples of kTileRows, `inner` of 2.
inline void multiply_by_tiles(int64_t rows, int64_t columns, int64_t inner, const at::BFloat16* a, int64_t a_stride,
                              const at::BFloat16* b, int64_t b_stride, float* c, int64_t c_stride, bool add) {
  const auto some = [&]<int ROWS, int COLUMNS>(int64_t row, int64_t column) {
    multiply_tiles<ROWS, COLUMNS>(2 * inner, reinterpret_cast<const char*>(a + row * a_stride), 2 * a_stride,
                                  reinterpret_cast<const char*>(b + 2 * column), 4 * b_stride,
                                  reinterpret_cast<char*>(c + row * c_stride + column), 4 * c_stride, add);
  };
  for (int64_t column = 0; column < columns; column += 2 * kTileRows)
    for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
      const bool two = column + kTileRows < columns;
      if (row + kTileRows < rows) {
        if (two) some.template operator()<2, 2>(row, column);
        else some.template operator()<2, 1>(row, column);
      } else {
        if (two) some.template operator()<1, 2>(row, column);
        else some.template operator()<1, 1>(row, column);
      }
    }
}

#endif

}  // namespace dtbert
