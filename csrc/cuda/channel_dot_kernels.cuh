// The kernels of channel_dot: a sample is one block of rows, channels of positions each or positions of channels each,
// that follow each other without a gap.
//
// Packs of 16 bytes need not begin where rows do. After `period` packs, length / gcd(length, WIDTH) of them, which hold
// `together` rows, places in a row repeat: a thread that goes on by whole periods keeps the place of each of its lanes.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

constexpr int kChannelThreads = 448;  // shared out without rest among maps of 7, 14, 28 or 56 positions a side
constexpr int kDotThreads = 256;
constexpr int kChannelUnroll = 4;  // packs that a thread loads at once
constexpr int kChannelRun = 64;    // packs of a thread that are added up before a double takes the sum

// How the packs of each sample are dealt out to blocks: tiles of a period, and shares of the periods.
struct Walk {
  int64_t samples, rows, length, packs;
  int64_t period, together;
  int64_t tiles, tile;    // of a period, and packs in each
  int64_t shares, share;  // of a sample's periods, and periods in each
  int64_t groups;         // periods that a block's threads have side by side
};

// Where a thread works: at `count` packs, the first of them number `pack`, that are `step` packs apart.
template <int WIDTH>
struct Lane {
  int64_t sample, part, share;
  int slot;                        // among the block's threads
  int64_t pack, step, row, place;  // row and place of the first pack's first element
  int64_t row_step;
  int count, ending;  // so many elements of a pack lie in its first row, the others in the next

  __device__ explicit Lane(const Walk& walk) {
    // A grid has fewer than 2^31 blocks, and a 64-bit division is a hundred instructions.
    const unsigned tiles = static_cast<unsigned>(walk.tiles), shares = static_cast<unsigned>(walk.shares);
    share = blockIdx.x % shares, part = blockIdx.x / shares % tiles, sample = blockIdx.x / shares / tiles;
    const int x = static_cast<int>(threadIdx.x) % static_cast<int>(walk.tile);
    const int y = static_cast<int>(threadIdx.x) / static_cast<int>(walk.tile);
    const int64_t own = part * walk.tile + x, first = share * walk.share + y;
    // Those periods of the share that have a pack for this thread.
    const int64_t whole = (walk.packs - own + walk.period - 1) / walk.period, stop = (share + 1) * walk.share;
    const int64_t left = (stop < whole ? stop : whole) - first;
    count = y < walk.groups && own < walk.period && left > 0 ? static_cast<int>((left - 1) / walk.groups + 1) : 0;
    slot = y < walk.groups ? static_cast<int>(threadIdx.x) : -1;
    pack = first * walk.period + own, step = walk.groups * walk.period;
    row = own * WIDTH / walk.length, place = own * WIDTH % walk.length;
    ending = walk.length - place < WIDTH ? static_cast<int>(walk.length - place) : WIDTH;
    row += first * walk.together, row_step = walk.groups * walk.together;
  }
};

// ---- contiguous maps: the sum over rows at every place ----

template <typename T>
struct PlaceSums {
  Walk walk;
  const T *a, *g;
  const typename accumulator<T>::type* weights;  // [samples, rows], in place of g
  typename accumulator<T>::type* out;            // [samples, length]
  double* partial;                               // [samples, length, shares], in place of out
};

template <int COUNT, bool WEIGHTED, typename T, int WIDTH, typename A>
__device__ __forceinline__ void add_packs(
    const T*& a, const T*& g, const A*& weights, const Lane<WIDTH>& lane, A (&sum)[WIDTH]) {
  Pack<T, WIDTH> as[COUNT], gs[COUNT];
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    as[u] = load_pack<WIDTH>(a), a += lane.step * WIDTH;
    if constexpr (!WEIGHTED) gs[u] = load_pack<WIDTH>(g), g += lane.step * WIDTH;
  }
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    A here = 0, next = 0;
    if constexpr (WEIGHTED) {
      here = weights[0], next = lane.ending < WIDTH ? weights[1] : here;
      weights += lane.row_step;
    }
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) {
      sum[v] += element<A>(as[u], v) * (!WEIGHTED ? element<A>(gs[u], v) : v < lane.ending ? here : next);
    }
  }
}

