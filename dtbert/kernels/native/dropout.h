// What training drops: of a seed and a unit of work, whatever the number of threads.
#pragma once

#include "common.h"

namespace dtbert {

// What is dropped: of 2**32 values so many, and what the others are scaled by.
struct Dropout {
  uint32_t below;
  float scale;
  uint64_t seed;

  // `dropped` is a part, from 0 to below 1.
  Dropout(double dropped, int64_t of)
      : below(static_cast<uint32_t>(std::ldexp(dropped, 32))),
        scale(static_cast<float>(1 / (1 - dropped))),
        seed(static_cast<uint64_t>(of)) {}
};

// The generator xoshiro128+ of Blackman and Vigna (2018), one for each lane, of 32 bits a draw.
class Draws {
 public:
  Draws(uint64_t seed, uint64_t unit) {
    for (Bits& part : state_)
      for (int64_t lane = 0; lane < kTile; ++lane) part[lane] = static_cast<uint32_t>(mixed(seed + unit * kStep, ++count_) >> 32);
  }

  // Whether each of kTile values is dropped: all bits or none.
  Integers dropped(uint32_t below) {
    const Bits drawn = state_[0] + state_[3], shifted = state_[1] << 9;
    state_[2] ^= state_[0];
    state_[3] ^= state_[1];
    state_[1] ^= state_[2];
    state_[0] ^= state_[3];
    state_[2] ^= shifted;
    state_[3] = state_[3] << 11 | state_[3] >> 21;
    return (Integers)(drawn < below);
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;

  // splitmix64
  static uint64_t mixed(uint64_t seed, uint64_t count) {
    uint64_t z = seed * 0xd1342543de82ef95 + count * kStep;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }

  Bits state_[4];
  uint64_t count_ = 0;
};

inline Vector zero_where(Integers mask, Vector x) { return (Vector)((Integers)x & ~mask); }

inline Vector negated_where(Integers mask, Vector x) {
  return (Vector)((Integers)x ^ (mask & std::numeric_limits<int32_t>::min()));
}

// 0 where a sign stands, be it of a zero.
inline Vector without_signed(Vector x) { return (Vector)((Integers)x & ~((Integers)x >> 31)); }

inline Vector unsigned_of(Vector x) { return (Vector)((Integers)x & std::numeric_limits<int32_t>::max()); }

}  // namespace dtbert
