// Attribution from a gradient and a feature map on the GPU: a dot product over channels at every position, and a map
// times each channel.
//
// Bytes: the dot product reads each input once, and its output is a C-th of them; the product reads its values once,
// where there are values, and writes as many: that over the memory's bandwidth is the floor, and either pass moves no
// more. With a gradient [N,C] the feature alone counts.
//
// Launches: one each. Two for a dot product of so few sums, of so many terms, that a block for each would leave most of
// the device without work: then terms are shared out to several blocks, and a second, small launch adds up what those
// have left. Sums of 64 packs a thread are added up in the accumulator's type, those in double.
//
// Contiguous and channels_last maps are read in place, 16 bytes at a time where samples (contiguous) or rows
// (channels_last) are multiples of 16 bytes and, for odd rows of which several make up a multiple, those fit in a
// block; otherwise one element at a time. Maps in other strides, and a gradient in another order than its feature, are
// copied.

#include "common/channel_layout.h"
#include "cuda/channel_dot_kernels.cuh"

#include <numeric>

namespace debiaskd {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks that leave no multiprocessor without work. What runs on fewer is cut further.
int64_t filling(const Device& device) { return std::max<int64_t>(16, 2 * device.processors()); }

// Whether samples of rows of a length can be read in packs of 16 bytes. `in_block`: a period has to fit in a block,
// where several rows share one.
template <typename T>
bool is_wide(int64_t rows, int64_t length, bool in_block) {
  const int64_t common = std::gcd(length, static_cast<int64_t>(kWidest<T>));
  const bool fits = !in_block || common == kWidest<T> || length / common <= kChannelThreads;
  return rows * length % kWidest<T> == 0 && length >= kWidest<T> && fits;
}

Walk make_walk(const Device& device, int64_t samples, int64_t rows, int64_t length, int64_t width) {
  Walk walk = {samples, rows, length, rows * length / width};
  walk.period = length / std::gcd(length, width), walk.together = walk.period * width / length;
  walk.tiles = ceil_divide(walk.period, kChannelThreads);
  walk.tile = ceil_divide(walk.period, walk.tiles), walk.tiles = ceil_divide(walk.period, walk.tile);
  const int64_t periods = std::max<int64_t>(1, ceil_divide(walk.packs, walk.period));
  walk.groups = std::min({kChannelThreads / walk.tile, periods, int64_t(32)});
  // Not so few periods a block that a second launch takes longer than waiting for it.
  constexpr int64_t kTurns = 16, kMostShares = 128;
  const int64_t wanted = std::min(ceil_divide(filling(device), samples * walk.tiles), kMostShares);
  walk.share = ceil_divide(periods, std::max<int64_t>(1, std::min(wanted, periods / (walk.groups * kTurns))));
  walk.shares = ceil_divide(periods, walk.share);
  return walk;
}

Grid grid_of(const Walk& walk, int64_t shared) {
  const int threads = static_cast<int>(ceil_divide(walk.tile * walk.groups, 32) * 32);
  return {walk.samples * walk.tiles * walk.shares, threads, shared};
}

// [N,H,W,C] of [N,C,H,W]
Tensor with_channels_last(const Tensor& x) { return torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3); }

// Dense and in the order asked for, which for most maps copies nothing.
Tensor dense(const Tensor& x, bool channels_last) {
  return torch::stable::contiguous(channels_last ? with_channels_last(x) : x);
}

// A map [N,H,W] or numbers [N,C], to multiply with.
Tensor as_factors(const Tensor& x, ScalarType type) {
  return torch::stable::contiguous(torch::stable::to(x, accumulator_type(type)));
}

// The numbers [N,C] that a constant stands for.
Tensor numbers_of(const Tensor& x) {
  return x.dim() == 2 ? x : torch::stable::select(torch::stable::select(x, 3, 0), 2, 0);
}

