// Localization on maps that are interpolated to the boxes' size, backward.
//
// A block owns cells of the map. It walks over all pixels of the output that these feed and computes them again; each
// thread adds up those of its column, by row of the map, and then what the columns give to a cell is added up: always
// in the same order.
#pragma once

#include "cuda/localization_pixels.cuh"

namespace debiaskd {
namespace {

constexpr int kMostCellRows = 16;

// How the cells of maps are dealt out: up to `rows` x `columns` to a block, `columns` being 1 where more of the
// output's columns feed it than a block has threads.
struct Cells {
  int64_t images;
  int row_groups, column_groups, rows, columns;

  DEBIASKD_HOST_DEVICE int parts() const { return row_groups * column_groups; }
  DEBIASKD_HOST_DEVICE int64_t count() const { return images * parts(); }
};

// The cells of one block.
struct Owned {
  int64_t image, first_row, first_column;
  int rows, columns;

  __device__ Owned(const Cells& cells, const Scaling& scaling, int64_t index) {
    image = index / cells.parts();
    const int part = static_cast<int>(index - image * cells.parts());
    first_row = static_cast<int64_t>(part / cells.column_groups) * cells.rows;
    first_column = static_cast<int64_t>(part % cells.column_groups) * cells.columns;
    rows = at_most(scaling.rows.input - first_row, cells.rows);
    columns = at_most(scaling.columns.input - first_column, cells.columns);
  }

  template <typename T>
  __device__ T* place(T* gradient, const Scaling& scaling, int cell) const {
    const int64_t row = first_row + cell / columns, column = first_column + cell % columns;
    return gradient + (image * scaling.rows.input + row) * scaling.columns.input + column;
  }
};

// What the rows of the output give to those of the map, in one column.
template <typename A>
struct CellRows {
  A* to;  // the sum of row `first`; kMapThreads further, that of the next
  int64_t first;
  int count;
  A above = 0, below = 0;

  __device__ CellRows(A* sums, const Owned& owned) : to(sums), first(owned.first_row), count(owned.rows) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) to[i * kMapThreads] = 0;  // not every row of a map need be part of an output
  }
  __device__ __forceinline__ void put(int64_t row, A sum) const {
    if (row >= first && row < first + count) to[static_cast<int>(row - first) * kMapThreads] = sum;
  }
  // On from between rows `from` and `from` + 1 of the map.
  __device__ __forceinline__ void enter(int64_t from, int64_t row) {
    put(from, above);
    if (row != from + 1) put(from + 1, below);
    above = row == from + 1 ? below : A(0);
    below = 0;
  }
  __device__ __forceinline__ void finish(int64_t row, int64_t last_row) const {
    put(row, row == last_row ? above + below : above);
    if (row < last_row) put(row + 1, below);
  }
};

// What a block has in shared memory besides the map and the sums of columns.
template <typename A>
struct Gather {
  Coverage coverage;
  Blend<A> rows[kTileRows], columns[kMapThreads];
  Span down, across;         // rows and columns of the output that feed the block's cells
  A carried[kMostCellRows];  // sums over the strips before this one, where there are several

  __device__ __forceinline__ void set_spans(const Scaling& scaling, const Owned& owned) {
    if (threadIdx.x == 0) {
      down = scaling.rows.span(owned.first_row, owned.first_row + owned.rows);
    } else if (threadIdx.x == blockDim.x - 1) {
      across = scaling.columns.span(owned.first_column, owned.first_column + owned.columns);
    }
  }
};

// The gradient by the pixels of one strip, added up by thread for each row of the map.
template <int KIND, typename T, typename A>
__device__ __forceinline__ void sum_down(const Scaling& scaling, const BoxTable& table, const ImageBoxes& boxes,
    const Owned& owned, const MapPart<T>& part, MapTile tile, int kind, A inside, A outside, Gather<A>& shared,
    A* sums) {
  const int64_t last_row = scaling.rows.input - 1;
  const int thread = threadIdx.x;
  const bool there = thread < tile.columns;
  const Tap tap = scaling.columns.tap(there ? tile.left + thread : tile.left);
  shared.columns[thread] = Blend<A>(tap);
  Column<A> column(tap);
  CellRows<A> row_sums(sums + thread, owned);
  for (tile.top = shared.down.begin; tile.top < shared.down.end; tile.top += kTileRows) {
    tile.rows = at_most(shared.down.end - tile.top, kTileRows);
    __syncthreads();  // until nobody reads what the band before has left in shared memory any more
    if (thread < tile.rows) shared.rows[thread] = Blend<A>(scaling.rows.tap(tile.top + thread));
    cover(table, boxes, tile, shared.coverage);
    if (!there) continue;
    uint32_t word = shared.coverage.words[thread];
    with_kind<KIND>(kind, [&](auto constant) {
      for (int i = 0; i < tile.rows; ++i, word >>= 1) {
        const Blend<A> blend = shared.rows[i];
        if (blend.low != column.row) {
          row_sums.enter(column.row, blend.low);
          column.enter(part, blend.low, last_row);
        }
        const A pixel = column.pixel(blend.weight);
        const A change = pixel_gradient(decltype(constant)::value, pixel, word & 1, inside, outside);
        row_sums.above += (A(1) - blend.weight) * change;
        row_sums.below += blend.weight * change;
      }
    });
  }
  row_sums.finish(column.row, last_row);
}

