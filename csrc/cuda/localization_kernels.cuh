// The kernels of localization: sums of tiles over any source of pixels, and the gradient of maps of the boxes' own
// size. (The gradient of a smaller map is gathered by localization_gather.cuh.)
#pragma once

#include "cuda/localization_pixels.cuh"

namespace debiaskd {
namespace {

// A word of bits from those of the threads that share it, for the first of them.
template <int WIDTH>
__device__ __forceinline__ uint32_t gather_bits(uint32_t bits) {
  bits <<= threadIdx.x % (32 / WIDTH) * WIDTH;
#pragma unroll
  for (int step = 1; step < 32 / WIDTH; step *= 2) bits |= __shfl_xor_sync(kFullWarp, bits, step);
  return bits;
}

// Nobody reads the bits of a map that is not annotated, but an output is never left unwritten.
__device__ __forceinline__ void clear_bits(int32_t* positive, const Tiles& tiles, const MapTile& tile) {
  const int words = static_cast<int>(words_per_row(tile.columns)), count = tile.rows * words;
  const int64_t step = words_per_row(tiles.width);
  int32_t* first = positive + (tile.image * tiles.height + tile.top) * step + tile.left / 32;
  for (int i = threadIdx.x; i < count; i += blockDim.x) first[i / words * step + i % words] = 0;
}

// `positive` takes a bit for each pixel (is it more than 0?); null where nobody asks for them.
template <typename Source, int KIND>
__global__ void __launch_bounds__(kMapThreads, Source::kBlocks)
    sum_kernel(Source source, BoxTable table, Tiles tiles, int kind, Partial* partial, int32_t* positive) {
  using A = typename Source::A;
  using Reader = typename Source::Reader;
  constexpr int kWidth = Source::kWidth;
  __shared__ Coverage coverage;
  for (int64_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const MapTile tile = tiles.tile(index);
    const ImageBoxes boxes = table.of(tile.image);
    if (!boxes.annotated) {
      if (KIND == kEnergy && positive) clear_bits(positive, tiles, tile);
      continue;
    }
    const Place<kWidth> place(tile);
    Reader pixels(source, tiles, tile, place);
    pixels.read(tile, place, 0);
    cover(table, boxes, tile, coverage);
    const Pack<uint32_t, kWidth> words = words_of<kWidth>(coverage, place.column);
    int32_t* bits = KIND == kEnergy && positive ? words_at(positive, tiles, tile, place) : nullptr;
    const int64_t bits_step = place.stride * words_per_row(tiles.width);
    A all = 0, inside = 0;
    with_kind<KIND>(kind, [&](auto constant) {
      for (int first = 0;;) {
#pragma unroll
        for (int i = 0; i < Reader::kRows; ++i) {
          const int row = place.row_of(first + i);
          const bool there = place.has(tile, first + i);
          uint32_t above_zero = 0;
          if (there) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              const A pixel = pixels.pixel(i, j);
              add_pixel<decltype(constant)::value>(pixel, words.value[j] >> row & 1, all, inside);
              if (pixel > A(0)) above_zero |= 1u << j;
            }
          }
          if (KIND == kEnergy && bits) {
            above_zero = gather_bits<kWidth>(above_zero);
            if (there && place.column % 32 == 0) *bits = static_cast<int32_t>(above_zero);
            bits += bits_step;
          }
        }
        first += Reader::kRows;
        if (first * place.stride >= tile.rows) break;
        pixels.read(tile, place, first);
      }
    });
    write_partial(all, inside, partial + index);  // at whose barrier all are done with this tile's words
  }
}

template <typename Source, typename T, int KIND>
__global__ void __launch_bounds__(kMapThreads, kMapBlocks<T>) gradient_kernel(
    Source source, BoxTable table, Tiles tiles, int kind, MapFactors<typename Source::A> factors, T* gradient) {
  using A = typename Source::A;
  using Reader = typename Source::Reader;
  constexpr int kWidth = Source::kWidth;
  __shared__ Coverage coverage;
  for (int64_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const MapTile tile = tiles.tile(index);
    const ImageBoxes boxes = table.of(tile.image);
    const Place<kWidth> place(tile);
    T* to = gradient + (tile.image * tiles.height + tile.top + place.row) * tiles.width + tile.left + place.column;
    const int64_t step = place.stride * tiles.width;
    if (!boxes.annotated) {
      for (int i = 0; i * place.stride < tile.rows; ++i, to += step) {
        if (place.has(tile, i)) store_pack(Pack<T, kWidth>{}, to);
      }
      continue;
    }
    Reader pixels(source, tiles, tile, place);
    pixels.read(tile, place, 0);
    const A inside = factors.inside(tile.image), outside = factors.outside(tile.image);
    __syncthreads();  // until nobody reads the words of an earlier tile any more
    cover(table, boxes, tile, coverage);
    const Pack<uint32_t, kWidth> words = words_of<kWidth>(coverage, place.column);
    with_kind<KIND>(kind, [&](auto constant) {
      for (int first = 0;;) {
#pragma unroll
        for (int i = 0; i < Reader::kRows; ++i, to += step) {
          const int row = place.row_of(first + i);
          if (!place.has(tile, first + i)) continue;
          Pack<T, kWidth> pack;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            const bool covered = words.value[j] >> row & 1;
            pack.value[j] =
                static_cast<T>(pixel_gradient(decltype(constant)::value, pixels.pixel(i, j), covered, inside, outside));
          }
          store_pack(pack, to);
        }
        first += Reader::kRows;
        if (first * place.stride >= tile.rows) break;
        pixels.read(tile, place, first);
      }
    });
  }
}

}  // namespace
}  // namespace debiaskd
