// Where the localization kernels take their pixels from: a map of the boxes' own size, the bits that the forward pass
// left of one, or a smaller map that is interpolated as it is read. No pixel of an upsampled map is ever in memory.
//
// A source is an argument of a launch. Its Reader belongs to one thread and one tile: read(first) asks for kRows rows
// of the thread's columns, and pixel(i, j) is column j of the i-th of them. Readers are constructed, and first asked to
// read, before the block looks at boxes: memory is on its way meanwhile.
#pragma once

#include "common/bilinear.h"
#include "cuda/localization_tiles.cuh"

namespace debiaskd {
namespace {

// ---- maps of the boxes' own size ----

template <typename T, int WIDTH>
struct OwnPixels {
  using A = typename accumulator<T>::type;
  static constexpr int kWidth = WIDTH, kBlocks = kMapBlocks<T>;

  Maps<T> maps;

  struct Reader {
    // Enough rows that memory is kept busy, few enough for the registers.
    static constexpr int kRows = WIDTH == 1 ? 8 : 16 / WIDTH;

    const T* from;
    int64_t step;
    Pack<T, WIDTH> held[kRows];

    __device__ __forceinline__ Reader(
        const OwnPixels& source, const Tiles&, const MapTile& tile, const Place<WIDTH>& place)
        : from(source.maps.at(tile.image, tile.top + place.row, tile.left + place.column)),
          step(place.stride * source.maps.row_step) {}

    __device__ __forceinline__ void read(const MapTile& tile, const Place<WIDTH>& place, int first) {
#pragma unroll
      for (int i = 0; i < kRows; ++i, from += step) {
        held[i] = {};
        if (place.has(tile, first + i)) held[i] = load_pack<WIDTH>(from);
      }
    }
    __device__ __forceinline__ A pixel(int i, int j) const { return element<A>(held[i], j); }
  };
};

// The words that hold a bit for each pixel of a row: is it more than 0? A thread's pixels are in one of them.
template <typename Word, int WIDTH>
__device__ __forceinline__ Word* words_at(
    Word* positive, const Tiles& tiles, const MapTile& tile, const Place<WIDTH>& place) {
  return positive + (tile.image * tiles.height + tile.top + place.row) * words_per_row(tiles.width) +
         (tile.left + place.column) / 32;
}

// 1 where a pixel was positive, else 0.
template <typename T, int WIDTH>
struct PositiveBits {
  using A = typename accumulator<T>::type;
  static constexpr int kWidth = WIDTH;

  const int32_t* positive;

  struct Reader {
    static constexpr int kRows = WIDTH <= 4 ? 8 : 4;

    const int32_t* from;
    int64_t step;
    int shift;
    uint32_t bits[kRows];

    __device__ __forceinline__ Reader(
        const PositiveBits& source, const Tiles& tiles, const MapTile& tile, const Place<WIDTH>& place)
        : from(words_at(source.positive, tiles, tile, place)),
          step(place.stride * words_per_row(tiles.width)),
          shift(place.column % 32) {}

    __device__ __forceinline__ void read(const MapTile& tile, const Place<WIDTH>& place, int first) {
#pragma unroll
      for (int i = 0; i < kRows; ++i, from += step) bits[i] = place.has(tile, first + i) ? *from : 0;
    }
    __device__ __forceinline__ A pixel(int i, int j) const { return static_cast<A>(bits[i] >> (shift + j) & 1); }
  };
};

// ---- interpolated maps ----

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
struct MapPart {
  using A = typename accumulator<T>::type;

  const T* map;
  int64_t row_step, column_step;
  const A* stage;
  int64_t top, left;
  int columns;
  bool staged;

