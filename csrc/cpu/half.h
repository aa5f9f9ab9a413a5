// Reading and writing half precision in loops that vectorise: integer arithmetic on the bits, without a branch and
// without an instruction set that every clone would have to have. Exact for every value; rounds to nearest, ties to
// even.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/stable.h"
#include "cpu/vectorize.h"

namespace debiaskd {

DEBIASKD_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DEBIASKD_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// All ones where the condition holds, for choosing without a branch.
DEBIASKD_INLINE uint32_t all_ones(bool condition) { return -static_cast<uint32_t>(condition); }

DEBIASKD_INLINE float load(float value) { return value; }
DEBIASKD_INLINE double load(double value) { return value; }
DEBIASKD_INLINE float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.x) << 16); }

DEBIASKD_INLINE float load(Half value) {
  const uint32_t sign = (value.x & 0x8000u) << 16, magnitude = value.x & 0x7fffu;
  // The exponents' biases differ by 112; the multiplication moves them and makes subnormal halves normal.
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  return float_of(sign | finite | (all_ones(magnitude >= 0x7c00u) & 0x7f800000u));
}

DEBIASKD_INLINE void store(float value, float* out) { *out = value; }
DEBIASKD_INLINE void store(double value, double* out) { *out = value; }

DEBIASKD_INLINE void store(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = all_ones((bits & 0x7fffffffu) > 0x7f800000u);
  out->x = static_cast<uint16_t>((rounded & ~nan) | (0x7fc0u & nan));
}

DEBIASKD_INLINE void store(float value, Half* out) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 1/2 shifts a subnormal half's digits to the end of the float, rounded by the addition itself.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = 0x7c00u | (static_cast<uint32_t>(magnitude > 0x7f800000u) << 9);
  const uint32_t small = all_ones(magnitude < 0x38800000u), large = all_ones(magnitude >= 0x477ff000u);
  const uint32_t rounded = (((normal & ~small) | (subnormal & small)) & ~large) | (special & large);
  out->x = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | rounded);
}

}  // namespace debiaskd
