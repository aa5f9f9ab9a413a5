// Which pixels of a tile lie inside of at least one box or of the mask: a word a column, a bit a row.
//
// A warp makes the words of 32 columns, and each of its lanes takes a box. An interval of columns is the union of two
// whose length is a power of two, so that a box costs two atomic ors however wide it is, and a pixel costs the test of
// one bit however many boxes there are. Ors commute: the order in which lanes come to them shows nowhere. A mask comes
// as such words, of 32 rows from a multiple of 32 on: one or two of them make up the word of a column.
#pragma once

#include <optional>

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

constexpr int kMapThreads = 256;           // at most, in a block
constexpr int kTileRows = 32;              // at most: the bits of a word
constexpr int kTileColumns = kMapThreads;  // at most: 32 for each warp
constexpr int kLevels = 6;                 // intervals of 1, 2, 4 ... 32 columns

// The boxes of one image.
struct ImageBoxes {
  bool annotated;
  int64_t begin, end;
};

inline std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

struct BoxTable {
  const int32_t* coords;
  const int64_t* offsets;
  const bool* annotated;
  const int32_t* mask;  // null where there is none
  int64_t images, offsets_step, annotated_step, mask_bands, mask_columns;

  // `coords_in` and `mask_in` must be contiguous.
  BoxTable(const Tensor& coords_in, const Tensor& offsets_in, const Tensor& annotated_in,
      const std::optional<Tensor>& mask_in)
      : coords(static_cast<const int32_t*>(coords_in.data_ptr())),
        offsets(static_cast<const int64_t*>(offsets_in.data_ptr())),
        annotated(static_cast<const bool*>(annotated_in.data_ptr())),
        mask(mask_in ? static_cast<const int32_t*>(mask_in->data_ptr()) : nullptr),
        images(annotated_in.size(0)),
        offsets_step(offsets_in.stride(0)),
        annotated_step(annotated_in.stride(0)),
        mask_bands(mask_in ? mask_in->size(1) : 0),
        mask_columns(mask_in ? mask_in->size(2) : 0) {}

  __device__ ImageBoxes of(int64_t image) const {
    const int64_t* from = offsets + image * offsets_step;
    return {annotated[image * annotated_step], from[0], from[offsets_step]};
  }

  // The 32 rows from `row` on of a column of an image's mask; those below the last one are 0.
  __device__ __forceinline__ uint32_t mask_word(int64_t image, int64_t row, int64_t column) const {
    const int64_t band = row / 32;
    const int shift = static_cast<int>(row % 32);
    const int32_t* first = mask + (image * mask_bands + band) * mask_columns + column;
    const uint32_t word = static_cast<uint32_t>(*first) >> shift;
    if (shift == 0 || band + 1 >= mask_bands) return word;
    return word | static_cast<uint32_t>(first[mask_columns]) << (32 - shift);
  }
};

// Part of a map: `rows` and `columns` of it from (top, left) on.
struct MapTile {
  int64_t image, top, left;
  int rows, columns;
};

DEBIASKD_HOST_DEVICE inline int at_most(int64_t count, int most) {
  return count < most ? static_cast<int>(count) : most;
}

struct Coverage {
  alignas(32) uint32_t words[kTileColumns];
  uint32_t starts[kTileColumns / 32][kLevels][32];  // intervals by length and first column
};

// A number from 0 to 32.
__device__ __forceinline__ int clipped(int64_t position) {
  return position < 0 ? 0 : position > 32 ? 32 : static_cast<int>(position);
}

struct Box {
  int32_t x0, y0, x1, y1;
};

__device__ __forceinline__ Box read_box(const BoxTable& table, int64_t box, int64_t end) {
  if (box >= end) return {0, 0, 0, 0};
  const int32_t* corners = table.coords + 4 * box;
  return {corners[0], corners[1], corners[2], corners[3]};
}

// Puts a box among the intervals of the 32 columns from `left` on, for the 32 rows from `top` on.
__device__ __forceinline__ void add_box(uint32_t (&starts)[kLevels][32], const Box& box, int64_t left, int64_t top) {
  const int x0 = clipped(box.x0 - left), width = clipped(box.x1 - left) - x0;
  const int y0 = clipped(box.y0 - top), height = clipped(box.y1 - top) - y0;
  if (width <= 0 || height <= 0) return;
  const uint32_t bits = 0xffffffffu >> (32 - height) << y0;
  const int level = 31 - __clz(width);
  atomicOr(&starts[level][x0], bits);
  atomicOr(&starts[level][x0 + width - (1 << level)], bits);
}

// The words of a tile's columns, of which there are no more than threads. All threads of the block must take part and,
// before, be done with an earlier tile's.
__device__ __forceinline__ void cover(
    const BoxTable& table, const ImageBoxes& boxes, const MapTile& tile, Coverage& coverage) {
  const int lane = threadIdx.x % 32, first_column = threadIdx.x - lane;
  if (first_column < tile.columns) {
    uint32_t word = 0;
    if (boxes.begin < boxes.end) {
      uint32_t (&starts)[kLevels][32] = coverage.starts[threadIdx.x / 32];
#pragma unroll
      for (int level = 0; level < kLevels; ++level) starts[level][lane] = 0;
      __syncwarp();
#pragma unroll 1
      for (int64_t box = boxes.begin + lane; box < boxes.end; box += 64) {
        const Box one = read_box(table, box, boxes.end), other = read_box(table, box + 32, boxes.end);
        add_box(starts, one, tile.left + first_column, tile.top);
        add_box(starts, other, tile.left + first_column, tile.top);
      }
      __syncwarp();
      // Each interval becomes two of half its length, until all are single columns.
      word = starts[kLevels - 1][lane];
#pragma unroll
      for (int level = kLevels - 2; level >= 0; --level) {
        const uint32_t before = __shfl_up_sync(kFullWarp, word, 1 << level);
        word |= starts[level][lane] | (lane >= 1 << level ? before : 0);
      }
    }
    if (table.mask && threadIdx.x < tile.columns) {
      word |= table.mask_word(tile.image, tile.top, tile.left + threadIdx.x);
    }
    coverage.words[threadIdx.x] = word;
  }
  __syncthreads();
}

// The words of WIDTH neighbouring columns.
template <int WIDTH>
__device__ __forceinline__ Pack<uint32_t, WIDTH> words_of(const Coverage& coverage, int column) {
  return load_pack<WIDTH>(coverage.words + column);
}

}  // namespace
}  // namespace debiaskd
