// Localization on maps of the boxes' own size: sums of tiles, and the gradient.
//
// A thread has WIDTH neighbouring columns of its tile, and of the rows every `stride`-th. It asks for all of its pixels
// (with 16 bytes an access) before the block looks at boxes, so that these cost hardly any time of their own.
#pragma once

#include "cuda/localization_tiles.cuh"

namespace debiaskd {
namespace {

// Where in a tile a thread works. Threads of one word of 32 columns are neighbours in a warp.
template <int WIDTH>
struct Place {
  int row, column, stride;

  explicit __device__ Place(const Tile& tile) {
    const int across = static_cast<int>(words_per_row(tile.columns)) * (32 / WIDTH);
    stride = static_cast<int>(blockDim.x) / across;
    row = threadIdx.x / across;
    column = threadIdx.x % across * WIDTH;
    if (row >= stride) row = kTileRows;  // left over
  }

  __device__ int row_of(int step) const { return row + step * stride; }
  __device__ bool has(const Tile& tile, int step) const { return row_of(step) < tile.rows && column < tile.columns; }
};

// Rows that a thread holds at once: enough memory is then on its way, and few enough registers are in use.
template <int WIDTH>
constexpr int kPixelRows = WIDTH == 1 ? 8 : 16 / WIDTH;
template <int WIDTH>
constexpr int kBitRows = WIDTH <= 4 ? 8 : 4;

// Goes down a thread's rows in memory, to one after the other.
template <typename T>
struct Walk {
  T* at;
  int64_t step;

  __device__ __forceinline__ T* next() {
    T* now = at;
    at += step;
    return now;
  }
};

template <typename T, int WIDTH>
__device__ __forceinline__ Walk<const T> pixels_of(const Maps<T>& maps, const Tile& tile, const Place<WIDTH>& place) {
  return {maps.data + tile.image * maps.image_step + (tile.top + place.row) * maps.row_step +
              (tile.left + place.column) * maps.column_step,
      place.stride * maps.row_step};
}

// The words that hold the bits of a thread's pixels: is each more than 0?
template <typename Word, int WIDTH>
__device__ __forceinline__ Walk<Word> words_with(
    Word* positive, const Tiles& tiles, const Tile& tile, const Place<WIDTH>& place) {
  const int64_t words = words_per_row(tiles.width);
  return {positive + (tile.image * tiles.height + tile.top + place.row) * words + (tile.left + place.column) / 32,
      place.stride * words};
}

template <typename T, int WIDTH>
__device__ __forceinline__ void read_pixels(Walk<const T>& pixels, const Tile& tile, const Place<WIDTH>& place,
    int first_step, Pack<T, WIDTH> (&held)[kPixelRows<WIDTH>]) {
#pragma unroll
  for (int i = 0; i < kPixelRows<WIDTH>; ++i) {
    held[i] = {};
    const T* row = pixels.next();
    if (place.has(tile, first_step + i)) held[i] = load_pack<WIDTH>(row);
  }
}

// ---- forward ----

// A word of bits from those of the threads that share it, for the first of them.
template <int WIDTH>
__device__ __forceinline__ uint32_t gather_bits(uint32_t bits) {
  bits <<= threadIdx.x % (32 / WIDTH) * WIDTH;
#pragma unroll
  for (int step = 1; step < 32 / WIDTH; step *= 2) bits |= __shfl_xor_sync(kFullWarp, bits, step);
  return bits;
}

// Nobody reads the bits of a map that is not annotated, but an output is never left unwritten.
__device__ __forceinline__ void clear_bits(int32_t* positive, const Tiles& tiles, const Tile& tile) {
  const int words = static_cast<int>(words_per_row(tile.columns)), count = tile.rows * words;
  const int64_t step = words_per_row(tiles.width);
  int32_t* first = positive + (tile.image * tiles.height + tile.top) * step + tile.left / 32;
  for (int i = threadIdx.x; i < count; i += blockDim.x) first[i / words * step + i % words] = 0;
}

// What a thread holds goes into its sums and, if `bits` leads to any words, into a bit for each pixel.
template <int KIND, typename T, int WIDTH, typename A>
__device__ __forceinline__ void add_held(const Pack<T, WIDTH> (&held)[kPixelRows<WIDTH>],
    const Pack<uint32_t, WIDTH>& words, const Tile& tile, const Place<WIDTH>& place, int first_step, A& all, A& inside,
    Walk<int32_t>& bits) {
#pragma unroll
  for (int i = 0; i < kPixelRows<WIDTH>; ++i) {
    const int row = place.row_of(first_step + i);
    const bool there = place.has(tile, first_step + i);
    uint32_t positive = 0;
    if (there) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const A pixel = element<A>(held[i], j);
        add_pixel<KIND>(pixel, words.value[j] >> row & 1, all, inside);
        if (pixel > A(0)) positive |= 1u << j;
      }
    }
    if (KIND == kEnergy && bits.at) {
      positive = gather_bits<WIDTH>(positive);
      int32_t* word = bits.next();
      if (there && place.column % 32 == 0) *word = static_cast<int32_t>(positive);
    }
  }
}

