// Where the rows of a map come from.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "common/bilinear.h"
#include "common/stable.h"
#include "cpu/convert_rows.h"
#include "cpu/half.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

template <typename A>
DEBIASKD_INLINE void blend_body(const A* low, const A* high, A weight, A* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = (A(1) - weight) * low[i] + weight * high[i];
}

#define DEBIASKD_BLEND(A)                                                                    \
  DEBIASKD_CLONES void blend_row(const A* low, const A* high, A weight, A* out, int64_t n) { \
    blend_body(low, high, weight, out, n);                                                   \
  }
DEBIASKD_BLEND(float)
DEBIASKD_BLEND(double)
#undef DEBIASKD_BLEND

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
        row_bytes_(std::max<int64_t>(1, shape.map_width * static_cast<int64_t>(sizeof(T)))),
        rows_ahead_(kAhead / row_bytes_ + 1),
        fetches_(column_step_ == 1 && shape.images * shape.map_height * row_bytes_ >= kCached),
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
    if (!shape_.upsampled()) {
      if (fetches_) fetch(y + rows_ahead_);
      return read(y);
    }
    const Tap tap = bilinear_tap(y, shape_.height, shape_.map_height);
    const A* wide = wide_.data();
    blend_row(wide + tap.low * shape_.width, wide + tap.high * shape_.width, static_cast<A>(tap.weight), row_.data(),
        shape_.width);
    return row_.data();
  }

  // Whether the image holds one value alone, of which blending makes several that differ by rounding.
  bool constant() {
    const A value = read(0)[0];
    for (int64_t r = 0; r < shape_.map_height; ++r) {
      const A* row = read(r);
      for (int64_t x = 0; x < shape_.map_width; ++x) {
        if (row[x] != value) return false;
      }
    }
    return true;
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

  // Towards the second-level cache. A processor fetches ahead by itself, but not beyond a page. Behind the last row
  // mostly lies the next image; where there is no memory at all, nothing happens.
  void fetch(int64_t r) const {
    const uintptr_t row = reinterpret_cast<uintptr_t>(image_) + r * row_step_ * static_cast<int64_t>(sizeof(T));
    for (int64_t byte = 0; byte < row_bytes_; byte += kCacheLine) {
      __builtin_prefetch(reinterpret_cast<const void*>(row + byte), 0, 2);
    }
  }

  static constexpr int64_t kAhead = 16384;  // bytes, about, between what is read and what is fetched meanwhile
  static constexpr int64_t kCacheLine = 64;
  static constexpr int64_t kCached = 32 << 20;  // bytes: a common last-level cache, from which rows arrive in time

  const Shape& shape_;
  const T* data_;
  int64_t image_step_, row_step_, column_step_, row_bytes_, rows_ahead_;
  bool fetches_;
  const T* image_ = nullptr;
  std::vector<A> source_, row_, wide_;
  std::vector<Tap> columns_;
};

}  // namespace
}  // namespace debiaskd
