// The inner loops of the localization losses, each over one row of pixels.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/localization.h"
#include "common/stable.h"
#include "cpu/half.h"
#include "cpu/lanes.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

// ---- inner loops: one row of pixels ----

template <typename A>
struct RowSums {
  A all, inside;
};

template <typename A>
DEBIASKD_INLINE RowSums<A> energy_body(const A* a, const int32_t* covered, int64_t n) {
  A all = 0, inside = 0;
#pragma omp simd reduction(+ : all, inside)
  for (int64_t i = 0; i < n; ++i) {
    const A positive = a[i] < A(0) ? A(0) : a[i];  // this way round a NaN stays one and shows in the loss
    all += positive;
    inside += covered[i] ? positive : A(0);
  }
  return {all, inside};
}

template <typename A>
DEBIASKD_INLINE double l1_body(const A* a, const int32_t* covered, int64_t n) {
  return sum_in_lanes<A>(
      n, [=](int64_t i) __attribute__((always_inline)) { return std::abs(a[i] - static_cast<A>(covered[i])); });
}

template <typename A>
DEBIASKD_INLINE double rrr_body(const A* a, const int32_t* covered, int64_t n) {
  return sum_in_lanes<A>(
      n, [=](int64_t i) __attribute__((always_inline)) { return a[i] * (covered[i] ? A(0) : a[i]); });
}

template <typename A>
DEBIASKD_INLINE double ppce_body(const A* a, const int32_t* covered, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (covered[i]) sum -= std::max(std::log(std::max(a[i], A(0))), A(kLogFloor));
  }
  return sum;
}

// Bits travel in words of 32, the unit in which compilers turn comparisons into bits and back without a shuffle.
template <typename A>
DEBIASKD_INLINE void pack_body(const A* a, int32_t* words, int64_t n) {
  const int64_t whole = n / 32;
  for (int64_t i = 0; i < whole; ++i) {
    int32_t word = 0;
#pragma omp simd reduction(| : word)
    for (int j = 0; j < 32; ++j) word |= a[32 * i + j] > A(0) ? static_cast<int32_t>(1u << j) : 0;
    words[i] = word;
  }
  if (n % 32 == 0) return;
  uint32_t word = 0;
  for (int64_t i = 32 * whole; i < n; ++i) word |= static_cast<uint32_t>(a[i] > A(0)) << (i % 32);
  words[whole] = static_cast<int32_t>(word);
}

template <typename T, typename A>
DEBIASKD_INLINE void unpack_body(const int32_t* words, const A* value, T* out, int64_t n) {
  const int64_t whole = n / 32;
  for (int64_t i = 0; i < whole; ++i) {
    const int32_t word = words[i];
#pragma omp simd
    for (int j = 0; j < 32; ++j) {
      store(word & static_cast<int32_t>(1u << j) ? value[32 * i + j] : A(0), out + 32 * i + j);
    }
  }
  for (int64_t i = 32 * whole; i < n; ++i) {
    store(static_cast<uint32_t>(words[whole]) >> (i % 32) & 1u ? value[i] : A(0), out + i);
  }
}

template <typename A>
DEBIASKD_INLINE void select_body(const int32_t* covered, A inside, A outside, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = covered[i] ? inside : outside;
}

template <typename T, typename A>
DEBIASKD_INLINE void gradient_body(
    int64_t kind, const A* a, const int32_t* covered, A inside, A outside, T* out, int64_t n) {
  // One loop a kind, so that the choice is made once and not for each pixel.
#define DEBIASKD_LOOP(KIND)                           \
  _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) \
      store(pixel_gradient<A>(KIND, a[i], covered[i] != 0, inside, outside), out + i)
  switch (kind) {
    case kEnergy: DEBIASKD_LOOP(kEnergy); break;
    case kL1: DEBIASKD_LOOP(kL1); break;
    case kPpce: DEBIASKD_LOOP(kPpce); break;
    default: DEBIASKD_LOOP(kRrr); break;
  }
#undef DEBIASKD_LOOP
}

template <typename A>
DEBIASKD_INLINE void add_scaled_body(const A* in, A weight, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] += weight * in[i];
}

#define DEBIASKD_ROWS(A)                                                                                          \
  DEBIASKD_CLONES RowSums<A> energy_row(const A* a, const int32_t* c, int64_t n) { return energy_body(a, c, n); } \
  DEBIASKD_CLONES double l1_row(const A* a, const int32_t* c, int64_t n) { return l1_body(a, c, n); }             \
  DEBIASKD_CLONES double rrr_row(const A* a, const int32_t* c, int64_t n) { return rrr_body(a, c, n); }           \
  DEBIASKD_CLONES double ppce_row(const A* a, const int32_t* c, int64_t n) { return ppce_body(a, c, n); }         \
  DEBIASKD_CLONES void pack_row(const A* a, int32_t* words, int64_t n) { pack_body(a, words, n); }                \
  DEBIASKD_CLONES void select_row(const int32_t* c, A inside, A outside, A* out, int64_t n) {                     \
    select_body(c, inside, outside, out, n);                                                                      \
  }                                                                                                               \
  DEBIASKD_CLONES void add_scaled_row(const A* in, A weight, A* out, int64_t n) { add_scaled_body(in, weight, out, n); }
DEBIASKD_ROWS(float)
DEBIASKD_ROWS(double)

#define DEBIASKD_TYPED_ROWS(T, A)                                                            \
  DEBIASKD_CLONES void unpack_row(const int32_t* words, const A* value, T* out, int64_t n) { \
    unpack_body(words, value, out, n);                                                       \
  }                                                                                          \
  DEBIASKD_CLONES void gradient_row(                                                         \
      int64_t kind, const A* a, const int32_t* c, A inside, A outside, T* out, int64_t n) {  \
    gradient_body(kind, a, c, inside, outside, out, n);                                      \
  }
DEBIASKD_TYPED_ROWS(float, float)
DEBIASKD_TYPED_ROWS(double, double)
DEBIASKD_TYPED_ROWS(BFloat16, float)
DEBIASKD_TYPED_ROWS(Half, float)

}  // namespace
}  // namespace debiaskd
