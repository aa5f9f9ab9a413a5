// Loops written for AVX2 and AVX-512 by hand, where a measurement showed what the compiler's own vectors leave behind.
// Beside each of them stands the plain loop that other processors, and other dtypes, run.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define DEBIASKD_AVX2 __attribute__((target("avx2,fma")))
#define DEBIASKD_AVX512 __attribute__((target("avx512f,avx2,fma")))
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

inline bool has_avx512() {
#if defined(DEBIASKD_AVX512)
  static const bool able = has_avx2() && __builtin_cpu_supports("avx512f");
  return able;
#else
  return false;
#endif
}

// Whether a result of so many bytes is worth storing past the caches. An ordinary store first reads the cache line that
// it overwrites, so that a large result moves twice, and drives out what is read beside it; a streaming store moves it
// once, but whoever reads it next finds nothing in the cache. A result and what it is made from, twice its size at
// least, leave little else in 32 MiB, a common last-level cache, from a quarter of that on.
inline bool streams(int64_t bytes) { return has_avx2() && bytes >= (8 << 20); }

// How many floats lie before the first address that a streaming store accepts.
inline int64_t floats_to_alignment(const float* out) {
  return static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out) & 31) / sizeof(float));
}

}  // namespace debiaskd
