// How small a sum of shifted exponentials may be before it is added up term by term, on every device alike.
#pragma once

#include <limits>

#include "common/host_device.h"

namespace debiaskd {

// Terms in [0,1] that underflow are too small for a normal number, and what a sum misses by them is less than one
// rounding as long as it is at least this. 2^-64 and not 2^-101, where float32 would still allow it: gradients multiply
// by the sum's reciprocal, and this way 2^63 of range remain for them.
template <typename A>
inline constexpr A kSmallest = A(0x1p-64);
template <>
inline constexpr double kSmallest<double> = 0x1p-512;
// -log(kSmallest)
template <typename A>
inline constexpr A kFarthest = A(44.36141955583649);
template <>
inline constexpr double kFarthest<double> = 354.8913564466919;

template <typename A>
inline constexpr A kLowest = std::numeric_limits<A>::lowest();

// A maximum to shift by: finite even where everything is -inf (a prior of 0), so that -inf stays -inf.
template <typename A>
DEBIASKD_HOST_DEVICE inline A as_shift(A maximum) {
  return maximum < kLowest<A> ? kLowest<A> : maximum;
}

}  // namespace debiaskd
