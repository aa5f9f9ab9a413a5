// Bilinear interpolation along one axis, align_corners=False, as torch.nn.functional.interpolate defines it.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace debiaskd {

struct Tap {
  int64_t low, high;  // the two source cells that an output pixel blends (the same one at the border)
  double weight;      // of `high`; `low` has 1 - weight
};

DEBIASKD_HOST_DEVICE inline Tap bilinear_tap(int64_t output, int64_t output_size, int64_t input_size) {
  const double scale = static_cast<double>(input_size) / static_cast<double>(output_size);
  double source = scale * (static_cast<double>(output) + 0.5) - 0.5;
  if (source < 0) source = 0;
  int64_t low = static_cast<int64_t>(source);
  if (low > input_size - 1) low = input_size - 1;
  const int64_t high = low < input_size - 1 ? low + 1 : low;
  return {low, high, source - static_cast<double>(low)};
}

}  // namespace debiaskd
