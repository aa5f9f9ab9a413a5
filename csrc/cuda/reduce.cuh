// Sums over the threads of a warp and of a block. The order of additions depends on nothing but the number of threads.
#pragma once

#include "cuda/launch.cuh"

namespace debiaskd {

constexpr unsigned kFullWarp = 0xffffffffu;

// Every lane gets the sum. All 32 lanes of the warp must take part.
template <typename A>
__device__ __forceinline__ A warp_sum(A value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

template <typename A>
__device__ __forceinline__ A larger(A a, A b) {
  return a > b ? a : b;
}

// Every lane gets the largest. All 32 lanes of the warp must take part.
template <typename A>
__device__ __forceinline__ A warp_max(A value) {
  for (int step = 16; step > 0; step /= 2) value = larger(value, __shfl_xor_sync(kFullWarp, value, step));
  return value;
}

// Every thread gets the sum. All threads of the block must take part: a multiple of 32, 1024 at most.
template <typename A>
__device__ __forceinline__ A block_sum(A value) {
  __shared__ A warps[32];
  const int lane = threadIdx.x % 32, count = blockDim.x / 32;
  value = warp_sum(value);
  __syncthreads();  // until nobody reads an earlier sum's numbers any more
  if (lane == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < count ? warps[lane] : A(0));
}

// Every thread gets the largest. All threads of the block must take part, as in block_sum.
template <typename A>
__device__ __forceinline__ A block_max(A value) {
  __shared__ A warps[32];
  value = warp_max(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_max(warps[threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0]);
}

// Sums the team of TEAM threads that a thread belongs to: its warp, or its block.
template <int TEAM, typename A>
__device__ __forceinline__ A team_sum(A value) {
  static_assert(TEAM == 32 || TEAM % 32 == 0, "a warp or a whole block");
  if constexpr (TEAM == 32) return warp_sum(value);
  return block_sum(value);
}

// out[row] = the sum of partial[row * count .. (row + 1) * count), one block a row.
template <typename Out>
__global__ void fold_kernel(const double* partial, int64_t count, Out* out) {
  const double* row = partial + blockIdx.x * count;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += row[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Out>(sum);
}

template <typename Out>
void fold(const Device& device, const double* partial, int64_t rows, int64_t count, Out* out) {
  const int threads = count > 4096 ? 1024 : count > 128 ? 256 : 32;
  device.launch(Grid{rows, threads}, fold_kernel<Out>, partial, count, out);
}

// The last of a launch's blocks to come here adds up `count` numbers that all blocks have left. `finished` must be 0
// before the launch; all threads of every block must take part.
template <typename Out>
__device__ void fold_in_last_block(const double* partial, int64_t count, unsigned* finished, Out* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = static_cast<Out>(sum);
}

}  // namespace debiaskd
