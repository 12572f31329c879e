// The feed-forward's activations, and the slope of the one that BERT has.
#pragma once

#include "common.h"

namespace dtbert {

// In the order of `ACTIVATIONS` in __init__.py.
enum Activation : int64_t { kIdentity, kGelu, kGeluTanh, kRelu, kSilu };

// exp(-x) for x >= 0.
inline Vector decay(Vector x) { return exp2_of(x * -1.44269502f); }

inline Vector size_of(Vector x) { return larger(x, -x); }

// (1 + erf(x / sqrt(2))) / 2 by Abramowitz and Stegun 7.1.26, to 1e-7.
inline Vector normal_cdf(Vector x) {
  const Vector z = size_of(x) * 0.707106769f, t = 1.0f / (1.0f + 0.3275911f * z);
  Vector tail = 1.061405429f * t - 1.453152027f;
  tail = tail * t + 1.421413741f;
  tail = tail * t - 0.284496736f;
  tail = tail * t + 0.254829592f;
  tail *= 0.5f * t * decay(z * z);
  return x < 0 ? tail : 1.0f - tail;
}

// The same by a polynomial: x * normal_cdf_near(x) is right to 1e-4, and 0 or x beyond the end.
inline Vector normal_cdf_near(Vector x) {
  constexpr float kEnd = 4.25f;
  const Vector near = larger(smaller(x, all(kEnd)), all(-kEnd)), square = near * near;
  Vector sum = -8.46041515e-10f * square + 7.57083853e-08f;
  sum = sum * square - 2.93880453e-06f;
  sum = sum * square + 6.55271288e-05f;
  sum = sum * square - 0.000940447906f;
  sum = sum * square + 0.00925782416f;
  sum = sum * square - 0.0654534996f;
  sum = sum * square + 0.398420036f;
  return near * sum + 0.5f;
}

inline Vector sigmoid(Vector x) {
  const Vector small = decay(size_of(x)), inverse = 1.0f / (1.0f + small);
  return x < 0 ? small * inverse : inverse;
}

// T is what the result is rounded to.
template <Activation activation, typename T>
inline Vector activate(Vector x) {
  if constexpr (activation == kGelu) return x * (std::is_same_v<T, float> ? normal_cdf(x) : normal_cdf_near(x));
  if constexpr (activation == kGeluTanh) return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
  if constexpr (activation == kRelu) return larger(x, Vector{});
  if constexpr (activation == kSilu) return x * sigmoid(x);
  return x;
}

// The slope of GELU. T is what the result is rounded to.
template <typename T>
inline Vector gelu_slope(Vector x) {
  constexpr float kRootOfTwoPi = 2.50662827f;
  const Vector density = exp2_of(x * x * -0.721347520f) / kRootOfTwoPi;
  return (std::is_same_v<T, float> ? normal_cdf(x) : normal_cdf_near(x)) + x * density;
}

}  // namespace dtbert