template <typename T, int WIDTH, bool WEIGHTED>
__global__ void __launch_bounds__(kChannelThreads, 2) place_sums_kernel(__grid_constant__ const PlaceSums<T> job) {
  using A = typename accumulator<T>::type;
  DEBIASKD_DYNAMIC_SHARED(double, totals);  // of each thread's lanes
  const Lane<WIDTH> lane(job.walk);
  const int64_t sample_packs = lane.sample * job.walk.packs;
  const T *a = job.a + (sample_packs + lane.pack) * WIDTH, *g = nullptr;
  const A* weights = nullptr;
  if constexpr (WEIGHTED) {
    weights = job.weights + lane.sample * job.walk.rows + lane.row;
  } else {
    g = job.g + (sample_packs + lane.pack) * WIDTH;
  }
  constexpr int kUnroll = WIDTH > 4 ? kChannelUnroll / 2 : kChannelUnroll;  // as many as registers hold
  double total[WIDTH] = {};
#pragma unroll 1
  for (int count = lane.count; count > 0; count -= kChannelRun) {
    A sum[WIDTH] = {};
    int left = count < kChannelRun ? count : kChannelRun;
#pragma unroll 1
    for (; left >= kUnroll; left -= kUnroll) add_packs<kUnroll, WEIGHTED>(a, g, weights, lane, sum);
#pragma unroll 1
    for (; left > 0; --left) add_packs<1, WEIGHTED>(a, g, weights, lane, sum);
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) total[v] += sum[v];
  }
#pragma unroll
  for (int v = 0; v < WIDTH; ++v) {
    if (lane.slot >= 0) totals[lane.slot * WIDTH + v] = total[v];
  }
  __syncthreads();
  // Of a tile's elements those that are a row apart belong to the same place.
  const int span = static_cast<int>(job.walk.tile) * WIDTH;
  const int64_t begin = lane.part * span, left = job.walk.length - begin;
  for (int i = threadIdx.x; i < span && i < left; i += blockDim.x) {
    double sum = 0;
    for (int group = 0; group < job.walk.groups; ++group) {
      for (int row = 0; row < job.walk.together; ++row) sum += totals[group * span + row * job.walk.length + i];
    }
    const int64_t at = lane.sample * job.walk.length + begin + i;
    if (job.partial) {
      job.partial[at * job.walk.shares + lane.share] = sum;
    } else {
      job.out[at] = static_cast<A>(sum);
    }
  }
}

// ---- channels_last maps: the dot product of every row ----

template <typename T>
struct RowDots {
  const T *a, *g;
  const typename accumulator<T>::type* weights;  // [samples, length], in place of g
  int64_t rows, sample_rows, length;             // rows of all samples
  int64_t shares, share;                         // of a row, and elements in each
  int team;                                      // threads a row: 32 or a power of 2 below it, or all of a block
  typename accumulator<T>::type* out;            // [rows]
  double* partial;                               // [rows, shares], in place of out
};

