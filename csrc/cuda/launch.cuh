// Everything between an op and the device: its stream, its size, the launch of a kernel.
//
// The same .cu files also run on the CPU, under sanitizers, where tests/cuda_on_cpu stands in for what this header
// takes from CUDA.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "common/stable.h"

namespace debiaskd {

struct Grid {
  int64_t blocks;
  int threads;
  int64_t shared = 0;  // bytes of dynamic shared memory
};

// Kernels have up to 16 KiB of static shared memory, as a test of the machine code makes sure. Every supported GPU
// gives a block 99 KiB in all; more than 48 KiB has to be asked for.
constexpr int64_t kStaticShared = 16 * 1024, kUnaskedShared = 48 * 1024 - kStaticShared;
constexpr int64_t kMostShared = 99 * 1024 - kStaticShared;

inline void check_grid(const Grid& grid) {
  STD_TORCH_CHECK(grid.blocks >= 0 && grid.blocks <= INT32_MAX, "a grid has up to 2^31 - 1 blocks, got ", grid.blocks);
  STD_TORCH_CHECK(grid.threads > 0 && grid.threads <= 1024 && grid.threads % 32 == 0,
      "a block has whole warps of up to 1024 threads, got ", grid.threads);
  STD_TORCH_CHECK(grid.shared <= kMostShared, "a block has up to ", kMostShared,
      " bytes of dynamic shared memory, got ", grid.shared);
}

}  // namespace debiaskd

#if defined(__CUDACC__)

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define DEBIASKD_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(debiaskd, CUDA, m)
// Memory of a block whose size the launch says.
#define DEBIASKD_DYNAMIC_SHARED(type, name)               \
  extern __shared__ __align__(16) unsigned char memory[]; \
  type* name = reinterpret_cast<type*>(memory)

namespace debiaskd {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// PyTorch's current stream. The function lives in libtorch_cuda, which a build against PyTorch for the CPU cannot link:
// it is looked up in the library that the process has loaded.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "this PyTorch has no CUDA streams: libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// The device and the current stream of a tensor, for as long as this object lives.
class Device {
 public:
  explicit Device(const Tensor& tensor)
      : index_(tensor.get_device_index()), guard_(index_), stream_(current_stream(index_)) {}

  // Multiprocessors, asked for once a device: the driver takes its time to answer.
  int64_t processors() const {
    constexpr int kDevices = 64;
    static std::atomic<int> counts[kDevices];
    if (index_ < kDevices && counts[index_].load()) return counts[index_].load();
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_), "cudaDeviceGetAttribute");
    if (index_ < kDevices) counts[index_] = count;
    return count;
  }

  template <typename... Parameters, typename... Arguments>
  void launch(Grid grid, void (*kernel)(Parameters...), const Arguments&... arguments) const {
    check_grid(grid);
    if (grid.blocks == 0) return;
    if (grid.shared > kUnaskedShared) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared)),
          "cudaFuncSetAttribute");
    }
    kernel<<<static_cast<unsigned>(grid.blocks), grid.threads, grid.shared, stream_>>>(arguments...);
    check(cudaGetLastError(), "kernel launch");
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace debiaskd

#else
#include "cuda_on_cpu.h"
#endif

namespace debiaskd {

// Blocks for `work` independent pieces, `per_block` of them in each, when every block goes on to further pieces: enough
// to fill the device several times over, so that none waits long for the last.
inline int64_t grid_blocks(const Device& device, int64_t work, int64_t per_block) {
  constexpr int64_t kBlocksPerProcessor = 32;
  return std::min((work + per_block - 1) / per_block, kBlocksPerProcessor * device.processors());
}

// Memory for the launches of one call. That it is given back before they have run is the caching allocator's business:
// what it hands out next on the same stream is used after them.
class Scratch {
 public:
  explicit Scratch(const Tensor& like) : like_(like) {}

  double* doubles(int64_t count) {
    kept_.push_back(new_empty(like_, {count}, ScalarType::Double));
    return static_cast<double*>(kept_.back().data_ptr());
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> kept_;
};

}  // namespace debiaskd
