// Attribution from a gradient and a feature map on the GPU: a dot product over channels at every position, and a map
// times each channel.
//
// Bytes: the dot product reads each input once, and its output is a C-th of them; the product reads its values once,
// where there are values, and writes as many: that over the memory's bandwidth is the floor, and either pass moves no
// more. With a gradient [N,C] the feature alone counts.
//
// Launches: one each. Two for a dot product of so few sums, of so many terms, that a block for each would leave most of
// the device without work: then terms are shared out to several blocks, and a second, small launch adds up what those
// have left. Sums of 64 terms or so are added up in the accumulator's type, those in double.
//
// Where channels lie side by side (channels_last) a position is a row of channels, summed up along; otherwise channels
// are rows of positions, summed up one above the other. Inputs whose rows do not lie in the same way, at a multiple of
// 16 bytes, are read in place with the same kernels, one element an access. Nothing is ever copied.

#include "cuda/channel_dot_along.cuh"
#include "cuda/channel_dot_rows.cuh"
#include "cuda/channel_dot_scale.cuh"

namespace debiaskd {
namespace {

// The parts that both ways to sum have in common. Returns whether accesses can be of 16 bytes.
template <typename Job>
bool describe(const Tensor& gradient, const Tensor& feature, bool channel_rows, Tensor& out, Job& job) {
  using T = std::remove_const_t<std::remove_pointer_t<decltype(job.a.data)>>;
  const bool constant = is_constant(gradient);
  const bool one_line = is_one_line(feature) && (constant || is_one_line(gradient));
  job.out = static_cast<decltype(job.out)>(out.data_ptr());
  job.sizes = make_sizes(feature, one_line, channel_rows);
  job.a = make_planes<T>(feature, job.sizes, one_line, channel_rows);
  if (constant) {
    job.weight = make_factor(gradient, gradient.stride(0), 0, gradient.stride(1));
    return is_wide(feature, job.a);
  }
  job.g = make_planes<T>(gradient, job.sizes, one_line, channel_rows);
  return is_wide(feature, job.a) && is_wide(gradient, job.g) && shift_alike(job.a, job.g);
}

Tensor channel_dot(const Tensor& gradient, const Tensor& feature) {
  const ScalarType type = feature.scalar_type();
  Tensor out = new_empty(feature, {feature.size(0), feature.size(2), feature.size(3)}, accumulator_type(type));
  if (out.numel() == 0) return out;
  const Device device(feature);
  Scratch scratch(feature);
  const bool constant = is_constant(gradient);
  dispatch_floating(type, "feature", [&](auto zero) {
    using T = decltype(zero);
    if (has_adjacent_channels(feature) && (constant || has_adjacent_channels(gradient))) {
      AlongSums<T> job = {};
      const bool wide = describe(gradient, feature, false, out, job);
      return wide ? sum_along<T, kWidest<T>>(device, scratch, constant, job)
                  : sum_along<T, 1>(device, scratch, constant, job);
    }
    RowSums<T> job = {};
    const bool wide = describe(gradient, feature, true, out, job);
    wide ? sum_rows<T, kWidest<T>>(device, scratch, constant, job) : sum_rows<T, 1>(device, scratch, constant, job);
  });
  return out;
}

// Rows are channels or positions; the output lies so.
template <typename T>
Scale<T> describe(const Tensor& map, const Tensor& values, bool position_rows, Tensor& out) {
  const bool constant = is_constant(values), one_line = constant || is_one_line(values);
  const int64_t channels = values.size(1), width = map.size(2), positions = map.size(1) * width;
  const int64_t lines = one_line ? 1 : map.size(1), length = positions / lines;
  Scale<T> job = {};
  job.out = static_cast<T*>(out.data_ptr());
  job.sizes = {map.size(0), lines, position_rows ? length : channels, position_rows ? channels : length};
  if (!constant) job.values = make_planes<T>(values, job.sizes, one_line, !position_rows);
  job.out_sample = channels * positions;
  job.out_line = position_rows ? length * channels : length;
  job.out_row = position_rows ? channels : positions;
  job.period = job.sizes.length;
  job.alike = 1;
  const Factor of_map = make_factor(map, positions, length, 1);
  const Factor of_channel = make_factor(values, values.stride(0), 0, values.stride(1));
  job.place = position_rows ? of_channel : of_map;
  job.row = position_rows ? of_map : of_channel;
  return job;
}

Tensor channel_scale(const Tensor& map, const Tensor& values, bool channels_last, ScalarType type) {
  const int64_t samples = values.size(0), channels = values.size(1), height = map.size(1), width = map.size(2);
  Tensor out = channels_last ? new_empty(values, {samples, height, width, channels}, type)
                             : new_empty(values, {samples, channels, height, width}, type);
  if (out.numel() > 0) {
    const Device device(values);
    dispatch_floating(type, "dtype", [&](auto zero) {
      using T = decltype(zero);
      const bool position_rows = channels_last || height * width == 1;  // the same memory, in longer rows
      Scale<T> job = describe<T>(map, values, position_rows, out);
      if (is_constant(values)) {
        scale<T, Product::kFactors>(device, job);
      } else if (position_rows) {
        scale<T, Product::kValuesByRow>(device, job);
      } else {
        scale<T, Product::kValuesByPlace>(device, job);
      }
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
