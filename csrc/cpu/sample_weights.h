// Reading the numbers that come one a sample: weights and upstream gradients.
#pragma once

#include <vector>

#include "common/stable.h"

namespace debiaskd {
namespace {

// The weight of each sample, 1 where there are none.
std::vector<double> read_weights(const std::optional<Tensor>& weight, int64_t samples) {
  std::vector<double> values(samples, 1.0);
  if (!weight) return values;
  const int64_t stride = weight->stride(0);
  dispatch_floating(weight->scalar_type(), "weight", [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(weight->data_ptr());
    for (int64_t i = 0; i < samples; ++i) values[i] = static_cast<double>(data[i * stride]);
  });
  return values;
}

// A vector of numbers, or a single one.
std::vector<double> read_vector(const Tensor& tensor) {
  std::vector<double> values(tensor.numel());
  const int64_t stride = tensor.dim() ? tensor.stride(0) : 1;
  dispatch_floating(tensor.scalar_type(), "grad_output", [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(tensor.data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(data[i * stride]);
  });
  return values;
}

}  // namespace
}  // namespace debiaskd
