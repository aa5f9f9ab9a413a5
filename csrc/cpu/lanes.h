// Sums of many terms in lanes written out, so that they are as accurate where the compiler makes no vectors of them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

// Each lane adds up a few elements before a double takes its sum, so that the whole rounds no more than PyTorch's own.
constexpr int64_t kLanes = 16;
constexpr int64_t kRun = kLanes * 16;

// Adds up term(i) for i in [0, n).
template <typename A, typename Term>
DEBIASKD_INLINE double sum_in_lanes(int64_t n, Term&& term) {
  double total = 0;
  int64_t i = 0;
  while (i + kLanes <= n) {
    A lanes[kLanes] = {};
    for (const int64_t end = std::min(n - kLanes + 1, i + kRun); i < end; i += kLanes) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  }
  for (; i < n; ++i) total += term(i);
  return total;
}

}  // namespace
}  // namespace debiaskd
