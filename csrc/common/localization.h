// The four localization losses of one map: from the sums over its pixels to the loss, and the loss's derivative.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace debiaskd {

// The codes of debiaskd/ops/localization.py.
enum Kind : int64_t { kEnergy = 0, kL1 = 1, kPpce = 2, kRrr = 3 };

constexpr double kNoEnergy = 1e-7;    // a map whose positive part sums to less is not divided by that sum
constexpr double kLogFloor = -100.0;  // as torch.nn.functional.binary_cross_entropy clamps its logarithm
constexpr double kLogFloorArgument = 3.720075976020836e-44;  // exp(kLogFloor)

// Sums over one map's pixels. `all` means: the positive part (energy), |a - M| (l1), -log a inside (ppce),
// a^2 outside (rrr). `inside`: the positive part inside of the boxes (energy). `area`: pixels inside.
struct MapSums {
  double all = 0, inside = 0, area = 0;
};

// The loss of one map, and two factors that, with the pixel itself, make up its gradient.
struct MapLoss {
  double loss, inside, outside;
};

// What a pixel adds to MapSums::all. `covered` says whether it lies in a box. Written so that a NaN stays one, and
// shows in the loss.
template <typename A>
DEBIASKD_HOST_DEVICE inline A pixel_term(int64_t kind, A pixel, bool covered) {
  const A positive = pixel < A(0) ? A(0) : pixel;
  switch (kind) {
    case kEnergy: return positive;
    case kL1: return std::abs(pixel - A(covered ? 1 : 0));
    case kPpce: {
      if (!covered) return 0;
      const A log = std::log(positive);
      return log < A(kLogFloor) ? A(-kLogFloor) : -log;
    }
    default: return pixel * (covered ? A(0) : pixel);
  }
}

DEBIASKD_HOST_DEVICE inline MapLoss map_loss(int64_t kind, const MapSums& sums, double pixels) {
  switch (kind) {
    case kEnergy:
      if (sums.all < kNoEnergy) return {1 - sums.inside, -1, 0};
      return {1 - sums.inside / sums.all, -(sums.all - sums.inside) / (sums.all * sums.all),
          sums.inside / (sums.all * sums.all)};
    case kL1: return {sums.all / pixels, 1 / pixels, 1 / pixels};
    case kPpce:
      if (sums.area == 0) return {0, 0, 0};
      return {sums.all / sums.area, -1 / sums.area, 0};
    default: return {sums.all, 0, 2};
  }
}

// d loss / d pixel. `inside` and `outside` are the factors of map_loss.
template <typename A>
DEBIASKD_HOST_DEVICE inline A pixel_gradient(int64_t kind, A pixel, bool covered, A inside, A outside) {
  const A factor = covered ? inside : outside;
  switch (kind) {
    case kEnergy: return pixel > A(0) ? factor : A(0);
    case kL1: {
      const A difference = pixel - A(covered ? 1 : 0);
      return difference > A(0) ? factor : difference < A(0) ? -factor : A(0);
    }
    case kPpce: return covered && pixel > A(kLogFloorArgument) ? factor / pixel : A(0);
    default: return factor * pixel;
  }
}

}  // namespace debiaskd
