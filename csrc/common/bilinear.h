// Bilinear interpolation along one axis, align_corners=False, as torch.nn.functional.interpolate defines it.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace debiaskd {

struct Tap {
  int64_t low, high;  // the two source cells that an output pixel blends (the same one at the border)
  double weight;      // of `high`; `low` has 1 - weight
};

struct Span {
  int64_t begin, end;
};

// One axis of a map: `input` source cells make `output` pixels.
struct Resampling {
  int64_t input, output;
  double scale, step;  // source cells from one pixel to the next, and pixels from one source cell to the next

  DEBIASKD_HOST_DEVICE Resampling(int64_t output_size, int64_t input_size)
      : input(input_size),
        output(output_size),
        scale(static_cast<double>(input_size) / static_cast<double>(output_size)),
        step(static_cast<double>(output_size) / static_cast<double>(input_size)) {}

  DEBIASKD_HOST_DEVICE Tap tap(int64_t pixel) const {
    double source = scale * (static_cast<double>(pixel) + 0.5) - 0.5;
    if (source < 0) source = 0;
    int64_t low = static_cast<int64_t>(source);
    if (low > input - 1) low = input - 1;
    const int64_t high = low < input - 1 ? low + 1 : low;
    return {low, high, source - static_cast<double>(low)};
  }

  // Pixels among which are all that blend one of the cells [first, last): no more than two too many at either end.
  DEBIASKD_HOST_DEVICE Span reach(int64_t first, int64_t last) const {
    const double begin = (static_cast<double>(first) - 0.5) * step - 1.5;
    const double end = (static_cast<double>(last) + 0.5) * step + 1.5;
    Span span = {begin > 0 ? static_cast<int64_t>(begin) : 0, static_cast<int64_t>(end)};
    if (span.end > output) span.end = output;
    return span;
  }

  // From the first to the last of those pixels; with a scale of 1 or less these are all between.
  DEBIASKD_HOST_DEVICE Span span(int64_t first, int64_t last) const {
    Span exact = reach(first, last);
    while (exact.begin < exact.end && tap(exact.begin).high < first) ++exact.begin;
    while (exact.begin < exact.end && tap(exact.end - 1).low >= last) --exact.end;
    return exact;
  }
};

DEBIASKD_HOST_DEVICE inline Tap bilinear_tap(int64_t output, int64_t output_size, int64_t input_size) {
  return Resampling(output_size, input_size).tap(output);
}

}  // namespace debiaskd
