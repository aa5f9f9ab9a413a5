// The kernels of the exact backdoor adjustment: exponentials scaled by rows, their products, and around these the
// logarithms and gradients with what a product of scaled exponentials cannot hold. One block a row but for products.
#pragma once

#include <cmath>

#include "common/log_range.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

constexpr int kBackdoorThreads = 256;
// Rows and columns of the part of a product that a block computes. Matrices of exponentials have multiples of it, of
// which those beyond the logits are 0: products have no bounds to check, and all of their loads are of 16 bytes.
constexpr int kProductTile = 64;

__host__ __device__ constexpr int64_t padded(int64_t size) {
  return (size + kProductTile - 1) / kProductTile * kProductTile;
}

// ---- exponentials ----

// shift_i = the largest of logs_ij + sign offset_j, and out = exp(logs + sign offset - shift), if there is an out.
template <typename A>
__global__ void __launch_bounds__(kBackdoorThreads)
    scale_rows_kernel(const A* logs, const A* offset, A sign, int64_t rows, int64_t length, A* shift, A* out) {
  const int64_t i = blockIdx.x, count = i < rows ? length : 0;
  const auto value = [&](int64_t j) { return logs[i * length + j] + (offset ? sign * offset[j] : A(0)); };
  A largest = kLowest<A>;
  for (int64_t j = threadIdx.x; j < count; j += blockDim.x) largest = larger(value(j), largest);
  largest = block_max(largest);
  if (threadIdx.x == 0 && i < rows) shift[i] = largest;
  for (int64_t j = threadIdx.x; out && j < padded(length); j += blockDim.x) {
    out[i * padded(length) + j] = j < count ? std::exp(value(j) - largest) : A(0);
  }
}

// out = factor exp(shift_i + offset_j - logs): the factor over a sum of scaled terms. 0 where that was too small, which
// sets *far.
template <typename A>
__global__ void __launch_bounds__(kBackdoorThreads) divide_kernel(
    const A* factor, const A* logs, const A* shift, const A* offset, int64_t rows, int64_t length, A* out, int* far) {
  const int64_t i = blockIdx.x, count = i < rows ? length : 0;
  for (int64_t j = threadIdx.x; j < padded(length); j += blockDim.x) {
    A quotient = 0;
    if (j < count) {
      const A distance = (offset[j] + shift[i]) - logs[i * length + j];
      const bool beyond = distance > kFarthest<A>;
      quotient = factor[i * length + j] * (beyond ? A(0) : std::exp(distance));
      if (beyond) *far = 1;
    }
    out[i * padded(length) + j] = quotient;
  }
}

// ---- products ----

// 16 bytes of a tile's lines and terms that one thread moves to shared memory [terms][lines]. A line's terms lie side
// by side or, ACROSS, a term's lines do.
template <typename A, bool ACROSS>
struct ProductPack {
  static constexpr int kWidth = kWidest<A>, kDepth = 4 * kWidth, kAcross = kProductTile / kWidth;
  static constexpr int kPitch = kProductTile + kWidth;  // columns of 4 threads do not share their banks with all others
  int line = ACROSS ? threadIdx.x % kAcross * kWidth : threadIdx.x / 4;
  int term = ACROSS ? threadIdx.x / kAcross : threadIdx.x % 4 * kWidth;
  Pack<A, kWidth> pack = {};

  __device__ void load(const A* from, int64_t pitch, int64_t first_line, int64_t first_term) {
    const int64_t i = first_line + line, l = first_term + term;
    pack = load_pack<kWidth>(from + (ACROSS ? l * pitch + i : i * pitch + l));
  }
  __device__ void put(A (*to)[kPitch]) const {
    if constexpr (ACROSS) {
      store_shared(pack, &to[term][line]);
    } else {
#pragma unroll
      for (int v = 0; v < kWidth; ++v) to[term + v][line] = pack.value[v];
    }
  }
};

// Lines of length 4 that a thread multiplies.
template <typename A>
__device__ __forceinline__ void load_shared(const A* from, A (&to)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i += kWidest<A>) {
    const Pack<A, kWidest<A>> pack = load_pack<kWidest<A>>(from + i);
#pragma unroll
    for (int v = 0; v < kWidest<A>; ++v) to[i + v] = pack.value[v];
  }
}

// The terms of a tile that a block multiplies, and those that come after them.
template <typename A>
struct ProductTerms {
  using Moved = ProductPack<A, false>;
  A x[2][Moved::kDepth][Moved::kPitch], y[2][Moved::kDepth][Moved::kPitch];
};

template <typename A>
struct Product {
  const A *x, *y;  // padded
  int64_t x_pitch, y_pitch, terms;
  A* out;  // [height, width]
  int64_t height, width;
  bool add;  // to what out holds
};

