// The sums and bits of the energy loss, row after row.
//
// As the compiler vectorises them, each row ends in horizontal sums and each word of bits in a horizontal or, which
// together take longer than reading the row. Under AVX2, float32 sums stay in their lanes from row to row, and one
// instruction makes eight bits of eight comparisons.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/localization.h"
#include "cpu/avx2.h"
#include "cpu/localization_loops.h"

namespace debiaskd {
namespace {

template <typename A>
class PlainEnergySums {
 public:
  // One more row; its bits go to `words` where that is given.
  void add(const A* a, const int32_t* covered, int64_t n, int32_t* words) {
    const auto sum = energy_row(a, covered, n);
    all_ += sum.all;
    inside_ += sum.inside;
    if (words) pack_row(a, words, n);
  }

  void finish(MapSums& sums) {
    sums.all = all_;
    sums.inside = inside_;
  }

 private:
  double all_ = 0, inside_ = 0;
};

template <typename A>
class EnergySums : public PlainEnergySums<A> {};

#if defined(DEBIASKD_AVX2)

// Sums of positive pixels, all of them and those inside, lane by lane; two of each, since an addition takes longer than
// a pixel takes to arrive.
struct EnergyLanes {
  __m256 all[2], inside[2];
};

DEBIASKD_AVX2 inline void add_pixels(__m256 a, const int32_t* covered, __m256& all, __m256& inside) {
  const __m256i counts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(covered));
  const __m256 mask = _mm256_castsi256_ps(_mm256_cmpgt_epi32(counts, _mm256_setzero_si256()));
  const __m256 positive = _mm256_max_ps(_mm256_setzero_ps(), a);  // of 0 and NaN, NaN: it shows in the loss
  all = _mm256_add_ps(all, positive);
  inside = _mm256_add_ps(inside, _mm256_and_ps(positive, mask));
}

DEBIASKD_AVX2 inline uint32_t positive_bits(__m256 a) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, _mm256_setzero_ps(), _CMP_GT_OQ)));
}

// Takes whole words of 32 pixels; returns how many pixels that was.
DEBIASKD_AVX2 inline int64_t add_lanes(
    const float* a, const int32_t* covered, int64_t n, EnergyLanes& lanes, int32_t* words) {
  EnergyLanes sums = lanes;
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    uint32_t word = 0;
    for (int part = 0; part < 4; ++part) {
      const __m256 pixels = _mm256_loadu_ps(a + i + 8 * part);
      add_pixels(pixels, covered + i + 8 * part, sums.all[part % 2], sums.inside[part % 2]);
      word |= positive_bits(pixels) << (8 * part);
    }
    if (words) words[i / 32] = static_cast<int32_t>(word);
  }
  lanes = sums;
  return i;
}

template <>
class EnergySums<float> {
 public:
  void add(const float* a, const int32_t* covered, int64_t n, int32_t* words) {
    for (int64_t i = 0; i < n; i += kPixelsInLanes) {
      add_stretch(a + i, covered + i, std::min(kPixelsInLanes, n - i), words ? words + i / 32 : nullptr);
    }
  }

  void finish(MapSums& sums) {
    empty_lanes();
    MapSums rest;
    rest_.finish(rest);
    sums.all = all_ + rest.all;
    sums.inside = inside_ + rest.inside;
  }

 private:
  // So many pixels (whole words) go into the lanes before a double takes their sums: few enough that float32 rounds no
  // more than the plain loop does.
  static constexpr int64_t kPixelsInLanes = 2048;

  void add_stretch(const float* a, const int32_t* covered, int64_t n, int32_t* words) {
    const int64_t done = has_avx2() ? add_lanes(a, covered, n, lanes_, words) : 0;
    if (done < n) rest_.add(a + done, covered + done, n - done, words ? words + done / 32 : nullptr);
    pixels_ += done;
    if (pixels_ >= kPixelsInLanes) empty_lanes();
  }

  void empty_lanes() {
    float all[16], inside[16];
    std::memcpy(all, lanes_.all, sizeof all);
    std::memcpy(inside, lanes_.inside, sizeof inside);
    for (int lane = 0; lane < 16; ++lane) {
      all_ += all[lane];
      inside_ += inside[lane];
    }
    lanes_ = {};
    pixels_ = 0;
  }

  EnergyLanes lanes_{};
  int64_t pixels_ = 0;
  double all_ = 0, inside_ = 0;
  PlainEnergySums<float> rest_;
};

#endif

}  // namespace
}  // namespace debiaskd
