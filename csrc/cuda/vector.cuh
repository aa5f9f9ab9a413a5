// Memory in pieces of 16 bytes, and short vectors of any floating type.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"

namespace debiaskd {

template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
  T value[COUNT];
};

// Elements of a type in the widest access that the hardware has.
template <typename T>
constexpr int kWidest = 16 / sizeof(T);

// `from` and `to` must be aligned to the size of the pack; `to` must lie in device memory, for which the store's
// instruction is. A block's shared memory has store_shared.
template <int COUNT, typename T>
__device__ __forceinline__ Pack<T, COUNT> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, COUNT>*>(from);
}

template <int COUNT, typename T>
__device__ __forceinline__ void store_pack(const Pack<T, COUNT>& pack, T* to) {
  if constexpr (sizeof(pack) == 16) {
    // One instruction by name: as an assignment it sometimes comes out as one for each element.
    __stwb(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4&>(pack));
  } else {
    *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
  }
}

template <int COUNT, typename T>
__device__ __forceinline__ void store_shared(const Pack<T, COUNT>& pack, T* to) {
  *reinterpret_cast<Pack<T, COUNT>*>(to) = pack;
}

// An element to compute with. Two bfloat16 stay in the register that they came in until then; the compiler, left to
// itself, gives each of them one of its own.
template <typename A, int WIDTH, typename X>
__device__ __forceinline__ A element(const Pack<X, WIDTH>& pack, int i) {
  if constexpr (std::is_same_v<X, BFloat16> && WIDTH > 1) {
    unsigned both;
    float value;
    memcpy(&both, pack.value + i / 2 * 2, sizeof both);
    both = i % 2 ? both & 0xffff0000u : both << 16;
    memcpy(&value, &both, sizeof value);
    return value;
  } else {
    return static_cast<A>(pack.value[i]);
  }
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// A tensor [N], or a scalar that counts for every index, of a floating type that is known only when the kernel runs.
struct Numbers {
  const void* data = nullptr;
  int64_t stride = 0;
  ScalarType type = ScalarType::Float;

  Numbers() = default;
  explicit Numbers(const Tensor& tensor)
      : data(tensor.data_ptr()), stride(tensor.dim() ? tensor.stride(0) : 0), type(tensor.scalar_type()) {}

  __device__ double operator[](int64_t i) const {
    switch (type) {
      case ScalarType::Float: return static_cast<const float*>(data)[i * stride];
      case ScalarType::Double: return static_cast<const double*>(data)[i * stride];
      case ScalarType::BFloat16: return static_cast<float>(static_cast<const BFloat16*>(data)[i * stride]);
      default: return static_cast<float>(static_cast<const Half*>(data)[i * stride]);
    }
  }
};

}  // namespace debiaskd