  // Rows [top, bottom) and columns [left, right). To be staged they are read by the whole block, which has to wait at a
  // barrier before it makes use of them.
  __device__ __forceinline__ MapPart(const Maps<T>& maps, int64_t image, int64_t top_in, int64_t bottom,
      int64_t left_in, int64_t right, A* to, bool staged_in)
      : map(maps.at(image, 0, 0)),
        row_step(maps.row_step),
        column_step(maps.column_step),
        stage(to),
        top(top_in),
        left(left_in),
        columns(static_cast<int>(right - left_in)),
        staged(staged_in) {
    if (!staged) return;
    const T* from = map + top * row_step + left * column_step;
    const int count = static_cast<int>(bottom - top) * columns;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      to[i] = static_cast<A>(from[i / columns * row_step + i % columns * column_step]);
    }
  }

  __device__ __forceinline__ A at(int64_t row, int64_t column) const {
    if (staged) return stage[static_cast<int>(row - top) * columns + static_cast<int>(column - left)];
    return static_cast<A>(map[row * row_step + column * column_step]);
  }
};

// One output column on its way down: the two rows of the map that it is between, blended along x once.
template <typename A>
struct Column {
  int64_t low, row = -2;  // between rows `row` and `row` + 1 of the map
  int next;               // columns of the map from `low` to the one that it is blended with
  A weight, above, below;

  explicit __device__ Column(const Tap& tap)
      : low(tap.low), next(static_cast<int>(tap.high - tap.low)), weight(static_cast<A>(tap.weight)) {}

  template <typename T>
  __device__ __forceinline__ A across(const MapPart<T>& part, int64_t map_row) const {
    return (A(1) - weight) * part.at(map_row, low) + weight * part.at(map_row, low + next);
  }
  template <typename T>
  __device__ __forceinline__ void enter(const MapPart<T>& part, int64_t map_row, int64_t last_row) {
    above = map_row == row + 1 && row >= 0 ? below : across(part, map_row);
    below = map_row < last_row ? across(part, map_row + 1) : above;
    row = map_row;
  }
  __device__ __forceinline__ A pixel(A row_weight) const { return (A(1) - row_weight) * above + row_weight * below; }
};

// Which part of a map a tile is made of, and how its rows are blended.
template <typename A>
struct Window {
  Blend<A> rows[kTileRows];
  int64_t bottom, left, right;

  // By few threads, since not every GPU is quick at float64.
  __device__ __forceinline__ void set(const Scaling& scaling, const MapTile& tile) {
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

// A block has a thread for each column of the widest tile, so that a thread's rows follow each other there.
template <typename T>
struct BlendedPixels {
  using A = typename accumulator<T>::type;
  static constexpr int kWidth = 1, kBlocks = kMapBlocks<T> > 1 ? 4 : 1;

  Maps<T> maps;
  Scaling scaling;
  bool staged;

  struct Reader {
    static constexpr int kRows = 1;

    const Blend<A>* rows;
    int64_t last_row;
    int row;
    MapPart<T> part;
    Column<A> column;

    __device__ __forceinline__ Reader(
        const BlendedPixels& source, const Tiles&, const MapTile& tile, const Place<1>& place)
        : last_row(source.scaling.rows.input - 1),
          part(stage(source, tile)),
          column(source.scaling.columns.tap(tile.left + at_most(place.column, tile.columns - 1))) {
      rows = window().rows;
    }

    static __device__ __forceinline__ Window<A>& window() {
      __shared__ Window<A> shared;
      return shared;
    }
    static __device__ __forceinline__ MapPart<T> stage(const BlendedPixels& source, const MapTile& tile) {
      DEBIASKD_DYNAMIC_SHARED(A, to);
      Window<A>& part = window();
      __syncthreads();  // until nobody reads what an earlier tile has left in shared memory any more
      part.set(source.scaling, tile);
      __syncthreads();
      return {source.maps, tile.image, part.rows[0].low, part.bottom, part.left, part.right, to, source.staged};
    }

    __device__ __forceinline__ void read(const MapTile&, const Place<1>& place, int first) {
      row = place.row_of(first);
    }
    __device__ __forceinline__ A pixel(int, int) {
      const Blend<A> blend = rows[row];
      if (blend.low != column.row) column.enter(part, blend.low, last_row);
      return column.pixel(blend.weight);
    }
  };
};

}  // namespace
}  // namespace debiaskd
