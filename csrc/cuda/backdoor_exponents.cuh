// Matrices of exponentials of which only the logarithms lie in memory, in any strides.
#pragma once

#include <cmath>

#include "common/log_range.h"
#include "cuda/reduce.cuh"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

// Elements of 16 bytes.
template <typename A>
using Wide = Pack<A, kWidest<A>>;

// Without data: 0 everywhere.
template <typename A>
struct Matrix {
  const A* data = nullptr;
  int64_t row = 0, column = 0;
  bool wide = true;  // rows can be read 16 bytes at a time

  Matrix() = default;
  explicit Matrix(const Tensor& tensor)
      : data(static_cast<const A*>(tensor.data_ptr())), row(tensor.stride(0)), column(tensor.stride(1)) {
    wide = column == 1 && row % kWidest<A> == 0 && is_aligned(data);
  }

  __device__ const A* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
};

// exp(plus - minus + sign * rows + columns) * factor
template <typename A>
struct Exponents {
  int64_t height, width;
  Matrix<A> plus, minus, factor = {};  // without factor: 1, and nothing is larger than about 1
  const A* rows = nullptr;             // one number for each row
  A sign = 1;
  const A* columns = nullptr;  // one for each column, 16-byte aligned; null: 0
};

// How many of the elements that a pack would hold there are.
template <typename A>
__device__ __forceinline__ int inside(int64_t height, int64_t width, int64_t row, int64_t column) {
  const int64_t left = row < height ? width - column : 0;
  return left >= kWidest<A> ? kWidest<A> : left > 0 ? static_cast<int>(left) : 0;
}

// The first `count` of them, and `other` in place of the rest.
template <typename A>
__device__ __forceinline__ Wide<A> read(const A* from, int64_t step, bool wide, int count, A other = 0) {
  if (wide && count == kWidest<A>) return load_pack<kWidest<A>>(from);
  Wide<A> pack;
#pragma unroll
  for (int i = 0; i < kWidest<A>; ++i, from += step) pack.value[i] = i < count ? *from : other;
  return pack;
}

template <typename A>
__device__ __forceinline__ Wide<A> read(const Matrix<A>& of, int64_t row, int64_t column, int count) {
  return of.data ? read(of.at(row, column), of.column, of.wide, count) : Wide<A>{};
}

// plus - minus; -inf outside.
template <typename A>
__device__ __forceinline__ Wide<A> unshifted(const Exponents<A>& of, int64_t row, int64_t column, int count) {
  const Wide<A> plus = read(of.plus, row, column, count);
  const Wide<A> minus = read(of.minus, row, column, count);
  Wide<A> result;
#pragma unroll
  for (int i = 0; i < kWidest<A>; ++i) result.value[i] = i < count ? plus.value[i] - minus.value[i] : -INFINITY;
  return result;
}

// What exponentials are taken of, rounded as in every other place.
template <typename A>
__device__ __forceinline__ Wide<A> shifted(
    const Exponents<A>& of, const Wide<A>& logs, int64_t row, int64_t column, int count) {
  Wide<A> result = logs;
#pragma unroll
  for (int i = 0; i < kWidest<A>; ++i) {
    if (i >= count) continue;
    if (of.columns) result.value[i] += of.columns[column + i];
    result.value[i] += of.sign * of.rows[row];
  }
  return result;
}

// Into a contiguous matrix that is aligned.
template <typename A>
__device__ __forceinline__ void write(
    const Wide<A>& pack, A* to, int64_t row, int64_t column, int64_t width, int count) {
  to += row * width + column;
  if (width % kWidest<A> == 0 && count) return store_pack(pack, to);
#pragma unroll
  for (int i = 0; i < kWidest<A>; ++i) {
    if (i < count) to[i] = pack.value[i];
  }
}

// ---- row maxima ----

constexpr int kThreads = 256;

// out[i] = the largest of row i of plus - minus, finite
template <typename A>
struct Maxima {
  Matrix<A> plus = {}, minus = {};
  int64_t rows = 0, length = 0;
  A* out = nullptr;
};

// The largest in a group of neighbouring lanes: a power of 2 of them.
template <typename A>
__device__ __forceinline__ A largest_of_lanes(A value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    const A other = __shfl_xor_sync(kFullWarp, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// A warp takes every `step`-th row from `row` on.
template <typename A>
__device__ void find_maxima(const Maxima<A>& of, int64_t row, int64_t end, int64_t step) {
  const int lane = threadIdx.x % 32;
  for (; row < end; row += step) {
    A largest = kLowest<A>;
    for (int64_t column = lane * kWidest<A>; column < of.length; column += 32 * kWidest<A>) {
      const int count = inside<A>(of.rows, of.length, row, column);
      const Wide<A> plus = read(of.plus, row, column, count);
      const Wide<A> minus = read(of.minus, row, column, count);
#pragma unroll
      for (int i = 0; i < kWidest<A>; ++i) {
        const A value = plus.value[i] - minus.value[i];
        if (i < count && value > largest) largest = value;
      }
    }
    largest = largest_of_lanes(largest, 32);
    if (lane == 0) of.out[row] = largest;
  }
}

// Of the rows [first, first + count), those that there are. Blocks that share a row write the same number.
template <typename A>
__device__ __forceinline__ void find_maxima_of_block(const Maxima<A>& of, int64_t first, int64_t count) {
  const int64_t end = of.rows - first < count ? of.rows : first + count;
  find_maxima(of, first + threadIdx.x / 32, end, kThreads / 32);
}

template <typename A>
struct AllMaxima {
  Maxima<A> of[3];  // without rows: none
};

template <typename A>
__global__ void __launch_bounds__(kThreads) maxima_kernel(__grid_constant__ const AllMaxima<A> all) {
  constexpr int kWarps = kThreads / 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (const Maxima<A>& of : all.of) find_maxima(of, warp, of.rows, static_cast<int64_t>(gridDim.x) * kWarps);
}

}  // namespace
}  // namespace debiaskd
