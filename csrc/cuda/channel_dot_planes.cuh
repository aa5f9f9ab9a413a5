// Tensors [N,C,H,W] as the kernels of channel_dot see them: planes of rows, and numbers that stand for a whole plane.
#pragma once

#include "common/channel_layout.h"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

// One plane a sample or, where positions are not evenly spaced, one a line of positions. Its rows are channels, of
// positions each, or positions, of channels each.
struct Sizes {
  int64_t samples, lines, rows, length;
};

template <typename T>
struct Planes {
  const T* data;
  int64_t sample, line, row, step;  // from one to the next; step: within a row

  __device__ int64_t offset(int64_t n, int64_t l, int64_t r) const { return n * sample + l * line + r * row; }
};

// A tensor [N,C], or maps [N,H,W], of a floating type that is known only when the kernel runs.
struct Factor {
  Numbers numbers;
  int64_t sample, line, step;

  template <typename A>
  __device__ A at(int64_t n, int64_t l, int64_t i) const {
    return static_cast<A>(numbers[n * sample + l * line + i * step]);
  }
};

// Where a block works, from its number: shares of a row, or of all rows, are neighbours in that order.
struct Block {
  unsigned sample, line, part, share;

  __device__ Block(const Sizes& sizes, int64_t parts, int64_t shares) {
    // A grid has fewer than 2^31 blocks, and a 64-bit division is a hundred instructions.
    unsigned rest = blockIdx.x;
    share = rest % static_cast<unsigned>(shares), rest /= static_cast<unsigned>(shares);
    part = rest % static_cast<unsigned>(parts), rest /= static_cast<unsigned>(parts);
    line = rest % static_cast<unsigned>(sizes.lines), sample = rest / static_cast<unsigned>(sizes.lines);
  }
};

template <typename N>
__device__ __forceinline__ N smaller(N a, N b) {
  return a < b ? a : b;
}

// ---- on the host ----

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads of a block that has work for so many.
inline int threads_for(int64_t useful, int64_t most) {
  return static_cast<int>(std::min(most, ceil_divide(useful, 32) * 32));
}

// Blocks that leave no multiprocessor without work. What runs on fewer is cut further.
inline int64_t filling(const Device& device) { return std::max<int64_t>(16, 2 * device.processors()); }

inline Factor make_factor(const Tensor& x, int64_t sample, int64_t line, int64_t step) {
  Factor factor = {Numbers(), sample, line, step};
  factor.numbers.data = x.data_ptr();
  factor.numbers.stride = 1;
  factor.numbers.type = x.scalar_type();
  return factor;
}

inline Sizes make_sizes(const Tensor& x, bool one_line, bool channel_rows) {
  const int64_t lines = one_line ? 1 : x.size(2), positions = x.size(2) * x.size(3) / lines;
  return channel_rows ? Sizes{x.size(0), lines, x.size(1), positions} : Sizes{x.size(0), lines, positions, x.size(1)};
}

template <typename T>
Planes<T> make_planes(const Tensor& x, const Sizes& sizes, bool one_line, bool channel_rows) {
  const int64_t position = position_step(x, one_line), channel = x.stride(1);
  const auto steps = [](int64_t size, int64_t step) { return size > 1 ? step : 0; };
  return {static_cast<const T*>(x.data_ptr()), steps(sizes.samples, x.stride(0)), steps(sizes.lines, x.stride(2)),
      steps(sizes.rows, channel_rows ? channel : position), channel_rows ? position : channel};
}

// Samples whose rows all follow each other evenly are one plane, wherever nothing else depends on the sample.
template <typename T, typename... Others>
void merge_samples(Sizes& sizes, Planes<T>& planes, Others&... others) {
  const auto follow = [&](const Planes<T>& p) { return sizes.rows == 1 || p.sample == sizes.rows * p.row; };
  if (sizes.samples == 1 || sizes.lines > 1 || !(follow(planes) && (follow(others) && ...))) return;
  const auto merge = [&](Planes<T>& p) { p.row = sizes.rows == 1 ? p.sample : p.row, p.sample = 0; };
  merge(planes), (merge(others), ...);
  sizes.rows *= sizes.samples, sizes.samples = 1;
}

// Whether pieces of 16 bytes that hold any element of a row hold nothing but the tensor's own memory.
template <typename T>
bool is_wide(const Tensor& x, const Planes<T>& planes) {
  int64_t end = 1;
  for (int64_t i = 0; i < x.dim(); ++i) end += (x.size(i) - 1) * x.stride(i);
  return planes.step == 1 && is_aligned(planes.data) && end % kWidest<T> == 0;
}

// Elements of the piece of 16 bytes where some row begins that lie before the row: so many at most.
template <typename T>
int64_t most_shift(const Planes<T>& planes) {
  const auto fits = [](int64_t step) { return step % kWidest<T> == 0; };
  return fits(planes.sample) && fits(planes.line) && fits(planes.row) ? 0 : kWidest<T> - 1;
}

// Whether the shifts are the same in both.
template <typename T>
bool shift_alike(const Planes<T>& a, const Planes<T>& b) {
  const auto alike = [](int64_t one, int64_t other) { return (one - other) % kWidest<T> == 0; };
  return alike(a.sample, b.sample) && alike(a.line, b.line) && alike(a.row, b.row);
}

}  // namespace
}  // namespace debiaskd