// out_ij = sum_l x_il y_jl, of x and y or, ACROSS, of their transposes. Each thread sums 4 by 4, in A: no tensor cores,
// no TF32.
template <typename A, bool X_ACROSS, bool Y_ACROSS>
__global__ void __launch_bounds__(kBackdoorThreads) product_kernel(const Product<A> job) {
  using X = ProductPack<A, X_ACROSS>;
  constexpr int kDepth = X::kDepth;
  DEBIASKD_DYNAMIC_SHARED(ProductTerms<A>, shared);
  const unsigned tiles = static_cast<unsigned>(padded(job.width) / kProductTile);
  const int64_t i = static_cast<int64_t>(blockIdx.x / tiles) * kProductTile;
  const int64_t j = static_cast<int64_t>(blockIdx.x % tiles) * kProductTile;
  const int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
  A sums[4][4] = {};
  X x;
  ProductPack<A, Y_ACROSS> y;
  if (job.terms > 0) x.load(job.x, job.x_pitch, i, 0), y.load(job.y, job.y_pitch, j, 0);
  int buffer = 0;
#pragma unroll 1
  for (int64_t term = 0; term < job.terms; term += kDepth) {
    x.put(shared->x[buffer]), y.put(shared->y[buffer]);
    // The one barrier a turn: nobody passes it before all have multiplied what the other buffer held.
    __syncthreads();
    if (term + kDepth < job.terms) {
      x.load(job.x, job.x_pitch, i, term + kDepth), y.load(job.y, job.y_pitch, j, term + kDepth);
    }
#pragma unroll
    for (int l = 0; l < kDepth; ++l) {
      A left[4], right[4];
      load_shared(&shared->x[buffer][l][row], left), load_shared(&shared->y[buffer][l][column], right);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[r][c] += left[r] * right[c];
      }
    }
    buffer ^= 1;
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (i + row + r >= job.height || j + column + c >= job.width) continue;
      A* const to = job.out + (i + row + r) * job.width + j + column + c;
      *to = sums[r][c] + (job.add ? *to : A(0));
    }
  }
}

// ---- logarithms of products ----

// Every lane gets log sum_l exp(x_l + y_l), shifted by its own largest term.
template <typename A>
__device__ A warp_log_sum(const A* x, const A* y, int64_t terms) {
  const int lane = threadIdx.x % 32;
  A largest = kLowest<A>, sum = 0;
  for (int64_t l = lane; l < terms; l += 32) largest = larger(x[l] + y[l], largest);
  largest = warp_max(largest);
  for (int64_t l = lane; l < terms; l += 32) sum += std::exp((x[l] + y[l]) - largest);
  return largest + std::log(warp_sum(sum));
}

// sums -> base + log sum_l exp(x_il + y_jl), of which `sums` holds what scaled terms have made. Those too small are
// added up again, each by a warp.
template <typename A>
__global__ void __launch_bounds__(kBackdoorThreads) log_sums_kernel(
    A* sums, const A* shift, const A* offset, const A* base, int64_t width, const A* x, const A* y, int64_t terms) {
  const int64_t i = blockIdx.x;
  const int lane = threadIdx.x % 32;
  for (int64_t first = threadIdx.x - lane; first < width; first += blockDim.x) {
    const int64_t j = first + lane, at = i * width + j;
    const A sum = j < width ? sums[at] : A(1);
    A result = j < width ? std::log(sum) + (offset[j] + shift[i]) : A(0);
    for (unsigned small = __ballot_sync(kFullWarp, sum < kSmallest<A>); small; small &= small - 1) {
      const int owner = __ffs(static_cast<int>(small)) - 1;
      const A again = warp_log_sum(x + i * terms, y + (first + owner) * terms, terms);
      if (lane == owner) result = again;
    }
    if (j < width) sums[at] = result + (base ? base[at] : A(0));
  }
}

// ---- gradients ----

// A matrix in memory in any order.
template <typename A>
struct Matrix {
  A* data;
  int64_t row, column;

  __device__ A& operator()(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

template <typename A>
struct Gradient {
  Matrix<A> out;
  int64_t length;
  const A* scale;  // padded; null: out is what it is
  A sign;
  const A* base;   // as out lies; null: 0
  const int* far;  // whether there are terms that `divide_kernel` has left out, for any i and j:
  Matrix<const A> factor, logs, x, y;
  const A *shift, *offset;
  int64_t others;
};

// out_il -> base_il + sign (scale_il out_il + sum_j factor_ij exp(x_il + y_jl - logs_ij)), over those j left out.
template <typename A>
__global__ void __launch_bounds__(kBackdoorThreads) gradient_kernel(__grid_constant__ const Gradient<A> job) {
  __shared__ unsigned found[kBackdoorThreads / 32];
  const int64_t i = blockIdx.x;
  for (int64_t l = threadIdx.x; job.scale && l < job.length; l += blockDim.x) {
    A& out = job.out(i, l);
    out = job.sign * (job.scale[i * padded(job.length) + l] * out) + (job.base ? job.base[i * job.length + l] : A(0));
  }
  if (!*job.far) return;
  for (int64_t first = 0; first < job.others; first += blockDim.x) {
    const int64_t own = first + threadIdx.x;
    const bool far = own < job.others && (job.offset[own] + job.shift[i]) - job.logs(i, own) > kFarthest<A>;
    const unsigned lanes = __ballot_sync(kFullWarp, far);
    __syncthreads();  // until nobody reads the last ones any more
    if (threadIdx.x % 32 == 0) found[threadIdx.x / 32] = lanes;
    __syncthreads();
    for (int warp = 0; warp < kBackdoorThreads / 32; ++warp) {
      for (unsigned left = found[warp]; left; left &= left - 1) {
        const int64_t j = first + warp * 32 + __ffs(static_cast<int>(left)) - 1;
        const A factor = job.sign * job.factor(i, j), log_sum = job.logs(i, j);
        if (factor == A(0)) continue;
        for (int64_t l = threadIdx.x; l < job.length; l += blockDim.x) {
          job.out(i, l) += factor * std::exp((job.x(i, l) + job.y(j, l)) - log_sum);
        }
      }
    }
  }
}

}  // namespace
}  // namespace debiaskd
