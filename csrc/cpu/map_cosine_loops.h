// The inner loops of the map cosine loss: over rows of pixels, and over the cells of a small map.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/stable.h"
#include "cpu/half.h"
#include "cpu/lanes.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

// Of two maps of one size, or of a map and what the other one comes to in its cells.
struct MapProducts {
  double dot, student, teacher;
};

// One pass for all three products.
template <typename T, typename A>
DEBIASKD_INLINE MapProducts products_body(const T* s, const T* t, int64_t n) {
  MapProducts total{0, 0, 0};
  int64_t i = 0;
  while (i + kLanes <= n) {
    A dot[kLanes] = {}, student[kLanes] = {}, teacher[kLanes] = {};
    for (const int64_t end = std::min(n - kLanes + 1, i + kRun); i < end; i += kLanes) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const A x = load(s[i + lane]), y = load(t[i + lane]);
        dot[lane] += x * y;
        student[lane] += x * x;
        teacher[lane] += y * y;
      }
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      total.dot += dot[lane];
      total.student += student[lane];
      total.teacher += teacher[lane];
    }
  }
  for (; i < n; ++i) {
    const A x = load(s[i]), y = load(t[i]);
    total.dot += x * y;
    total.student += x * x;
    total.teacher += y * y;
  }
  return total;
}

// Adds a row of a large map to the two rows of cells that it lies between; returns the sum of its squares.
template <typename T, typename A>
DEBIASKD_INLINE double spread_body(const T* in, A weight, A* low, A* high, int64_t n) {
  return sum_in_lanes<A>(n, [=](int64_t i) __attribute__((always_inline)) {
    const A value = load(in[i]);
    low[i] += (A(1) - weight) * value;
    high[i] += weight * value;
    return value * value;
  });
}

// The pixels of a row that blend one of its cells, and the share that each of them has of it.
template <typename A>
struct Cell {
  int64_t begin, count;
  const A* share;
};

template <typename A>
DEBIASKD_INLINE void narrow_body(const A* wide, const Cell<A>* cells, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const A *pixels = wide + cells[i].begin, *share = cells[i].share;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t x = 0; x < cells[i].count; ++x) sum += share[x] * pixels[x];
    out[i] = sum;
  }
}

// out = before * a + here * b + after * c: a product with a symmetric matrix that has three diagonals, row by row.
template <typename A>
DEBIASKD_INLINE void mix_rows_body(const A* before, A a, const A* here, A b, const A* after, A c, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = a * before[i] + b * here[i] + c * after[i];
}

// The same within a row, whose ends have a cell of zeros beside them.
template <typename A>
DEBIASKD_INLINE void mix_cells_body(const A* in, const A* diagonal, const A* beside, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = beside[i - 1] * in[i - 1] + diagonal[i] * in[i] + beside[i] * in[i + 1];
}

template <typename X, typename T, typename A>
DEBIASKD_INLINE void combine_body(const X* x, A a, const X* y, A b, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(a * load(x[i]) + b * load(y[i]), out + i);
}

template <typename T, typename A>
DEBIASKD_INLINE void blend_and_combine_body(
    const A* low, A low_weight, const A* high, A high_weight, const T* y, A b, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(low_weight * low[i] + high_weight * high[i] + b * load(y[i]), out + i);
}

#define DEBIASKD_ROWS(A)                                                                                               \
  DEBIASKD_CLONES MapProducts cell_products(const A* x, const A* other, const A* own, int64_t n) {                     \
    const double dot = sum_in_lanes<A>(n, [=](int64_t i) __attribute__((always_inline)) { return x[i] * other[i]; });  \
    const double square = sum_in_lanes<A>(n, [=](int64_t i) __attribute__((always_inline)) { return x[i] * own[i]; }); \
    return {dot, square, 0};                                                                                           \
  }                                                                                                                    \
  DEBIASKD_CLONES void narrow_row(const A* wide, const Cell<A>* cells, A* out, int64_t n) {                            \
    narrow_body(wide, cells, out, n);                                                                                  \
  }                                                                                                                    \
  DEBIASKD_CLONES void mix_rows(const A* x, A a, const A* y, A b, const A* z, A c, A* out, int64_t n) {                \
    mix_rows_body(x, a, y, b, z, c, out, n);                                                                           \
  }                                                                                                                    \
  DEBIASKD_CLONES void mix_cells(const A* in, const A* diagonal, const A* beside, A* out, int64_t n) {                 \
    mix_cells_body(in, diagonal, beside, out, n);                                                                      \
  }
DEBIASKD_ROWS(float)
DEBIASKD_ROWS(double)
#undef DEBIASKD_ROWS

#define DEBIASKD_ROWS(T, A)                                                                           \
  DEBIASKD_CLONES MapProducts products_row(const T* s, const T* t, int64_t n, A) {                    \
    return products_body<T, A>(s, t, n);                                                              \
  }                                                                                                   \
  DEBIASKD_CLONES double spread_row(const T* in, A weight, A* low, A* high, int64_t n) {              \
    return spread_body<T, A>(in, weight, low, high, n);                                               \
  }                                                                                                   \
  DEBIASKD_CLONES void combine_row(const T* x, A a, const T* y, A b, T* out, int64_t n) {             \
    combine_body<T, T, A>(x, a, y, b, out, n);                                                        \
  }                                                                                                   \
  DEBIASKD_CLONES void combine_cells(const A* x, A a, const A* y, A b, T* out, int64_t n) {           \
    combine_body<A, T, A>(x, a, y, b, out, n);                                                        \
  }                                                                                                   \
  DEBIASKD_CLONES void blend_and_combine_row(                                                         \
      const A* low, A low_weight, const A* high, A high_weight, const T* y, A b, T* out, int64_t n) { \
    blend_and_combine_body<T, A>(low, low_weight, high, high_weight, y, b, out, n);                   \
  }
DEBIASKD_ROWS(float, float)
DEBIASKD_ROWS(double, double)
DEBIASKD_ROWS(BFloat16, float)
DEBIASKD_ROWS(Half, float)
#undef DEBIASKD_ROWS

}  // namespace
}  // namespace debiaskd
