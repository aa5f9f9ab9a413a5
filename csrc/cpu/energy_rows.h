// The sums and bits of the energy loss, row after row.
//
// As the compiler vectorises them, each row ends in horizontal sums and each word of bits in a horizontal or, which
// together take longer than reading the row. Under AVX2, float32 sums stay in their lanes from row to row, and one
// instruction makes eight bits of eight comparisons.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/localization.h"
#include "cpu/localization_loops.h"
#include "cpu/x86.h"

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

// Sums of positive pixels, all of them and those inside, lane by lane: two vectors of each, since an addition takes
// longer than a pixel takes to arrive. AVX2 uses the first half.
struct alignas(64) EnergyLanes {
  float all[32], inside[32];
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
DEBIASKD_AVX2 inline int64_t add_by_8(
    const float* a, const int32_t* covered, int64_t n, EnergyLanes& lanes, int32_t* words) {
  __m256 all[2], inside[2];
  for (int i = 0; i < 2; ++i) {
    all[i] = _mm256_load_ps(lanes.all + 8 * i);
    inside[i] = _mm256_load_ps(lanes.inside + 8 * i);
  }
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    uint32_t word = 0;
    for (int part = 0; part < 4; ++part) {
      const __m256 pixels = _mm256_loadu_ps(a + i + 8 * part);
      add_pixels(pixels, covered + i + 8 * part, all[part % 2], inside[part % 2]);
      word |= positive_bits(pixels) << (8 * part);
    }
    if (words) words[i / 32] = static_cast<int32_t>(word);
  }
  for (int i = 0; i < 2; ++i) {
    _mm256_store_ps(lanes.all + 8 * i, all[i]);
    _mm256_store_ps(lanes.inside + 8 * i, inside[i]);
  }
  return i;
}

DEBIASKD_AVX512 inline uint32_t add_pixels(__m512 a, const int32_t* covered, __m512& all, __m512& inside) {
  const __m512i counts = _mm512_loadu_si512(covered);
  const __m512 positive =
      _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), a);  // GCC 12 warns of the form without a mask
  all = _mm512_add_ps(all, positive);
  inside = _mm512_mask_add_ps(inside, _mm512_test_epi32_mask(counts, counts), inside, positive);
  return _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ);
}

DEBIASKD_AVX512 inline int64_t add_by_16(
    const float* a, const int32_t* covered, int64_t n, EnergyLanes& lanes, int32_t* words) {
  __m512 all[2], inside[2];
  for (int i = 0; i < 2; ++i) {
    all[i] = _mm512_load_ps(lanes.all + 16 * i);
    inside[i] = _mm512_load_ps(lanes.inside + 16 * i);
  }
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint32_t low = add_pixels(_mm512_loadu_ps(a + i), covered + i, all[0], inside[0]);
    const uint32_t high = add_pixels(_mm512_loadu_ps(a + i + 16), covered + i + 16, all[1], inside[1]);
    if (words) words[i / 32] = static_cast<int32_t>(low | high << 16);
  }
  for (int i = 0; i < 2; ++i) {
    _mm512_store_ps(lanes.all + 16 * i, all[i]);
    _mm512_store_ps(lanes.inside + 16 * i, inside[i]);
  }
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
    const int64_t done = has_avx512() ? add_by_16(a, covered, n, lanes_, words)
                         : has_avx2() ? add_by_8(a, covered, n, lanes_, words)
                                      : 0;
    if (done < n) rest_.add(a + done, covered + done, n - done, words ? words + done / 32 : nullptr);
    pixels_ += done;
    if (pixels_ >= kPixelsInLanes) empty_lanes();
  }

  void empty_lanes() {
    for (int lane = 0; lane < 32; ++lane) {
      all_ += lanes_.all[lane];
      inside_ += lanes_.inside[lane];
    }
    lanes_ = {};
    pixels_ = 0;
  }

  EnergyLanes lanes_{};
  int64_t pixels_ = 0;
  double all_ = 0, inside_ = 0;
  PlainEnergySums<float> rest_;
};

// unpack_row past the caches, for a row that starts where a vector may be stored so. What is left of it comes after.
DEBIASKD_AVX2 inline int64_t unpack_by_8(const int32_t* words, const float* value, float* out, int64_t n) {
  const __m256i lanes = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    for (int part = 0; part < 4; ++part) {
      const uint32_t bits = static_cast<uint32_t>(words[i / 32]) >> (8 * part);
      const __m256i own = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits)), lanes);
      const __m256 mask = _mm256_castsi256_ps(_mm256_cmpeq_epi32(own, lanes));
      _mm256_stream_ps(out + i + 8 * part, _mm256_and_ps(_mm256_loadu_ps(value + i + 8 * part), mask));
    }
  }
  return i;
}

DEBIASKD_AVX512 inline int64_t unpack_by_16(const int32_t* words, const float* value, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const uint32_t word = static_cast<uint32_t>(words[i / 32]);
    _mm512_stream_ps(out + i, _mm512_maskz_loadu_ps(static_cast<__mmask16>(word), value + i));
    _mm512_stream_ps(out + i + 16, _mm512_maskz_loadu_ps(static_cast<__mmask16>(word >> 16), value + i + 16));
  }
  return i;
}

inline void unpack_streamed(const int32_t* words, const float* value, float* out, int64_t n) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(out);
  int64_t done = 0;
  if (has_avx512() && address % 64 == 0) {
    done = unpack_by_16(words, value, out, n);
  } else if (address % 32 == 0) {
    done = unpack_by_8(words, value, out, n);
  }
  unpack_row(words + done / 32, value + done, out + done, n - done);
}

#endif

// unpack_row for a map whose gradient is, or is not, to go past the caches.
template <typename T, typename A>
void unpack(bool stream, const int32_t* words, const A* value, T* out, int64_t n) {
#if defined(DEBIASKD_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    if (stream) return unpack_streamed(words, value, out, n);
  }
#endif
  (void)stream;
  unpack_row(words, value, out, n);
}

}  // namespace
}  // namespace debiaskd
