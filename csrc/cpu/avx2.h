// Loops written for AVX2 by hand, where a measurement showed what the compiler's own vectors leave behind. Beside each
// of them stands the plain loop that other processors, and other dtypes, run.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define DEBIASKD_AVX2 __attribute__((target("avx2,fma")))
#endif

namespace debiaskd {

inline bool has_avx2() {
#if defined(DEBIASKD_AVX2)
  static const bool able = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return able;
#else
  return false;
#endif
}

// Whether a result of so many bytes is worth storing past the caches. An ordinary store first reads the cache line that
// it overwrites, so that a large result moves twice; a streaming store moves it once, but whoever reads it next finds
// nothing in the cache. Half of 32 MiB, a common last-level cache, is where the first begins to outweigh the second.
inline bool streams(int64_t bytes) { return has_avx2() && bytes >= (16 << 20); }

// How many floats lie before the first address that a streaming store accepts.
inline int64_t floats_to_alignment(const float* out) {
  return static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out) & 31) / sizeof(float));
}

}  // namespace debiaskd