// Cell by cell, what the columns of a strip have for it, by a thread or, where those are many, by a warp.
template <typename T, typename A>
__device__ __forceinline__ void sum_across(
    const Scaling& scaling, const Owned& owned, const MapTile& tile, Gather<A>& shared, const A* sums, T* gradient) {
  const int team = scaling.columns.step > 8 ? 32 : 1, lane = threadIdx.x % team;
  for (int cell = threadIdx.x / team; cell < owned.rows * owned.columns; cell += blockDim.x / team) {
    const int64_t map_column = owned.first_column + cell % owned.columns;
    const A* row = sums + cell / owned.columns * kMapThreads;
    const Span reach = scaling.columns.reach(map_column, map_column + 1);
    const int64_t begin = reach.begin - tile.left, end = reach.end - tile.left;
    A sum = 0;
    for (int64_t x = (begin > 0 ? begin : 0) + lane; x < (end < tile.columns ? end : tile.columns); x += team) {
      const Blend<A> blend = shared.columns[x];
      if (blend.low == map_column)
        sum += (map_column == scaling.columns.input - 1 ? A(1) : A(1) - blend.weight) * row[x];
      if (blend.low == map_column - 1) sum += blend.weight * row[x];
    }
    if (team == 32) sum = warp_sum(sum);
    if (lane > 0) continue;
    if (tile.left > shared.across.begin) sum += shared.carried[cell];
    if (tile.left + tile.columns < shared.across.end) {
      shared.carried[cell] = sum;
    } else {
      *owned.place(gradient, scaling, cell) = static_cast<T>(sum);
    }
  }
}

template <typename T, int KIND>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<T>) upsampled_gradient_kernel(Maps<T> maps, Scaling scaling,
    BoxTable table, Cells cells, int kind, MapFactors<typename accumulator<T>::type> factors, T* gradient) {
  using A = typename accumulator<T>::type;
  DEBIASKD_DYNAMIC_SHARED(A, stage);
  A* const sums = stage + (cells.rows + 2) * (cells.columns + 2);
  __shared__ Gather<A> shared;
  for (int64_t index = blockIdx.x; index < cells.count(); index += gridDim.x) {
    const Owned owned(cells, scaling, index);
    const ImageBoxes boxes = table.of(owned.image);
    __syncthreads();  // until nobody reads what earlier cells have left in shared memory any more
    shared.set_spans(scaling, owned);
    __syncthreads();
    const Span across = shared.across;
    if (!boxes.annotated || across.begin == across.end) {
      for (int cell = threadIdx.x; cell < owned.rows * owned.columns; cell += blockDim.x) {
        *owned.place(gradient, scaling, cell) = static_cast<T>(0);
      }
      continue;
    }
    const int64_t bottom = owned.first_row + owned.rows, right = owned.first_column + owned.columns;
    const MapPart<T> part(maps, owned.image, owned.first_row - (owned.first_row > 0),
        bottom + (bottom < scaling.rows.input), owned.first_column - (owned.first_column > 0),
        right + (right < scaling.columns.input), stage, true);
    const A inside = factors.inside(owned.image), outside = factors.outside(owned.image);
    for (int64_t left = across.begin; left < across.end; left += blockDim.x) {
      const MapTile tile = {owned.image, 0, left, 0, at_most(across.end - left, blockDim.x)};
      sum_down<KIND>(scaling, table, boxes, owned, part, tile, kind, inside, outside, shared, sums);
      __syncthreads();
      sum_across(scaling, owned, tile, shared, sums, gradient);
      __syncthreads();  // until nobody reads the sums any more
    }
  }
}

}  // namespace
}  // namespace debiaskd
