// Log-matrix-products: out_ij = log sum_l exp(x_il + y_jl), by rows.
//
// The sum is the matrix product of exp(x - shift) and exp(y - shift), whose entries lie in [0,1], and keeps its
// relative accuracy as long as it is at least kSmallest (common/log_range.h): what it misses by then, being at most
// 2 * length terms too small for a normal number, is less than one rounding. A smaller sum, whose largest terms lie
// where neither x nor y has its largest values, is added up again term by term, shifted by its own maximum.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/log_range.h"
#include "cpu/exp_log.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

constexpr int64_t kTermsAtOnce = 256;  // added up in float before a double takes their sum

// maximum = max(maximum, x), element by element
template <typename A>
DEBIASKD_INLINE void max_into_body(const A* x, A* maximum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) maximum[i] = x[i] > maximum[i] ? x[i] : maximum[i];
}

// max (x + offset)
template <typename A>
DEBIASKD_INLINE A largest_body(const A* x, const A* offset, int64_t n) {
  A largest = std::numeric_limits<A>::lowest();
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) {
    const A value = x[i] + offset[i];
    largest = value > largest ? value : largest;
  }
  return largest;
}

template <typename A>
DEBIASKD_INLINE A smallest_body(const A* x, int64_t n) {
  A smallest = std::numeric_limits<A>::max();
#pragma omp simd reduction(min : smallest)
  for (int64_t i = 0; i < n; ++i) smallest = x[i] < smallest ? x[i] : smallest;
  return smallest;
}

// out = exp(x + offset - shift), at most 1
template <typename A>
DEBIASKD_INLINE void exp_body(const A* x, const A* offset, A shift, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp_bounded((x[i] + offset[i]) - shift);
}

// sum -> log(sum) + offset + shift, in place; meaningless where the sum is below kSmallest
template <typename A>
DEBIASKD_INLINE void log_body(A* sum, const A* offset, A shift, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] = log_positive(sum[i]) + (offset[i] + shift);
}

// out = factor / sum, from the sum's logarithm: 0 where the sum is below kSmallest. Returns how many those were.
template <typename A>
DEBIASKD_INLINE int64_t divide_body(const A* factor, const A* log_sum, const A* offset, A shift, A* out, int64_t n) {
  int32_t far = 0;
#pragma omp simd reduction(+ : far)
  for (int64_t i = 0; i < n; ++i) {
    const A distance = (offset[i] + shift) - log_sum[i];
    const bool beyond = distance > kFarthest<A>;
    far += beyond;
    out[i] = factor[i] * (beyond ? A(0) : exp_bounded(distance));
  }
  return far;
}

// log sum exp(x + y), whatever the range
template <typename A>
DEBIASKD_INLINE A log_sum_body(const A* x, const A* y, int64_t n) {
  const A shift = largest_body(x, y, n);
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kTermsAtOnce) {
    const int64_t end = std::min(begin + kTermsAtOnce, n);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += exp_bounded((x[i] + y[i]) - shift);
    total += sum;
  }
  return static_cast<A>(static_cast<double>(shift) + std::log(total));
}

// sum += factor * exp(x + y - shift), at most |factor| each
template <typename A>
DEBIASKD_INLINE void add_exp_body(const A* x, const A* y, A shift, A factor, A* sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * exp_bounded((x[i] + y[i]) - shift);
}

#define DEBIASKD_LOG_ROWS(A)                                                                                           \
  DEBIASKD_CLONES void max_into(const A* x, A* maximum, int64_t n) { max_into_body(x, maximum, n); }                   \
  DEBIASKD_CLONES A largest(const A* x, const A* offset, int64_t n) { return largest_body(x, offset, n); }             \
  DEBIASKD_CLONES A smallest(const A* x, int64_t n) { return smallest_body(x, n); }                                    \
  DEBIASKD_CLONES void exp_row(const A* x, const A* offset, A shift, A* out, int64_t n) {                              \
    exp_body(x, offset, shift, out, n);                                                                                \
  }                                                                                                                    \
  DEBIASKD_CLONES void log_row(A* sum, const A* offset, A shift, int64_t n) { log_body(sum, offset, shift, n); }       \
  DEBIASKD_CLONES int64_t divide_row(const A* factor, const A* log_sum, const A* offset, A shift, A* out, int64_t n) { \
    return divide_body(factor, log_sum, offset, shift, out, n);                                                        \
  }                                                                                                                    \
  DEBIASKD_CLONES A log_sum_row(const A* x, const A* y, int64_t n) { return log_sum_body(x, y, n); }                   \
  DEBIASKD_CLONES void add_exp_row(const A* x, const A* y, A shift, A factor, A* sum, int64_t n) {                     \
    add_exp_body(x, y, shift, factor, sum, n);                                                                         \
  }
DEBIASKD_LOG_ROWS(float)
DEBIASKD_LOG_ROWS(double)

}  // namespace
}  // namespace debiaskd
