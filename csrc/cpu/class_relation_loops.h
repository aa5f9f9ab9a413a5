// The inner loops of class_relation: small blocks of a Gram matrix, and rows combined linearly.
#pragma once

#include <cstdint>

#include "common/stable.h"
#include "cpu/half.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

// out[2 r + c] = x[r] · y[c], for 4 rows by 2: each element loaded serves in two products or four, and the eight sums
// and their operands fit into the registers of every instruction set.
template <typename A>
DEBIASKD_INLINE void dots_body(const A* const* x, const A* const* y, int64_t n, A* out) {
  const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3], *y0 = y[0], *y1 = y[1];
  A s00 = 0, s01 = 0, s10 = 0, s11 = 0, s20 = 0, s21 = 0, s30 = 0, s31 = 0;
#pragma omp simd reduction(+ : s00, s01, s10, s11, s20, s21, s30, s31)
  for (int64_t i = 0; i < n; ++i) {
    const A a = y0[i], b = y1[i];
    s00 += x0[i] * a, s01 += x0[i] * b;
    s10 += x1[i] * a, s11 += x1[i] * b;
    s20 += x2[i] * a, s21 += x2[i] * b;
    s30 += x3[i] * a, s31 += x3[i] * b;
  }
  const A sums[8] = {s00, s01, s10, s11, s20, s21, s30, s31};
  for (int i = 0; i < 8; ++i) out[i] = sums[i];
}

// out[r] += sum of factor[4 r + c] * x[c], for `rows` rows (4 at most) and 4 terms.
template <typename A>
DEBIASKD_INLINE void combine_body(A* const* out, int64_t rows, const A* factor, const A* const* x, int64_t n) {
  const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  if (rows == 4) {
    A *o0 = out[0], *o1 = out[1], *o2 = out[2], *o3 = out[3];
    A f[16];
    for (int i = 0; i < 16; ++i) f[i] = factor[i];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const A a = x0[i], b = x1[i], c = x2[i], d = x3[i];
      o0[i] += f[0] * a + f[1] * b + f[2] * c + f[3] * d;
      o1[i] += f[4] * a + f[5] * b + f[6] * c + f[7] * d;
      o2[i] += f[8] * a + f[9] * b + f[10] * c + f[11] * d;
      o3[i] += f[12] * a + f[13] * b + f[14] * c + f[15] * d;
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* o = out[r];
    const A f0 = factor[4 * r], f1 = factor[4 * r + 1], f2 = factor[4 * r + 2], f3 = factor[4 * r + 3];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) o[i] += f0 * x0[i] + f1 * x1[i] + f2 * x2[i] + f3 * x3[i];
  }
}

template <typename T, typename A>
DEBIASKD_INLINE void widen_body(const T* in, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = load(in[i]);
}

#define DEBIASKD_BLOCKS(A)                                                                                        \
  DEBIASKD_CLONES void dots(const A* const* x, const A* const* y, int64_t n, A* out) { dots_body(x, y, n, out); } \
  DEBIASKD_CLONES void combine(A* const* out, int64_t rows, const A* factor, const A* const* x, int64_t n) {      \
    combine_body(out, rows, factor, x, n);                                                                        \
  }
DEBIASKD_BLOCKS(float)
DEBIASKD_BLOCKS(double)

DEBIASKD_CLONES void widen(const BFloat16* in, float* out, int64_t n) { widen_body(in, out, n); }
DEBIASKD_CLONES void widen(const Half* in, float* out, int64_t n) { widen_body(in, out, n); }

}  // namespace
}  // namespace debiaskd
