// Where the rows of a map come from, and where the gradient of an upsampled one goes.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/bilinear.h"
#include "common/stable.h"
#include "cpu/localization_loops.h"

namespace debiaskd {
namespace {

// ---- rows of one image ----

struct Shape {
  int64_t images, map_height, map_width, height, width;
  bool upsampled() const { return map_height != height || map_width != width; }
};

// Gives the rows of one image at the output's size, in the accumulator's type: as they lie in memory where that is
// possible, converted where it is not, blended from the small map where they are upsampled.
template <typename T>
class Rows {
 public:
  using A = typename accumulator<T>::type;

  Rows(const Shape& shape, const Tensor& map)
      : shape_(shape),
        data_(static_cast<const T*>(map.data_ptr())),
        image_step_(map.stride(0)),
        row_step_(map.stride(1)),
        column_step_(map.stride(2)),
        source_(shape.map_width),
        row_(shape.width) {
    if (!shape.upsampled()) return;
    wide_.resize(shape.map_height * shape.width);
    for (int64_t x = 0; x < shape.width; ++x) columns_.push_back(bilinear_tap(x, shape.width, shape.map_width));
  }

  void start(int64_t image) {
    image_ = data_ + image * image_step_;
    if (!shape_.upsampled()) return;
    for (int64_t r = 0; r < shape_.map_height; ++r) {
      const A* source = read(r);
      A* wide = wide_.data() + r * shape_.width;
      for (int64_t x = 0; x < shape_.width; ++x) {
        const A weight = static_cast<A>(columns_[x].weight);
        wide[x] = (A(1) - weight) * source[columns_[x].low] + weight * source[columns_[x].high];
      }
    }
  }

  const A* row(int64_t y) {
    if (!shape_.upsampled()) return read(y);
    const Tap tap = bilinear_tap(y, shape_.height, shape_.map_height);
    const A* wide = wide_.data();
    blend_row(wide + tap.low * shape_.width, wide + tap.high * shape_.width, static_cast<A>(tap.weight), row_.data(),
        shape_.width);
    return row_.data();
  }

 private:
  const A* read(int64_t r) {
    const T* in = image_ + r * row_step_;
    if (column_step_ == 1) {
      if constexpr (std::is_same_v<T, A>) return in;
      convert_row(in, source_.data(), shape_.map_width);
    } else {
      for (int64_t x = 0; x < shape_.map_width; ++x) source_[x] = load(in[x * column_step_]);
    }
    return source_.data();
  }

  const Shape& shape_;
  const T* data_;
  int64_t image_step_, row_step_, column_step_;
  const T* image_ = nullptr;
  std::vector<A> source_, row_, wide_;
  std::vector<Tap> columns_;
};

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
