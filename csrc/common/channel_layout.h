// What the strides of a map [N,C,H,W] say, for the CPU and for the GPU.
#pragma once

#include "common/stable.h"

namespace debiaskd {

// In positions' own order, whether they lie evenly spaced.
inline bool is_one_line(const Tensor& x) {
  return x.size(2) == 1 || x.size(3) == 1 || x.stride(2) == x.stride(3) * x.size(3);
}

// From one position to the next along a line.
inline int64_t position_step(const Tensor& x, bool one_line) {
  return one_line && x.size(3) == 1 ? x.stride(2) : x.stride(3);
}

// Whether a tensor [N,C] stands for the whole map: given so, or [N,C,H,W] expanded from it.
inline bool is_constant(const Tensor& x) { return x.dim() == 2 || (x.stride(2) == 0 && x.stride(3) == 0); }

// Whether every position's channels lie side by side.
inline bool has_adjacent_channels(const Tensor& x) { return x.size(1) > 1 && x.stride(1) == 1; }

}  // namespace debiaskd