template <typename T>
T* data(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

template <typename T, int WIDTH>
void sum_places(
    const Device& device, Scratch& scratch, PlaceSums<T>& job, int64_t samples, int64_t rows, int64_t length) {
  job.walk = make_walk(device, samples, rows, length, WIDTH);
  const int64_t outs = samples * length;
  if (job.walk.shares > 1) job.partial = scratch.doubles(outs * job.walk.shares);
  const Grid grid = grid_of(job.walk, job.walk.tile * job.walk.groups * WIDTH * sizeof(double));
  device.launch(grid, job.g ? place_sums_kernel<T, WIDTH, false> : place_sums_kernel<T, WIDTH, true>, job);
  if (job.partial) fold(device, job.partial, outs, job.walk.shares, job.out);
}

template <typename T, int WIDTH>
void dot_rows(const Device& device, Scratch& scratch, RowDots<T>& job) {
  constexpr int64_t kBlockPacks = kDotThreads * kChannelUnroll, kMostShares = 1024;
  const int64_t packs = job.length / WIDTH;
  job.team = 1, job.shares = 1;
  while (job.team < 32 && job.team * kChannelUnroll < packs) job.team *= 2;
  if (job.rows < 4 * filling(device) && packs >= kBlockPacks / 4) job.team = kDotThreads;
  if (job.rows < filling(device)) {
    const int64_t wanted = ceil_divide(2 * filling(device), job.rows);
    job.shares = std::max<int64_t>(1, std::min({wanted, packs / kBlockPacks, kMostShares}));
  }
  job.share = ceil_divide(packs, job.shares) * WIDTH;
  job.shares = std::max<int64_t>(1, ceil_divide(job.length, std::max<int64_t>(1, job.share)));
  if (job.shares > 1) job.partial = scratch.doubles(job.rows * job.shares);
  const Grid grid = {ceil_divide(job.rows, kDotThreads / job.team) * job.shares, kDotThreads};
  device.launch(grid, job.g ? row_dots_kernel<T, WIDTH, false> : row_dots_kernel<T, WIDTH, true>, job);
  if (job.partial) fold(device, job.partial, job.rows, job.shares, job.out);
}

Tensor channel_dot(const Tensor& gradient, const Tensor& feature) {
  const ScalarType type = feature.scalar_type();
  const int64_t samples = feature.size(0), channels = feature.size(1), positions = feature.size(2) * feature.size(3);
  Tensor out = new_empty(feature, {samples, feature.size(2), feature.size(3)}, accumulator_type(type));
  if (out.numel() == 0) return out;
  const Device device(feature);
  Scratch scratch(feature);
  const bool constant = is_constant(gradient), last = has_adjacent_channels(feature);
  const Tensor a = dense(feature, last);
  std::optional<Tensor> g, weights;
  if (constant) {
    weights = as_factors(numbers_of(gradient), type);
  } else {
    g = dense(gradient, last);
  }
  dispatch_floating(type, "feature", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    const bool aligned = is_aligned(a.data_ptr()) && is_aligned((g ? *g : *weights).data_ptr());
    if (last) {
      RowDots<T> job = {data<T>(a), data<T>(g), data<A>(weights), samples * positions, positions, channels};
      job.out = data<A>(out);
      // A pack of weights is as many elements, of twice the size beside half precision.
      const bool whole = reinterpret_cast<uintptr_t>(job.weights) % (kWidest<T> * sizeof(A)) == 0;
      const bool wide = aligned && whole && channels % kWidest<T> == 0;
      wide ? dot_rows<T, kWidest<T>>(device, scratch, job) : dot_rows<T, 1>(device, scratch, job);
    } else {
      PlaceSums<T> job = {{}, data<T>(a), data<T>(g), data<A>(weights), data<A>(out)};
      const bool wide = aligned && is_wide<T>(channels, positions, true);
      wide ? sum_places<T, kWidest<T>>(device, scratch, job, samples, channels, positions)
           : sum_places<T, 1>(device, scratch, job, samples, channels, positions);
    }
  });
  return out;
}

template <typename T, int WIDTH>
void scale(const Device& device, Scale<T>& job, int64_t samples, int64_t rows, int64_t length) {
  job.walk = make_walk(device, samples, rows, length, WIDTH);
  device.launch(grid_of(job.walk, 0), job.values ? scale_kernel<T, WIDTH, true> : scale_kernel<T, WIDTH, false>, job);
}

Tensor channel_scale(const Tensor& map, const Tensor& values, bool channels_last, ScalarType type) {
  const int64_t samples = values.size(0), channels = values.size(1), height = map.size(1), width = map.size(2);
  Tensor out = channels_last ? new_empty(values, {samples, height, width, channels}, type)
                             : new_empty(values, {samples, channels, height, width}, type);
  if (out.numel() > 0) {
    const Device device(values);
    const bool constant = is_constant(values), last = channels_last || height * width == 1;  // in longer rows
    const Tensor of_map = as_factors(map, type);
    std::optional<Tensor> dense_values, of_channel;
    if (constant) {
      of_channel = as_factors(numbers_of(values), type);
    } else {
      dense_values = dense(values, channels_last);
    }
    const int64_t rows = last ? height * width : channels, length = last ? channels : height * width;
    dispatch_floating(type, "dtype", [&](auto zero) {
      using T = decltype(zero);
      using A = typename accumulator<T>::type;
      Scale<T> job = {{}, data<T>(dense_values), last ? data<A>(of_channel) : data<A>(of_map),
          last ? data<A>(of_map) : data<A>(of_channel), data<T>(out)};
      const bool wide = is_wide<T>(rows, length, false) && is_aligned(job.out) && is_aligned(job.values);
      wide ? scale<T, kWidest<T>>(device, job, samples, rows, length) : scale<T, 1>(device, job, samples, rows, length);
    });
  }
  return channels_last ? torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3) : out;
}

}  // namespace
}  // namespace debiaskd

DEBIASKD_CUDA_LIBRARY(m) {
  m.impl("channel_dot", TORCH_BOX(&debiaskd::channel_dot));
  m.impl("channel_scale", TORCH_BOX(&debiaskd::channel_scale));
}
