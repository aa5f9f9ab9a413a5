// Localization on maps that are interpolated to the boxes' size, forward: no pixel of an upsampled map is ever in
// memory.
//
// A thread walks down one column of the output. It blends the two rows of the map that it is between along x, once, and
// then each of its pixels from those two. The rows of the map that a block needs lie in shared memory, if they fit.
#pragma once

#include "common/bilinear.h"
#include "cuda/localization_tiles.cuh"

namespace debiaskd {
namespace {

struct Scaling {
  Resampling rows, columns;
};

// A Tap as kernels keep it.
template <typename A>
struct Blend {
  int64_t low;
  A weight;

  Blend() = default;
  explicit __device__ Blend(const Tap& tap) : low(tap.low), weight(static_cast<A>(tap.weight)) {}
};

// Part of one map: in shared memory if it is staged there, else where it comes from.
template <typename T>
struct Source {
  using A = typename accumulator<T>::type;

  const T* map;
  int64_t row_step, column_step;
  const A* stage;
  int64_t top, left;
  int rows, columns;
  bool staged;

  __device__ __forceinline__ A at(int64_t row, int64_t column) const {
    if (staged) return stage[static_cast<int>(row - top) * columns + static_cast<int>(column - left)];
    return static_cast<A>(map[row * row_step + column * column_step]);
  }
};

// Rows [top, bottom) and columns [left, right) of a map. To be staged they are read by the whole block, which has to
// wait at a barrier before it makes use of them.
template <typename T, typename A>
__device__ __forceinline__ Source<T> read_source(const Maps<T>& maps, int64_t image, int64_t top, int64_t bottom,
    int64_t left, int64_t right, A* stage, bool staged = true) {
  const Source<T> source = {maps.data + image * maps.image_step, maps.row_step, maps.column_step, stage, top, left,
      static_cast<int>(bottom - top), static_cast<int>(right - left), staged};
  if (!staged) return source;
  const T* from = source.map + top * maps.row_step + left * maps.column_step;
  const int count = source.rows * source.columns;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    stage[i] = static_cast<A>(from[i / source.columns * maps.row_step + i % source.columns * maps.column_step]);
  }
  return source;
}

// One output column on its way down.
template <typename A>
struct Column {
  int64_t low, row = -2;  // between rows `row` and `row` + 1 of the map
  int next;               // columns of the map from `low` to the one that it is blended with
  A weight, above, below;

  explicit __device__ Column(const Tap& tap)
      : low(tap.low), next(static_cast<int>(tap.high - tap.low)), weight(static_cast<A>(tap.weight)) {}

  template <typename T>
  __device__ __forceinline__ A across(const Source<T>& source, int64_t map_row) const {
    return (A(1) - weight) * source.at(map_row, low) + weight * source.at(map_row, low + next);
  }

  template <typename T>
  __device__ __forceinline__ void enter(const Source<T>& source, int64_t map_row, int64_t last_row) {
    above = map_row == row + 1 && row >= 0 ? below : across(source, map_row);
    below = map_row < last_row ? across(source, map_row + 1) : above;
    row = map_row;
  }

  __device__ __forceinline__ A pixel(A row_weight) const { return (A(1) - row_weight) * above + row_weight * below; }
};

// ---- the kernel ----

// Which part of a map a tile is made of, and how its rows are blended.
template <typename A>
struct Window {
  Blend<A> rows[kTileRows];
  int64_t bottom, left, right;

  // By few threads, since not every GPU is quick at float64.
  __device__ __forceinline__ void set(const Scaling& scaling, const Tile& tile) {
    const int thread = threadIdx.x;
    if (thread < tile.rows) {
      const Tap tap = scaling.rows.tap(tile.top + thread);
      rows[thread] = Blend<A>(tap);
      if (thread == tile.rows - 1) bottom = tap.high + 1;
    }
    const int last = blockDim.x - 1;
    if (thread == last - 1) left = scaling.columns.tap(tile.left).low;
    if (thread == last) right = scaling.columns.tap(tile.left + tile.columns - 1).high + 1;
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) upsampled_sum_kernel(
    Maps<T> maps, Scaling scaling, BoxTable table, Tiles tiles, int kind, bool staged, Partial* partial) {
  using A = typename accumulator<T>::type;
  DEBIASKD_DYNAMIC_SHARED(A, stage);
  __shared__ Coverage coverage;
  __shared__ Window<A> window;
  const int thread = threadIdx.x;
  for (int64_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const Tile tile = tiles.tile(index);
    const ImageBoxes boxes = table.of(tile.image);
    if (!boxes.annotated) continue;
    __syncthreads();  // until nobody reads what an earlier tile has left in shared memory any more
    window.set(scaling, tile);
    __syncthreads();
    const Source<T> source =
        read_source(maps, tile.image, window.rows[0].low, window.bottom, window.left, window.right, stage, staged);
    cover(table, boxes, tile, coverage);

    A all = 0, inside = 0;
    if (thread < tile.columns) {
      Column<A> column(scaling.columns.tap(tile.left + thread));
      uint32_t word = coverage.words[thread];
      with_kind<kAny>(kind, [&](auto constant) {
        for (int i = 0; i < tile.rows; ++i, word >>= 1) {
          const Blend<A> blend = window.rows[i];
          if (blend.low != column.row) column.enter(source, blend.low, scaling.rows.input - 1);
          add_pixel<decltype(constant)::value>(column.pixel(blend.weight), word & 1, all, inside);
        }
      });
    }
    write_partial(all, inside, partial + index);
  }
}

}  // namespace
}  // namespace debiaskd
