// exp and log for loops that vectorise: no branch, no call, and no instruction set that every clone would have to have.
// float after Cephes (expf, logf), within 2 units in the last place; double is for checks and takes the library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/half.h"
#include "cpu/vectorize.h"

namespace debiaskd {

// exp(x) for x <= 88; 0 below -87.3, where a float would be subnormal. -inf gives 0, NaN gives NaN.
DEBIASKD_INLINE float exp_bounded(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which its last bits then hold
  const float shifted = x * 1.44269504088896341f + kMagic;
  const float n = shifted - kMagic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const uint32_t scaled = bits_of(p * r * r + r + 1.0f) + ((bits_of(shifted) - bits_of(kMagic)) << 23);
  const uint32_t normal = all_ones(x >= -87.3f), nan = all_ones(x != x);
  return float_of((scaled & normal) | (bits_of(x) & nan));
}

DEBIASKD_INLINE double exp_bounded(double x) { return std::exp(x); }

// log(x) of a positive, normal, finite x. NaN gives NaN.
DEBIASKD_INLINE float log_positive(float x) {
  constexpr uint32_t kRootHalf = 0x3f3504f3u;  // the mantissa comes to lie between sqrt(1/2) and sqrt(2)
  const int32_t exponent = static_cast<int32_t>(bits_of(x) - kRootHalf) >> 23;
  const float e = static_cast<float>(exponent);
  const float f = float_of(bits_of(x) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f, f2 = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float y = f * f2 * p + e * -2.12194440e-4f - 0.5f * f2;
  const float result = f + y + e * 0.693359375f;
  const uint32_t nan = all_ones(x != x);
  return float_of((bits_of(result) & ~nan) | (bits_of(x) & nan));
}

DEBIASKD_INLINE double log_positive(double x) { return std::log(x); }

}  // namespace debiaskd
