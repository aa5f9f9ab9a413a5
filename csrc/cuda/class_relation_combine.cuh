// From products to loss and gradient: the gradient of a row is a combination of the rows of its class.
//
// A block takes eight rows of a class, one for each of its warps, and some of their columns. What every row of the
// class weighs in those eight goes to shared memory, a piece at a time; then each number that is read counts in eight
// sums in registers. In a class of eight or fewer, warps have columns of their own; in larger ones they share out the
// class and exchange what they have summed.
#pragma once

#include "cuda/class_relation_weights.cuh"

namespace debiaskd {
namespace {

// ---- columns ----

template <int COUNT, typename T>
__device__ __forceinline__ Pack<T, COUNT> read_columns(const Combination<T>& in, int sample, int64_t column) {
  const T* row = in.student + sample * in.row_step;
  if constexpr (COUNT > 1) return load_pack<COUNT>(row + column);
  return {row[column * in.step]};
}

// sums[r] += weights times rows, for every row r of the tile; rows begin, begin + step, ... of those that weights are
// there for.
template <typename T, int WIDTH, typename A>
__device__ __forceinline__ void combine(const Combination<T>& in, const Weights<A>& weights, int begin, int count,
    int step, int64_t column, Pack<A, WIDTH> (&sums)[kRows]) {
  constexpr int kLoads = WIDTH > 4 ? 2 : 4;  // under way at a time
  if (column >= in.width) return;
#pragma unroll kLoads
  for (int i = begin; i < count; i += step) {
    const Pack<T, WIDTH> x = read_columns<WIDTH>(in, weights.sample[i], column);
    Pack<A, kWidest<A>> weight[kRows / kWidest<A>];
#pragma unroll
    for (int r = 0; r < kRows; r += kWidest<A>) {
      weight[r / kWidest<A>] = load_pack<kWidest<A>>(weights.of + i * Weights<A>::kStride + r);
    }
#pragma unroll
    for (int e = 0; e < WIDTH; ++e) {
      const A value = element<A>(x, e);
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r].value[e] += weight[r / kWidest<A>].value[r % kWidest<A>] * value;
    }
  }
}

// The gradient from its sums: for one row, COUNT columns, as many of them at a time as 16 bytes hold.
template <int COUNT, typename T, typename A>
__device__ __forceinline__ void finish(const Combination<T>& in, const Weights<A>& weights, int sample, int row,
    int64_t column, const Pack<A, COUNT>& sums) {
  constexpr int kStored = COUNT < kWidest<A> ? COUNT : kWidest<A>;
  const Pack<T, COUNT> own = read_columns<COUNT>(in, sample, column);
  const A scale = weights.scale[row], shift = weights.shift[row];
  A* to = in.gradient + sample * in.width + column;
#pragma unroll
  for (int e = 0; e < COUNT; e += kStored) {
    Pack<A, kStored> stored;
#pragma unroll
    for (int f = 0; f < kStored; ++f) {
      stored.value[f] = scale * (sums.value[e + f] - shift * element<A>(own, e + f));
    }
    store_pack(stored, to + e);
  }
}

template <int WIDTH, typename T>
__device__ __forceinline__ void clear(const Combination<T>& in, int sample) {
  using A = typename accumulator<T>::type;
  constexpr int kStored = WIDTH < kWidest<A> ? WIDTH : kWidest<A>;
  for (int64_t column = threadIdx.x * kStored; column < in.width; column += kCombineThreads * kStored) {
    store_pack(Pack<A, kStored>{}, in.gradient + sample * in.width + column);
  }
}

// ---- blocks ----

template <typename T, int WIDTH, typename A = typename accumulator<T>::type>
__device__ double small_class(const Combination<T>& in, const Circle& circle, int rank, Weights<A>& weights) {
  constexpr int kColumns = 32 * WIDTH;
  const int64_t first = static_cast<int64_t>(rank) * kRows * kColumns;
  if (rank > 0 && (!in.gradient || first >= in.width)) return 0;
  const double loss = measure(in, circle, 0, weights);
  if (in.gradient) {
    weigh(in, circle, 0, 0, weights);
    __syncthreads();
    const int64_t columns = static_cast<int64_t>(circle.group.size) * kRows * kColumns;
    for (int64_t column = first + threadIdx.x * WIDTH; column < in.width; column += columns) {
      Pack<A, WIDTH> sums[kRows] = {};
      combine<T, WIDTH>(in, weights, 0, circle.group.size, 1, column, sums);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < circle.group.size) finish(in, weights, weights.sample[r], r, column, sums[r]);
      }
    }
  }
  return rank == 0 ? loss : 0;
}