// `positive` is null where nobody asks for the bits.
template <typename T, int WIDTH, int KIND>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    sum_kernel(Maps<T> maps, BoxTable table, Tiles tiles, int kind, Partial* partial, int32_t* positive) {
  using A = typename accumulator<T>::type;
  __shared__ Coverage coverage;
  for (int64_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const Tile tile = tiles.tile(index);
    const ImageBoxes boxes = table.of(tile.image);
    if (!boxes.annotated) {
      if (KIND == kEnergy && positive) clear_bits(positive, tiles, tile);
      continue;
    }
    const Place<WIDTH> place(tile);
    Pack<T, WIDTH> held[kPixelRows<WIDTH>];
    Walk<const T> pixels = pixels_of(maps, tile, place);
    read_pixels(pixels, tile, place, 0, held);
    cover(table, boxes, tile, coverage);
    const Pack<uint32_t, WIDTH> words = words_of<WIDTH>(coverage, place.column);
    Walk<int32_t> bits = {};
    if (KIND == kEnergy && positive) bits = words_with(positive, tiles, tile, place);
    A all = 0, inside = 0;
    with_kind<KIND>(kind, [&](auto constant) {
      for (int first = 0;;) {
        add_held<decltype(constant)::value>(held, words, tile, place, first, all, inside, bits);
        first += kPixelRows<WIDTH>;
        if (first * place.stride >= tile.rows) break;
        read_pixels(pixels, tile, place, first, held);
      }
    });
    write_partial(all, inside, partial + index);  // at whose barrier all are done with this tile's words
  }
}

// ---- backward ----

// Pixels that a thread holds, or for energy their bits.
template <typename T, int WIDTH, int KIND>
struct Held {
  using A = typename accumulator<T>::type;
  static constexpr bool kBits = KIND == kEnergy;
  static constexpr int kRows = kBits ? kBitRows<WIDTH> : kPixelRows<WIDTH>;

  Pack<T, WIDTH> pixels[kPixelRows<WIDTH>];
  uint32_t bits[kBitRows<WIDTH>];
  Walk<const T> from_pixels = {};
  Walk<const int32_t> from_bits = {};

  __device__ __forceinline__ Held(
      const Maps<T>& maps, const int32_t* positive, const Tiles& tiles, const Tile& tile, const Place<WIDTH>& place) {
    if constexpr (kBits) from_bits = words_with(positive, tiles, tile, place);
    if constexpr (!kBits) from_pixels = pixels_of(maps, tile, place);
  }

  __device__ __forceinline__ void read(const Tile& tile, const Place<WIDTH>& place, int first_step) {
    if constexpr (kBits) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int32_t* word = from_bits.next();
        bits[i] = place.has(tile, first_step + i) ? *word : 0;
      }
    } else {
      read_pixels(from_pixels, tile, place, first_step, pixels);
    }
  }

  __device__ __forceinline__ A pixel(const Place<WIDTH>& place, int i, int j) const {
    if constexpr (kBits) return static_cast<A>(bits[i] >> (place.column % 32 + j) & 1);
    return element<A>(pixels[i], j);
  }
};

template <int KIND, typename T, int WIDTH, int HELD, typename A>
__device__ __forceinline__ void write_gradient(const Held<T, WIDTH, HELD>& held, const Pack<uint32_t, WIDTH>& words,
    const Tile& tile, const Place<WIDTH>& place, int first_step, A inside, A outside, Walk<T>& to) {
#pragma unroll
  for (int i = 0; i < held.kRows; ++i) {
    const int row = place.row_of(first_step + i);
    T* pixels = to.next();
    if (!place.has(tile, first_step + i)) continue;
    Pack<T, WIDTH> pack;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const bool covered = words.value[j] >> row & 1;
      pack.value[j] = static_cast<T>(pixel_gradient(KIND, held.pixel(place, i, j), covered, inside, outside));
    }
    store_pack(pack, pixels);
  }
}

template <typename T, int WIDTH, int KIND>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) gradient_kernel(Maps<T> maps, const int32_t* positive,
    BoxTable table, Tiles tiles, int kind, Factors<typename accumulator<T>::type> factors, T* gradient) {
  using A = typename accumulator<T>::type;
  __shared__ Coverage coverage;
  for (int64_t index = blockIdx.x; index < tiles.count(); index += gridDim.x) {
    const Tile tile = tiles.tile(index);
    const ImageBoxes boxes = table.of(tile.image);
    const Place<WIDTH> place(tile);
    Walk<T> to = {
        gradient + (tile.image * tiles.height + tile.top + place.row) * tiles.width + tile.left + place.column,
        place.stride * tiles.width};
    if (!boxes.annotated) {
      for (int step = 0; step * place.stride < tile.rows; ++step) {
        T* pixels = to.next();
        if (place.has(tile, step)) store_pack(Pack<T, WIDTH>{}, pixels);
      }
      continue;
    }
    Held<T, WIDTH, KIND> held(maps, positive, tiles, tile, place);
    held.read(tile, place, 0);
    const A inside = factors.coefficients[2 * tile.image], outside = factors.coefficients[2 * tile.image + 1];
    const A upstream = factors.upstream_of(tile.image);
    __syncthreads();  // until nobody reads the words of an earlier tile any more
    cover(table, boxes, tile, coverage);
    const Pack<uint32_t, WIDTH> words = words_of<WIDTH>(coverage, place.column);
    with_kind<KIND>(kind, [&](auto constant) {
      for (int first = 0;;) {
        write_gradient<decltype(constant)::value>(
            held, words, tile, place, first, inside * upstream, outside * upstream, to);
        first += held.kRows;
        if (first * place.stride >= tile.rows) break;
        held.read(tile, place, first);
      }
    });
  }
}

}  // namespace
}  // namespace debiaskd
