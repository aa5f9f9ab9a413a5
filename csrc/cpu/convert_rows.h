// Rows of any floating dtype in the accumulator's type.
#pragma once

#include <cstdint>

#include "common/stable.h"
#include "cpu/half.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

template <typename T, typename A>
DEBIASKD_INLINE void convert_body(const T* in, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = load(in[i]);
}

#define DEBIASKD_CONVERT(T, A) \
  DEBIASKD_CLONES void convert_row(const T* in, A* out, int64_t n) { convert_body(in, out, n); }
DEBIASKD_CONVERT(float, float)
DEBIASKD_CONVERT(double, double)
DEBIASKD_CONVERT(BFloat16, float)
DEBIASKD_CONVERT(Half, float)
#undef DEBIASKD_CONVERT

}  // namespace
}  // namespace debiaskd
