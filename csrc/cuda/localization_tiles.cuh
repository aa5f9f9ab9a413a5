// What the localization kernels share: maps and how they are cut into tiles, kinds, and what becomes of a pixel.
#pragma once

#include <type_traits>

#include "common/localization.h"
#include "cuda/coverage.cuh"

namespace debiaskd {
namespace {

// In place of the kind that a kernel is compiled for: one of those that are not energy, which it is told when it runs.
constexpr int kOther = -1;

template <int KIND, typename Function>
__device__ __forceinline__ void with_kind(int kind, Function&& function) {
  if constexpr (KIND >= 0) return function(std::integral_constant<int, KIND>{});
  switch (kind) {
    case kL1: return function(std::integral_constant<int, kL1>{});
    case kPpce: return function(std::integral_constant<int, kPpce>{});
    default: return function(std::integral_constant<int, kRrr>{});
  }
}

// Blocks that a multiprocessor is to hold at once, where registers are few enough.
template <typename T>
constexpr int kMapBlocks = std::is_same_v<T, double> ? 1 : 4;

// Maps [N,H,W] as they lie in memory.
template <typename T>
struct Maps {
  const T* data;
  int64_t image_step, row_step, column_step;

  __device__ __forceinline__ const T* at(int64_t image, int64_t row, int64_t column) const {
    return data + image * image_step + row * row_step + column * column_step;
  }
};

// How maps of `height` x `width` are cut.
struct Tiles {
  int64_t images, height, width;
  int bands, strips, rows;  // bands of `rows` rows, strips of kTileColumns columns

  DEBIASKD_HOST_DEVICE int parts() const { return bands * strips; }
  DEBIASKD_HOST_DEVICE int64_t count() const { return images * parts(); }

  __device__ MapTile tile(int64_t index) const {
    const int64_t image = index / parts();
    const int part = static_cast<int>(index - image * parts());
    const int64_t top = static_cast<int64_t>(part / strips) * rows;
    const int64_t left = static_cast<int64_t>(part % strips) * kTileColumns;
    return {image, top, left, at_most(height - top, rows), at_most(width - left, kTileColumns)};
  }
};

DEBIASKD_HOST_DEVICE inline int64_t words_per_row(int64_t width) { return (width + 31) / 32; }

// Where in a tile a thread works: on WIDTH neighbouring columns of every `stride`-th row. Threads of one word of 32
// columns are neighbours in a warp.
template <int WIDTH>
struct Place {
  int row, column, stride;

  explicit __device__ Place(const MapTile& tile) {
    const int across = static_cast<int>(words_per_row(tile.columns)) * (32 / WIDTH);
    stride = static_cast<int>(blockDim.x) / across;
    row = threadIdx.x / across;
    column = threadIdx.x % across * WIDTH;
    if (row >= stride) row = kTileRows;  // left over
  }

  __device__ int row_of(int step) const { return row + step * stride; }
  __device__ bool has(const MapTile& tile, int step) const { return row_of(step) < tile.rows && column < tile.columns; }
};

DEBIASKD_HOST_DEVICE inline int whole_warps(int threads) { return (threads + 31) / 32 * 32; }

// What a tile adds to its map's sums: `all` is MapSums::all, `inside` is, by kind, MapSums::inside or MapSums::area.
struct Partial {
  double all, inside;
};

// All threads of the block must take part.
__device__ __forceinline__ void write_partial(double all, double inside, Partial* partial) {
  __shared__ Partial warps[kMapThreads / 32];
  all = warp_sum(all);
  inside = warp_sum(inside);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = {all, inside};
  __syncthreads();
  if (threadIdx.x > 0) return;
  Partial sum = warps[0];
#pragma unroll
  for (int i = 1; i < kMapThreads / 32; ++i) {
    if (i >= static_cast<int>(blockDim.x / 32)) break;
    sum.all += warps[i].all;
    sum.inside += warps[i].inside;
  }
  *partial = sum;
}

template <int KIND, typename A>
__device__ __forceinline__ void add_pixel(A pixel, bool covered, A& all, A& inside) {
  const A term = pixel_term(KIND, pixel, covered);
  all += term;
  if (KIND == kEnergy && covered) inside += term;
  if (KIND == kPpce && covered) inside += 1;
}

// The gradient by a pixel is a multiple of one of the two coefficients of its map, and of the upstream gradient.
template <typename A>
struct MapFactors {
  const A *coefficients, *upstream;
  int64_t upstream_step;

  __device__ A inside(int64_t image) const { return coefficients[2 * image] * upstream[image * upstream_step]; }
  __device__ A outside(int64_t image) const { return coefficients[2 * image + 1] * upstream[image * upstream_step]; }
};

}  // namespace
}  // namespace debiaskd