template <typename T, int WIDTH, bool WEIGHTED>
__global__ void __launch_bounds__(kDotThreads, 3) row_dots_kernel(__grid_constant__ const RowDots<T> job) {
  using A = typename accumulator<T>::type;
  using Other = std::conditional_t<WEIGHTED, A, T>;
  const unsigned shares = static_cast<unsigned>(job.shares);
  const int64_t row = static_cast<int64_t>(blockIdx.x / shares) * (kDotThreads / job.team) + threadIdx.x / job.team;
  const int64_t share = blockIdx.x % shares, stop = (share + 1) * job.share;
  const int64_t end = row >= job.rows ? 0 : stop < job.length ? stop : job.length;
  const T* a = job.a + row * job.length;
  const Other* other;
  if constexpr (WEIGHTED) {
    other = job.weights + row / job.sample_rows * job.length;
  } else {
    other = job.g + row * job.length;
  }
  const int64_t step = static_cast<int64_t>(job.team) * WIDTH;
  double total = 0;
#pragma unroll 1
  for (int64_t i = share * job.share + threadIdx.x % job.team * WIDTH; i < end;) {
    A sum = 0;
#pragma unroll 1
    for (int turn = 0; turn < kChannelRun && i < end; turn += kChannelUnroll) {
      Pack<T, WIDTH> as[kChannelUnroll];
      Pack<Other, WIDTH> others[kChannelUnroll];
#pragma unroll
      for (int u = 0; u < kChannelUnroll; ++u) {
        if (i + u * step >= end) continue;
        as[u] = load_pack<WIDTH>(a + i + u * step), others[u] = load_pack<WIDTH>(other + i + u * step);
      }
#pragma unroll
      for (int u = 0; u < kChannelUnroll; ++u, i += step) {
        if (i >= end) continue;
#pragma unroll
        for (int v = 0; v < WIDTH; ++v) sum += element<A>(as[u], v) * element<A>(others[u], v);
      }
    }
    total += sum;
  }
  if (job.team > 32) {
    total = block_sum(total);
  } else {
    for (int lanes = job.team / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(kFullWarp, total, lanes);
  }
  if (threadIdx.x % job.team > 0 || row >= job.rows) return;
  if (job.partial) {
    job.partial[row * job.shares + share] = total;
  } else {
    job.out[row] = static_cast<A>(total);
  }
}

// ---- a map times each channel ----

template <typename T>
struct Scale {
  Walk walk;
  const T* values;                                     // null: 1
  const typename accumulator<T>::type *places, *rows;  // factors [samples, length] and [samples, rows]; null: 1
  T* out;
};

template <typename T, int WIDTH, bool VALUES>
__global__ void __launch_bounds__(kChannelThreads, 2) scale_kernel(__grid_constant__ const Scale<T> job) {
  using A = typename accumulator<T>::type;
  const Lane<WIDTH> lane(job.walk);
  if (lane.count == 0) return;
  const int64_t from = (lane.sample * job.walk.packs + lane.pack) * WIDTH, step = lane.step * WIDTH;
  const T* values = job.values + (VALUES ? from : 0);
  const A* rows = job.rows ? job.rows + lane.sample * job.walk.rows + lane.row : nullptr;
  T* out = job.out + from;
  A places[WIDTH];
#pragma unroll
  for (int v = 0; v < WIDTH; ++v) {
    const int64_t place = v < lane.ending ? lane.place + v : lane.place + v - job.walk.length;
    places[v] = job.places ? job.places[lane.sample * job.walk.length + place] : A(1);
  }
#pragma unroll 1
  for (int left = lane.count; left > 0; left -= kChannelUnroll) {
    Pack<T, WIDTH> packs[kChannelUnroll];
    A here[kChannelUnroll], next[kChannelUnroll];
#pragma unroll
    for (int u = 0; u < kChannelUnroll; ++u) {
      here[u] = next[u] = 1;
      if (u >= left) continue;
      if constexpr (VALUES) packs[u] = load_pack<WIDTH>(values), values += step;
      if (!rows) continue;
      here[u] = rows[0], next[u] = lane.ending < WIDTH ? rows[1] : here[u];
      rows += lane.row_step;
    }
#pragma unroll
    for (int u = 0; u < kChannelUnroll; ++u, out += step) {
      if (u >= left) continue;
      Pack<T, WIDTH> product;
#pragma unroll
      for (int v = 0; v < WIDTH; ++v) {
        const A factor = places[v] * (v < lane.ending ? here[u] : next[u]);
        product.value[v] = static_cast<T>(VALUES ? element<A>(packs[u], v) * factor : factor);
      }
      store_pack(product, out);
    }
  }
}

}  // namespace
}  // namespace debiaskd
