// A small map against a large one, as if it were interpolated to the large one's size.
//
// With R the interpolation along an axis, the small map s becomes U = Rv s Rh^T. It is never made: its product with the
// large map t is that of s with Rv^T t Rh, and its square that of s with Gv s Gh, where G = R^T R has three diagonals.
#pragma once

#include <algorithm>
#include <vector>

#include "common/bilinear.h"
#include "common/stable.h"
#include "cpu/convert_rows.h"
#include "cpu/map_cosine_loops.h"

namespace debiaskd {
namespace {

// One axis: the interpolation R as taps, and G = R^T R as its diagonal and what stands beside it.
template <typename A>
struct ResizedAxis {
  int64_t cells, pixels;
  std::vector<Tap> taps;
  std::vector<A> diagonal, beside;  // `beside` begins with a 0, in front of the first cell

  ResizedAxis(int64_t cells, int64_t pixels) : cells(cells), pixels(pixels), diagonal(cells), beside(cells + 1) {
    std::vector<double> square(cells), next(cells);
    for (int64_t i = 0; i < pixels; ++i) {
      const Tap tap = bilinear_tap(i, pixels, cells);
      taps.push_back(tap);
      if (tap.low == tap.high) {
        square[tap.low] += 1;
        continue;
      }
      square[tap.low] += (1 - tap.weight) * (1 - tap.weight);
      square[tap.high] += tap.weight * tap.weight;
      next[tap.low] += tap.weight * (1 - tap.weight);
    }
    for (int64_t i = 0; i < cells; ++i) {
      diagonal[i] = static_cast<A>(square[i]);
      beside[i + 1] = static_cast<A>(next[i]);
    }
  }
};

template <typename T>
class ResizedMap {
 public:
  using A = typename accumulator<T>::type;

  ResizedMap(int64_t channels, int64_t height, int64_t width, int64_t large_height, int64_t large_width)
      : rows_(height, large_height),
        columns_(width, large_width),
        cells_(height * width),
        small_(channels * cells_),
        projected_(channels * cells_),
        square_(channels * cells_),
        wide_((height + 1) * large_width),
        mixed_(width + 2),
        zeros_(width) {
    for (int64_t c = 0; c < width; ++c) {
      const Span span = Resampling(large_width, width).span(c, c + 1);
      spans_.push_back(span);
      for (int64_t x = span.begin; x < span.end; ++x) {
        const Tap& tap = columns_.taps[x];
        const double share = (tap.low == c ? 1 - tap.weight : 0) + (tap.high == c ? tap.weight : 0);
        shares_.push_back(static_cast<A>(share));
      }
    }
    const A* share = shares_.data();
    for (const Span& span : spans_) {
      narrowed_.push_back({span.begin, span.end - span.begin, share});
      share += span.end - span.begin;
    }
  }

  // Products of the small map (as `student`) and the large one; both [C,H,W].
  MapProducts multiply(const T* small, const T* large) {
    MapProducts total{0, 0, 0};
    const int64_t pixels = rows_.pixels * columns_.pixels, channels = static_cast<int64_t>(small_.size()) / cells_;
    for (int64_t c = 0; c < channels; ++c) {
      A* own = small_.data() + c * cells_;
      convert_row(small + c * cells_, own, cells_);
      total.teacher += project(large + c * pixels, projected_.data() + c * cells_);
      square(own, square_.data() + c * cells_);
    }
    const MapProducts cells = cell_products(small_.data(), projected_.data(), square_.data(), small_.size());
    return {cells.dot, cells.student, total.teacher};
  }

  // by_large * Rv^T t Rh + by_small * Gv s Gh, of the maps of the last `multiply`.
  void small_gradient(A by_large, A by_small, T* out) {
    combine_cells(projected_.data(), by_large, square_.data(), by_small, out, small_.size());
  }

  // by_large * t + by_small * U, the small map being that of the last `multiply`.
  void large_gradient(A by_large, A by_small, const T* large, T* out) {
    const int64_t width = columns_.pixels, channels = static_cast<int64_t>(small_.size()) / cells_;
    for (int64_t c = 0; c < channels; ++c) {
      widen(small_.data() + c * cells_);
      for (int64_t y = 0; y < rows_.pixels; ++y) {
        const Tap& tap = rows_.taps[y];
        const A weight = static_cast<A>(tap.weight);
        const int64_t at = (c * rows_.pixels + y) * width;
        blend_and_combine_row(wide_.data() + tap.low * width, by_small * (A(1) - weight),
            wide_.data() + tap.high * width, by_small * weight, large + at, by_large, out + at, width);
      }
    }
  }

 private:
  // Rv^T t Rh of one channel; returns the sum of t's squares.
  double project(const T* large, A* out) {
    const int64_t width = columns_.pixels;
    A* unused = wide_.data() + rows_.cells * width;
    std::fill(wide_.begin(), wide_.end(), A(0));
    double squares = 0;
    for (int64_t y = 0; y < rows_.pixels; ++y) {
      const Tap& tap = rows_.taps[y];
      const bool alone = tap.low == tap.high;
      squares += spread_row(large + y * width, alone ? A(0) : static_cast<A>(tap.weight),
          wide_.data() + tap.low * width, alone ? unused : wide_.data() + tap.high * width, width);
    }
    for (int64_t r = 0; r < rows_.cells; ++r) {
      narrow_row(wide_.data() + r * width, narrowed_.data(), out + r * columns_.cells, columns_.cells);
    }
    return squares;
  }

  // Gv s Gh of one channel.
  void square(const A* small, A* out) {
    const int64_t width = columns_.cells;
    for (int64_t r = 0; r < rows_.cells; ++r) {
      const A* here = small + r * width;
      const A* before = r > 0 ? here - width : zeros_.data();
      const A* after = r + 1 < rows_.cells ? here + width : zeros_.data();
      A* mixed = mixed_.data() + 1;
      mix_rows(before, rows_.beside[r], here, rows_.diagonal[r], after, rows_.beside[r + 1], mixed, width);
      mix_cells(mixed, columns_.diagonal.data(), columns_.beside.data() + 1, out + r * width, width);
    }
  }

  // s Rh^T of one channel.
  void widen(const A* small) {
    const int64_t width = columns_.pixels;
    for (int64_t r = 0; r < rows_.cells; ++r) {
      const A* in = small + r * columns_.cells;
      A* wide = wide_.data() + r * width;
      for (int64_t x = 0; x < width; ++x) {
        const A weight = static_cast<A>(columns_.taps[x].weight);
        wide[x] = (A(1) - weight) * in[columns_.taps[x].low] + weight * in[columns_.taps[x].high];
      }
    }
  }

  ResizedAxis<A> rows_, columns_;
  int64_t cells_;
  std::vector<A> small_, projected_, square_, wide_, mixed_, zeros_, shares_;
  std::vector<Span> spans_;
  std::vector<Cell<A>> narrowed_;
};

}  // namespace
}  // namespace debiaskd
