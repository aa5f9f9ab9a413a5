// Mathematics that the CPU and the GPU share is written once, inline, for both compilers.
#pragma once

#if defined(__CUDACC__)
#define DEBIASKD_HOST_DEVICE __host__ __device__
#else
#define DEBIASKD_HOST_DEVICE
#endif
