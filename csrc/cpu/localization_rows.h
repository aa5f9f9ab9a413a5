// Where the gradient of an upsampled map goes.
#pragma once

#include <algorithm>
#include <vector>

#include "common/bilinear.h"
#include "common/stable.h"
#include "cpu/localization_loops.h"
#include "cpu/map_rows.h"

namespace debiaskd {
namespace {

// Takes the gradient of each output row of an upsampled image and gathers it into the small map.
template <typename T>
class Downward {
 public:
  using A = typename accumulator<T>::type;

  explicit Downward(const Shape& shape)
      : shape_(shape), wide_(shape.map_height * shape.width), narrow_(shape.map_width) {
    for (int64_t x = 0; x < shape.width; ++x) columns_.push_back(bilinear_tap(x, shape.width, shape.map_width));
  }

  void start() { std::fill(wide_.begin(), wide_.end(), A(0)); }

  void add(int64_t y, const A* gradient) {
    const Tap tap = bilinear_tap(y, shape_.height, shape_.map_height);
    const A weight = static_cast<A>(tap.weight);
    add_scaled_row(gradient, A(1) - weight, wide_.data() + tap.low * shape_.width, shape_.width);
    add_scaled_row(gradient, weight, wide_.data() + tap.high * shape_.width, shape_.width);
  }

  void finish(T* out) {
    for (int64_t r = 0; r < shape_.map_height; ++r) {
      std::fill(narrow_.begin(), narrow_.end(), A(0));
      const A* wide = wide_.data() + r * shape_.width;
      for (int64_t x = 0; x < shape_.width; ++x) {
        const A weight = static_cast<A>(columns_[x].weight);
        narrow_[columns_[x].low] += (A(1) - weight) * wide[x];
        narrow_[columns_[x].high] += weight * wide[x];
      }
      for (int64_t x = 0; x < shape_.map_width; ++x) store(narrow_[x], out + r * shape_.map_width + x);
    }
  }

 private:
  const Shape& shape_;
  std::vector<A> wide_, narrow_;
  std::vector<Tap> columns_;
};

}  // namespace
}  // namespace debiaskd
