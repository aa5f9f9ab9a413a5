// The inner loops of box_overlap, each over one row of pixels. `judged` and `covered` are 0 or 1 for each column.
//
// Sums and extremes are those of integers alone, which compilers keep in vectors by themselves: positive numbers rise
// as their bits do.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

template <typename A>
using Bits = typename std::conditional<sizeof(A) == 8, int64_t, int32_t>::type;

template <typename To, typename From>
DEBIASKD_INLINE To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Of the positive part of a map's judged pixels, as bits. Starts as that of none.
template <typename A>
struct Range {
  Bits<A> smallest = std::numeric_limits<Bits<A>>::max(), largest = 0;
  bool has_nan = false;

  bool finite() const { return !has_nan && largest < same_bits<Bits<A>>(std::numeric_limits<A>::infinity()); }
};

template <typename A>
DEBIASKD_INLINE void range_body(const A* a, const int32_t* judged, int64_t n, Range<A>& range) {
  constexpr Bits<A> most = std::numeric_limits<Bits<A>>::max();
  Bits<A> smallest = range.smallest, largest = range.largest, nan = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Bits<A> in = -static_cast<Bits<A>>(judged[i]);
    const Bits<A> positive = std::max<Bits<A>>(same_bits<Bits<A>>(a[i]), 0) & in;
    smallest = std::min<Bits<A>>(smallest, positive | (~in & most));
    largest = std::max<Bits<A>>(largest, positive);
    nan |= a[i] != a[i] ? in : 0;
  }
  range = {smallest, largest, range.has_nan || nan != 0};
}

struct RowCounts {
  int64_t above, both;
};

// Pixels above the limit: those that are judged, and those in a box.
template <typename A>
DEBIASKD_INLINE RowCounts count_body(const A* a, const int32_t* judged, const int32_t* covered, A limit, int64_t n) {
  int32_t above = 0, both = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t exceeds = -static_cast<int32_t>(a[i] > limit);
    above += exceeds & judged[i];
    both += exceeds & covered[i];
  }
  return {above, both};
}

#define DEBIASKD_OVERLAP_ROWS(A)                                                                                       \
  DEBIASKD_CLONES void range_row(const A* a, const int32_t* judged, int64_t n, Range<A>& range) {                      \
    range_body(a, judged, n, range);                                                                                   \
  }                                                                                                                    \
  DEBIASKD_CLONES RowCounts count_row(const A* a, const int32_t* judged, const int32_t* covered, A limit, int64_t n) { \
    return count_body(a, judged, covered, limit, n);                                                                   \
  }
DEBIASKD_OVERLAP_ROWS(float)
DEBIASKD_OVERLAP_ROWS(double)
#undef DEBIASKD_OVERLAP_ROWS

// All pixels that are not ignored, or that lie in a box.
DEBIASKD_CLONES void judge_row(const int32_t* covered, const int32_t* ignored, int32_t* judged, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) judged[i] = covered[i] | (1 - ignored[i]);
}

// The largest number that normalising does not bring above the threshold: what a pixel must exceed. Rounding included,
// normalising never turns the order of two pixels around, so that a search finds it.
template <typename A>
A limit_of(const Range<A>& range, A threshold) {
  if (range.largest <= range.smallest) return 0;  // all of a map of one positive value, nothing of a map without
  const A smallest = same_bits<A>(range.smallest), spread = same_bits<A>(range.largest) - smallest;
  Bits<A> low = range.smallest, high = range.largest;
  while (low < high) {
    const Bits<A> middle = high - (high - low) / 2;
    if ((same_bits<A>(middle) - smallest) / spread <= threshold) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return same_bits<A>(low);
}

}  // namespace
}  // namespace debiaskd
