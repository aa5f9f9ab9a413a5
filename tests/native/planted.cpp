// Kernels with planted bugs, and the same ones without, for the tests of the tool itself.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cuda/reduce.cuh"

namespace {

using debiaskd::block_sum;
using debiaskd::kFullWarp;
using debiaskd::warp_sum;

__global__ void sum_kernel(const float* in, int count, float* out) {
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += in[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// block_sum without its barriers. Blocks have other sums each, so that none is right by what one before has left.
__global__ void racing_sum_kernel(const float* in, int count, float* out) {
  __shared__ float warps[32];
  float sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += in[i] * (blockIdx.x + 1);
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  sum = warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

__global__ void write_kernel(float* out, int first) { out[first + static_cast<int>(threadIdx.x)] = 1; }

__global__ void write_shared_kernel(float* out, int first) {
  __shared__ float memory[32];
  memory[first + static_cast<int>(threadIdx.x)] = 1;
  out[threadIdx.x] = memory[threadIdx.x];
}

__global__ void misaligned_kernel(float* out, int first) {
  struct alignas(16) Four {
    float value[4];
  };
  *reinterpret_cast<Four*>(out + first) = Four{};
}

__global__ void wrong_memory_kernel(float* out, int shared) {
  __shared__ uint4 memory;
  if (threadIdx.x == 0) __stwb(shared ? &memory : reinterpret_cast<uint4*>(out), uint4{});
}

__global__ void half_barrier_kernel(float* out, int) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void half_shuffle_kernel(float* out, int) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
}

__global__ void vote_kernel(unsigned* out) {
  const unsigned odd = __ballot_sync(kFullWarp, threadIdx.x % 2 == 1);
  const int below = __shfl_up_sync(kFullWarp, static_cast<int>(threadIdx.x), 1);
  const int above = __shfl_down_sync(kFullWarp, static_cast<int>(threadIdx.x), 1);
  out[threadIdx.x] = (odd & ~0xffu) | static_cast<unsigned>(above - below);
}

__global__ void empty_kernel() {}

__global__ void order_kernel(int* out, int* count) { out[(*count)++] = static_cast<int>(blockIdx.x); }

template <typename Kernel>
std::vector<float> sums(Kernel kernel, const std::vector<float>& values, int blocks, int threads) {
  std::vector<float> out(blocks, -1);
  cuda_on_cpu::run(blocks, threads, 0, [&] { kernel(values.data(), static_cast<int>(values.size()), out.data()); });
  return out;
}

template <typename Kernel>
std::vector<float> writes(Kernel kernel, int first) {
  std::vector<float> out(32, 0);
  cuda_on_cpu::run(1, 32, 0, [&] { kernel(out.data(), first); });
  return out;
}

}  // namespace

PYBIND11_MODULE(planted, m) {
  m.def("sums", [](const std::vector<float>& v, int b, int t) { return sums(sum_kernel, v, b, t); });
  m.def("racing_sums", [](const std::vector<float>& v, int b, int t) { return sums(racing_sum_kernel, v, b, t); });
  m.def("empty", [](int64_t blocks, int threads, int64_t shared) {
    debiaskd::launch_on_cpu({blocks, threads, shared}, empty_kernel);
  });
  m.def("order", [](int blocks) {
    std::vector<int> out(blocks);
    int count = 0;
    cuda_on_cpu::run(blocks, 1, 0, [&] { order_kernel(out.data(), &count); });
    return out;
  });
  m.def("write", [](int first) { return writes(write_kernel, first); });
  m.def("write_shared", [](int first) { return writes(write_shared_kernel, first); });
  m.def("misaligned", [](int first) { return writes(misaligned_kernel, first); });
  m.def("wrong_memory", [](int shared) { return writes(wrong_memory_kernel, shared); });
  m.def("half_barrier", [] { return writes(half_barrier_kernel, 0); });
  m.def("half_shuffle", [] { return writes(half_shuffle_kernel, 0); });
  m.def("vote", [] {
    std::vector<unsigned> out(32);
    cuda_on_cpu::run(1, 32, 0, [&] { vote_kernel(out.data()); });
    return out;
  });
}
