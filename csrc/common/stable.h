// What every native source needs of PyTorch, and every work-around for its stable ABI. Built with
// -DTORCH_TARGET_VERSION=0x020a000000000000, one binary serves torch 2.10 and all that come after it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace debiaskd {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The codes of debiaskd/ops/backend.py.
enum Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

// Half precision is summed and reported in float32, everything else in its own precision.
inline ScalarType accumulator_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
struct accumulator {
  using type = float;
};
template <>
struct accumulator<double> {
  using type = double;
};

// Calls function(T{}) with the C++ type of a floating dtype.
template <typename Function>
auto dispatch_floating(ScalarType type, const char* argument, Function&& function) {
  switch (type) {
    case ScalarType::Float: return function(float{});
    case ScalarType::Double: return function(double{});
    case ScalarType::BFloat16: return function(BFloat16{});
    case ScalarType::Half: return function(Half{});
    default: STD_TORCH_CHECK(false, argument, " must be float32, bfloat16, float16 or float64");
  }
}

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

}  // namespace debiaskd
