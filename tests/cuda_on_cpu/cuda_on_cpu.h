// What csrc/cuda takes from CUDA, on the CPU: a tool for tests. Including this in place of the CUDA runtime, g++
// compiles the .cu files as they are, so that their logic runs under AddressSanitizer and UndefinedBehaviorSanitizer.
//
// Blocks run one after the other, in an order that is shuffled anew for each launch; how many multiprocessors there are
// to fill is what tests say (cuda_on_cpu_processors). The threads of a block are fibers, which take turns at barriers,
// warp shuffles and votes only: between two of those a thread runs on alone. What a thread reads before a barrier was
// therefore either written long ago or not at all, and since every other block runs its threads in the opposite order,
// a missing barrier gives wrong numbers in one of the two. A barrier that not all threads reach, or a shuffle whose
// mask names a lane that does not take part, is an error. Not shown here: races that need two threads at once, memory
// order, registers, speed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#include "common/stable.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __grid_constant__
#define __noinline__ __attribute__((noinline))
#define DEBIASKD_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::cuda_on_cpu::dynamic_shared())
#define DEBIASKD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(debiaskd_on_cpu, CPU, m)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using dim3 = uint3;

namespace cuda_on_cpu {

extern int64_t processors;

// Runs `thread` for every thread of every block, at most one launch at a time in this process.
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& thread);

void* dynamic_shared();
void must_be_device_memory(const void* address);
void wait_for_block();

// Waits until all lanes of the mask have come here, each with its 8 bytes; returns where those of all 32 lanes lie.
// They stay there until this lane's next exchange.
const uint64_t* exchange(unsigned mask, uint64_t value);

extern uint3 thread_index, block_index, block_size, grid_size;

template <typename T>
T exchanged(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* lanes = exchange(mask, bits);
  // As the hardware: a lane that does not exist, or does not take part, leaves a lane with its own value.
  if (source >= 0 && source < 32 && (mask >> source & 1)) std::memcpy(&value, lanes + source, sizeof value);
  return value;
}

inline int lane() { return static_cast<int>(thread_index.x % 32); }

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::thread_index)
#define blockIdx (::cuda_on_cpu::block_index)
#define blockDim (::cuda_on_cpu::block_size)
#define gridDim (::cuda_on_cpu::grid_size)

inline void __syncthreads() { cuda_on_cpu::wait_for_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::exchange(mask, 0); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_cpu::exchanged(mask, value, cuda_on_cpu::lane() ^ bits);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int steps) {
  return cuda_on_cpu::exchanged(mask, value, cuda_on_cpu::lane() + steps);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int steps) {
  return cuda_on_cpu::exchanged(mask, value, cuda_on_cpu::lane() - steps);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const uint64_t* lanes = cuda_on_cpu::exchange(mask, vote);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= (mask >> lane & 1 && lanes[lane]) ? 1u << lane : 0u;
  return votes;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

// One thread runs at a time, and only barriers interrupt it.
template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}
template <typename T>
T atomicOr(T* address, T value) {
  return std::exchange(*address, *address | value);
}

inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
void __stwb(T* address, T value) {
  cuda_on_cpu::must_be_device_memory(address);
  *address = value;
}

namespace debiaskd {

template <typename... Parameters, typename... Arguments>
void launch_on_cpu(Grid grid, void (*kernel)(Parameters...), const Arguments&... arguments) {
  check_grid(grid);
  cuda_on_cpu::run(grid.blocks, grid.threads, grid.shared, [&] { kernel(arguments...); });
}

class Device {
 public:
  explicit Device(const Tensor&) {}

  int64_t processors() const { return cuda_on_cpu::processors; }

  template <typename... Parameters, typename... Arguments>
  void launch(Grid grid, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    launch_on_cpu(grid, kernel, arguments...);
  }
};

}  // namespace debiaskd
