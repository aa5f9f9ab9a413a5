// Localization losses on the CPU: forward reads the map once, backward writes its gradient once.
//
// Bytes: energy on a map of the output's own size reads it in forward and leaves one bit a pixel (is it positive?) and
// two numbers a map; backward reads those and writes the gradient. The other kinds read the map again in backward. An
// upsampled map is never stored: each output row is blended from two rows of the small map, widened once; backward
// computes it again and gathers its gradient into the small map, row by row, in an order that is always the same.
// Images run in parallel, one thread each.

#include <algorithm>

#include "common/localization.h"
#include "common/stable.h"
#include "cpu/box_table.h"
#include "cpu/coverage.h"
#include "cpu/energy_rows.h"
#include "cpu/localization_loops.h"
#include "cpu/localization_rows.h"

namespace debiaskd {
namespace {

// ---- one image ----

// Each row's bits begin with a word of their own.
int64_t words_per_row(int64_t width) { return (width + 31) / 32; }

// Sums of the rows of one image, and their bits where `bits` is given.
template <typename T>
MapSums sum_image(int64_t kind, const Shape& shape, Rows<T>& rows, Coverage& coverage, int32_t* bits) {
  MapSums sums;
  EnergySums<typename accumulator<T>::type> energy;
  int64_t area = 0;  // of the covered pixels of a row
  for (int64_t y = 0; y < shape.height; ++y) {
    if (coverage.enter(y).any() && kind == kPpce) area = coverage.area();
    const auto* row = rows.row(y);
    const int32_t* covered = coverage.covered();
    switch (kind) {
      case kEnergy:
        energy.add(row, covered, shape.width, bits ? bits + y * words_per_row(shape.width) : nullptr);
        break;
      case kL1: sums.all += l1_row(row, covered, shape.width); break;
      case kPpce:
        sums.area += area;
        if (area) sums.all += ppce_row(row, covered, shape.width);
        break;
      default: sums.all += rrr_row(row, covered, shape.width); break;
    }
  }
  if (kind == kEnergy) energy.finish(sums);
  return sums;
}

// ---- the ops ----

std::tuple<Tensor, Tensor, Tensor> localization(const Tensor& attribution, const Tensor& coords, const Tensor& offsets,
    const Tensor& annotated, const std::optional<Tensor>& mask, int64_t kind, int64_t height, int64_t width,
    int64_t reduction, bool with_state) {
  const Shape shape{attribution.size(0), attribution.size(1), attribution.size(2), height, width};
  const BoxTable boxes(coords, offsets, annotated, mask);
  const bool with_bits = with_state && kind == kEnergy && !shape.upsampled();
  const ScalarType type = accumulator_type(attribution.scalar_type());
  std::vector<int64_t> loss_shape;
  if (reduction == kNone) loss_shape.push_back(shape.images);
  Tensor loss = new_empty(attribution, loss_shape, type);
  Tensor coefficients = new_empty(attribution, {with_state ? shape.images : 0, 2}, type);
  const int64_t image_words = height * words_per_row(width);
  Tensor positive = with_bits ? new_empty(attribution, {shape.images, height, words_per_row(width)}, ScalarType::Int)
                              : new_empty(attribution, {0}, ScalarType::Int);
  const int64_t counted = boxes.annotated_images();
  const double factor = reduction == kMean && counted ? 1.0 / static_cast<double>(counted) : 1.0;

  dispatch_floating(attribution.scalar_type(), "attribution", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    A* out = static_cast<A*>(loss.data_ptr());
    A* state = with_state ? static_cast<A*>(coefficients.data_ptr()) : nullptr;
    int32_t* bits = with_bits ? static_cast<int32_t*>(positive.data_ptr()) : nullptr;
    std::vector<double> losses(shape.images, 0.0);
    torch::stable::parallel_for(0, shape.images, 1, [&](int64_t begin, int64_t end) {
      Rows<T> rows(shape, attribution);
      Coverage coverage(height, width);
      for (int64_t i = begin; i < end; ++i) {
        MapLoss result{0, 0, 0};
        if (boxes.annotated(i)) {
          rows.start(i);
          boxes.start(coverage, i);
          const MapSums sums = sum_image<T>(kind, shape, rows, coverage, bits ? bits + i * image_words : nullptr);
          result = map_loss(kind, sums, static_cast<double>(height * width));
        } else if (bits) {
          std::fill_n(
              bits + i * image_words, image_words, 0);  // nobody reads them, but an output is never left unwritten
        }
        losses[i] = result.loss * factor;
        if (state) {
          state[2 * i] = static_cast<A>(result.inside * factor);
          state[2 * i + 1] = static_cast<A>(result.outside * factor);
        }
      }
    });
    double sum = 0.0;
    for (int64_t i = 0; i < shape.images; ++i) {
      if (reduction == kNone) out[i] = static_cast<A>(losses[i]);
      sum += losses[i];
    }
    if (reduction != kNone) out[0] = static_cast<A>(sum);
  });
  return {loss, coefficients, positive};
}

// The gradient of one image: from its bits, or from its rows, or gathered from its upsampled rows.
template <typename T, typename A>
void image_gradient(int64_t kind, const Shape& shape, Rows<T>* rows, const int32_t* bits, Downward<T>* downward,
    Coverage& coverage, A inside, A outside, std::vector<A>& scratch, T* out) {
  const bool stream = streams(shape.images * shape.height * shape.width * static_cast<int64_t>(sizeof(T)));
  if (downward) downward->start();
  for (int64_t y = 0; y < shape.height; ++y) {
    const Columns changed = y == 0 ? (coverage.enter(y), Columns{0, shape.width}) : coverage.enter(y);
    const int32_t* covered = coverage.covered();
    if (bits) {
      if (changed.any()) {
        select_row(
            covered + changed.begin, inside, outside, scratch.data() + changed.begin, changed.end - changed.begin);
      }
      unpack(stream, bits + y * words_per_row(shape.width), scratch.data(), out + y * shape.width, shape.width);
    } else if (downward) {
      gradient_row(kind, rows->row(y), covered, inside, outside, scratch.data(), shape.width);
      downward->add(y, scratch.data());
    } else {
      gradient_row(kind, rows->row(y), covered, inside, outside, out + y * shape.width, shape.width);
    }
  }
  if (downward) downward->finish(out);
}

Tensor localization_backward(const Tensor& grad_output, const std::optional<Tensor>& attribution, const Tensor& coords,
    const Tensor& offsets, const Tensor& annotated, const std::optional<Tensor>& mask, const Tensor& coefficients,
    const Tensor& positive, int64_t kind, int64_t height, int64_t width, int64_t map_height, int64_t map_width,
    ScalarType dtype) {
  const BoxTable boxes(coords, offsets, annotated, mask);
  const Shape shape{boxes.images(), map_height, map_width, height, width};
  const int64_t image_words = height * words_per_row(width), map_pixels = map_height * map_width;
  const bool from_bits = positive.numel() > 0;
  Tensor gradient = new_empty(coefficients, {shape.images, map_height, map_width}, dtype);
  const Tensor upstream = torch::stable::contiguous(grad_output);

  dispatch_floating(dtype, "attribution", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    const A* state = static_cast<const A*>(coefficients.data_ptr());
    const A* incoming = static_cast<const A*>(upstream.data_ptr());
    const int32_t* bits = from_bits ? static_cast<const int32_t*>(positive.data_ptr()) : nullptr;
    T* out = static_cast<T*>(gradient.data_ptr());
    torch::stable::parallel_for(0, shape.images, 1, [&](int64_t begin, int64_t end) {
      std::optional<Rows<T>> rows;
      std::optional<Downward<T>> downward;
      if (!from_bits && attribution) rows.emplace(shape, *attribution);
      if (shape.upsampled()) downward.emplace(shape);
      Coverage coverage(height, width);
      std::vector<A> scratch(width);
      for (int64_t i = begin; i < end; ++i) {
        T* image = out + i * map_pixels;
        if (!boxes.annotated(i)) {
          std::fill(image, image + map_pixels, T(0));
          continue;
        }
        const A scale = incoming[upstream.dim() ? i : 0];
        if (rows) rows->start(i);
        boxes.start(coverage, i);
        image_gradient<T, A>(kind, shape, rows ? &*rows : nullptr, bits ? bits + i * image_words : nullptr,
            downward ? &*downward : nullptr, coverage, state[2 * i] * scale, state[2 * i + 1] * scale, scratch, image);
      }
    });
  });
  return gradient;
}

}  // namespace
}  // namespace debiaskd

STABLE_TORCH_LIBRARY_IMPL(debiaskd, CPU, m) {
  m.impl("localization", TORCH_BOX(&debiaskd::localization));
  m.impl("localization_backward", TORCH_BOX(&debiaskd::localization_backward));
}
