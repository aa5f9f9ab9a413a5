// Where the elements of a map [N,C,H,W] of any strides lie, and of what stands for one.
#pragma once

#include "common/channel_layout.h"
#include "cpu/half.h"

namespace debiaskd {
namespace {

// A tensor [N,C,H,W] as lines of evenly spaced positions: one line of H·W where that is possible, else H of W.
template <typename T>
struct View {
  const T* data;
  int64_t sample, channel, line, position;  // steps

  const T* at(int64_t n, int64_t c, int64_t l, int64_t p) const {
    return data + n * sample + c * channel + l * line + p * position;
  }
};

struct Shape {
  int64_t samples, channels, lines, length;
};

inline Shape make_shape(const Tensor& feature, bool one_line) {
  const int64_t height = feature.size(2), width = feature.size(3);
  return {feature.size(0), feature.size(1), one_line ? 1 : height, one_line ? height * width : width};
}

template <typename T>
View<T> make_view(const Tensor& x, bool one_line) {
  return {static_cast<const T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2), position_step(x, one_line)};
}

template <typename A>
void gather(const Tensor& x, int64_t n, A* out) {
  const int64_t count = x.size(1), step = x.stride(1);
  dispatch_floating(x.scalar_type(), "gradient", [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(x.data_ptr()) + n * x.stride(0);
    for (int64_t c = 0; c < count; ++c) out[c] = static_cast<A>(load(data[c * step]));
  });
}

template <typename T, typename A>
void gather(const T* in, int64_t step, A* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = load(in[i * step]);
}

}  // namespace
}  // namespace debiaskd
