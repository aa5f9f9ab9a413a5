// The inner loops of channel_dot: contiguous rows, each compiled for every instruction set.
#pragma once

#include <algorithm>

#include "common/stable.h"
#include "cpu/half.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

constexpr int64_t kDotRun = 128;  // terms along a row that are added up before a double takes the sum

// out[i] = the dot product of row i of g and row i of a, n elements each. Many at a call: rows may be short.
template <typename G, typename T, typename A>
DEBIASKD_INLINE void dots_body(const G* g, int64_t gs, const T* a, int64_t as, int64_t rows, int64_t n, A* out) {
  for (int64_t r = 0; r < rows; ++r, g += gs, a += as) {
    double total = 0;
    for (int64_t begin = 0; begin < n; begin += kDotRun) {
      const int64_t end = std::min(n, begin + kDotRun);
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = begin; i < end; ++i) sum += load(g[i]) * load(a[i]);
      total += sum;
    }
    out[r] = static_cast<A>(total);
  }
}

// sum[p] += the products of four rows at once, so that the sums are loaded and stored once for four.
template <typename T, typename A>
DEBIASKD_INLINE void add_products_body(
    const T* g, int64_t gs, const T* a, int64_t as, int64_t rows, A* sum, int64_t n) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, g += 4 * gs, a += 4 * as) {
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) {
      sum[p] += load(g[p]) * load(a[p]) + load(g[gs + p]) * load(a[as + p]) +
                load(g[2 * gs + p]) * load(a[2 * as + p]) + load(g[3 * gs + p]) * load(a[3 * as + p]);
    }
  }
  for (; r < rows; ++r, g += gs, a += as) {
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) sum[p] += load(g[p]) * load(a[p]);
  }
}

// The same with one weight a row.
template <typename T, typename A>
DEBIASKD_INLINE void add_weighted_body(const A* w, const T* a, int64_t as, int64_t rows, A* sum, int64_t n) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4, a += 4 * as) {
    const A w0 = w[r], w1 = w[r + 1], w2 = w[r + 2], w3 = w[r + 3];
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) {
      sum[p] += w0 * load(a[p]) + w1 * load(a[as + p]) + w2 * load(a[2 * as + p]) + w3 * load(a[3 * as + p]);
    }
  }
  for (; r < rows; ++r, a += as) {
    const A weight = w[r];
#pragma omp simd
    for (int64_t p = 0; p < n; ++p) sum[p] += weight * load(a[p]);
  }
}

template <typename A>
DEBIASKD_INLINE void flush_body(A* sum, double* total, int64_t n) {
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) {
    total[p] += sum[p];
    sum[p] = 0;
  }
}

#define DEBIASKD_SUMS(T, A)                                                                                            \
  DEBIASKD_CLONES void dots(const T* g, int64_t gs, const T* a, int64_t as, int64_t rows, int64_t n, A* out) {         \
    dots_body(g, gs, a, as, rows, n, out);                                                                             \
  }                                                                                                                    \
  DEBIASKD_CLONES void add_products(const T* g, int64_t gs, const T* a, int64_t as, int64_t rows, A* sum, int64_t n) { \
    add_products_body(g, gs, a, as, rows, sum, n);                                                                     \
  }                                                                                                                    \
  DEBIASKD_CLONES void add_weighted(const A* w, const T* a, int64_t as, int64_t rows, A* sum, int64_t n) {             \
    add_weighted_body(w, a, as, rows, sum, n);                                                                         \
  }
DEBIASKD_SUMS(float, float)
DEBIASKD_SUMS(double, double)
DEBIASKD_SUMS(BFloat16, float)
DEBIASKD_SUMS(Half, float)

#define DEBIASKD_MIXED(T)                                                                                              \
  DEBIASKD_CLONES void dots(const float* w, int64_t ws, const T* a, int64_t as, int64_t rows, int64_t n, float* out) { \
    dots_body(w, ws, a, as, rows, n, out);                                                                             \
  }
DEBIASKD_MIXED(BFloat16)
DEBIASKD_MIXED(Half)

DEBIASKD_CLONES void flush(float* sum, double* total, int64_t n) { flush_body(sum, total, n); }
DEBIASKD_CLONES void flush(double* sum, double* total, int64_t n) { flush_body(sum, total, n); }

// ---- products ----

template <typename X, typename T, typename A>
DEBIASKD_INLINE void multiply_body(const A* m, const X* x, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(m[i] * load(x[i]), out + i);
}

template <typename X, typename T, typename A>
DEBIASKD_INLINE void multiply_body(A m, const X* x, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(m * load(x[i]), out + i);
}

#define DEBIASKD_PRODUCTS(X, T, A)                                                                          \
  DEBIASKD_CLONES void multiply(const A* m, const X* x, T* out, int64_t n) { multiply_body(m, x, out, n); } \
  DEBIASKD_CLONES void multiply(A m, const X* x, T* out, int64_t n) { multiply_body(m, x, out, n); }
DEBIASKD_PRODUCTS(float, float, float)
DEBIASKD_PRODUCTS(double, double, double)
DEBIASKD_PRODUCTS(BFloat16, BFloat16, float)
DEBIASKD_PRODUCTS(Half, Half, float)
DEBIASKD_PRODUCTS(float, BFloat16, float)
DEBIASKD_PRODUCTS(float, Half, float)

}  // namespace
}  // namespace debiaskd
