// How the CPU kernels get their speed: plain loops that the compiler vectorises, compiled once for each instruction
// set and chosen when the library loads, so that one wheel is fast everywhere.
#pragma once

// Sanitizers cannot instrument the resolver that chooses among the clones: it runs before they are initialised.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(DEBIASKD_SANITIZE)
#define DEBIASKD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DEBIASKD_CLONES
#endif

// A clone compiles what is inlined into it and calls the rest, so that whatever it uses must be inlined by force.
#define DEBIASKD_INLINE inline __attribute__((always_inline))