// Each warp ends with the sums of one row over all warps, and finishes it.
template <typename T, int WIDTH, typename A>
__device__ __forceinline__ void exchange(const Combination<T>& in, const Circle& circle, const Weights<A>& weights,
    int tile, int64_t column, const Pack<A, WIDTH> (&sums)[kRows]) {
  constexpr int kPart = WIDTH < kWidest<A> ? WIDTH : kWidest<A>;
  __shared__ Pack<A, kPart> parts[kRows][kRows][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = tile + warp;
#pragma unroll
  for (int e = 0; e < WIDTH; e += kPart) {
    __syncthreads();  // until nobody reads the last ones any more
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int f = 0; f < kPart; ++f) parts[r][warp][lane].value[f] = sums[r].value[e + f];
    }
    __syncthreads();
    if (rank >= circle.group.size || column >= in.width) continue;
    Pack<A, kPart> sum = {};
    for (int w = 0; w < kRows; ++w) {
      const Pack<A, kPart> part = parts[warp][w][lane];
#pragma unroll
      for (int f = 0; f < kPart; ++f) sum.value[f] += part.value[f];
    }
    finish(in, weights, circle.members[rank], warp, column + e, sum);
  }
}

template <typename T, int WIDTH, typename A = typename accumulator<T>::type>
__device__ double large_class(
    const Combination<T>& in, const Circle& circle, const Share& share, int rank, Weights<A>& weights) {
  constexpr int kColumns = 32 * WIDTH;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, size = circle.group.size;
  const int64_t chunks = in.gradient && in.width > 0 ? (in.width + kColumns - 1) / kColumns : 1;
  const int64_t blocks = share.end - share.begin, work = (blocks + kRows - 1) / kRows * chunks;
  const int64_t begin = work * (rank - share.begin) / blocks, end = work * (rank - share.begin + 1) / blocks;
  double loss = 0, own_loss = 0;
  for (int64_t i = begin, known = -1; i < end; ++i) {
    const int64_t column = i % chunks * kColumns + lane * WIDTH;
    const int tile = share.begin + static_cast<int>(i / chunks) * kRows;
    const bool fresh = tile != known;
    known = tile;
    if (fresh) own_loss = measure(in, circle, tile, weights);
    if (i % chunks == 0) loss += own_loss;
    if (!in.gradient) continue;
    Pack<A, WIDTH> sums[kRows] = {};
    for (int from = 0; from < size; from += kMates) {
      if (fresh || size > kMates) {
        __syncthreads();
        weigh(in, circle, tile, from, weights);
        __syncthreads();
      }
      combine<T, WIDTH>(in, weights, warp, size - from < kMates ? size - from : kMates, kRows, column, sums);
    }
    exchange<T, WIDTH>(in, circle, weights, tile, column, sums);
  }
  return loss;
}

// A block for each place in the stretch, as far as its last band reaches.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kCombineThreads, 2)
    combine_kernel(Classes classes, Stretch stretch, int samples, __grid_constant__ const Combination<T> in) {
  using A = typename accumulator<T>::type;
  __shared__ Weights<A> weights;
  const int place = stretch.begin + blockIdx.x;
  const Group group = classes.groups[place];
  const int rank = place - group.first;
  const Share share = share_of(group, stretch);
  if (share.has(rank)) {
    double loss = 0;
    if (group.size > 1) {
      int count = 0;
      for (int i = threadIdx.x; i < classes.parts; i += kCombineThreads) count += classes.counts[i];
      const double weight = 1 / (static_cast<double>(group.size) * group.size * block_sum(count));
      const int64_t products = static_cast<int64_t>(group.first - stretch.begin) * samples;
      const Circle circle = {group, classes.order + group.first, products, samples, weight};
      loss = group.size <= kRows ? small_class<T, WIDTH>(in, circle, rank, weights)
                                 : large_class<T, WIDTH>(in, circle, share, rank, weights);
    } else if (in.gradient) {
      clear<WIDTH>(in, classes.order[place]);
    }
    loss = block_sum(loss);
    if (threadIdx.x == 0) in.partial[place] = loss;
  }
  if (in.loss) fold_in_last_block(in.partial, samples, classes.finished, in.loss);
}

}  // namespace
}  // namespace debiaskd
