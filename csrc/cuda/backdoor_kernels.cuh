// The two kernels of the exact backdoor adjustment: the logarithm of a product, and a scaled sum of products. The
// letters are those of backdoor.cu.
#pragma once

#include "cuda/backdoor_far.cuh"

namespace debiaskd {
namespace {

// Blocks at a time on a multiprocessor, which its registers have to do for: what one waits for, the other makes up for.
template <typename A>
constexpr int kBlocks = sizeof(A) == 4 ? 2 : 1;

// The matrices, as the loops over them know them.
constexpr int kP = kPlus, kQ = kPlus, kW = kPlus | kMinus | kColumns;
constexpr int kG = kPlus | kMinus | kFactor, kH = kMinus | kFactor | kColumns;

// ---- forward ----

// out = log(product) + rows + columns + base
template <typename A>
struct LogProduct {
  Product<A> product;
  int64_t height, width;
  A* out;
  const A *rows, *columns = nullptr;  // columns: null: 0
  Matrix<A> base = {};
  Maxima<A> of_rows = {}, of_columns = {};  // which each block finds for itself, if any
  // S: parts [height, tiles in a row] get the largest prior - out + columns of a tile's share of each row. T: null.
  Matrix<A> prior = {};
  A* parts = nullptr;
};

template <typename A, int TILE>
__global__ void __launch_bounds__(kThreads, kBlocks<A>) log_product_kernel(__grid_constant__ const LogProduct<A> job) {
  using T = Tiling<A, TILE>;
  DEBIASKD_DYNAMIC_SHARED(typename T::Shared, shared);
  const Tile<A, TILE> tile(blockIdx.x, job.width);
  find_maxima_of_block(job.of_rows, tile.row(), TILE);
  find_maxima_of_block(job.of_columns, tile.column(), TILE);
  __syncthreads();
  typename T::Sums sums = {};
  if (job.parts) {
    add_terms<A, TILE, kP, kQ>(job.product, tile, *shared, sums);
  } else {
    add_terms<A, TILE, kW, kQ | kTransposed>(job.product, tile, *shared, sums);
  }
  gather<A, TILE>(sums, *shared);

  unsigned small = 0;  // bits: sums too small
#pragma unroll
  for (int p = 0; p < T::kPacks; ++p) {
    const int count = inside<A>(job.height, job.width, tile.row() + tile.line(p), tile.column() + tile.place());
#pragma unroll
    for (int i = 0; i < kWidest<A>; ++i) {
      const bool too_small = i < count && shared->sums[tile.line(p)][tile.place() + i] < kSmallest<A>;
      small |= (too_small ? 1u : 0u) << (p * kWidest<A> + i);
    }
  }
  if (block_any(small != 0)) add_again<A, TILE>(job.product, tile, small, *shared);

#pragma unroll
  for (int p = 0; p < T::kPacks; ++p) {
    const int64_t row = tile.row() + tile.line(p), column = tile.column() + tile.place();
    const int count = inside<A>(job.height, job.width, row, column);
    const Wide<A> sum = load_pack<kWidest<A>>(&shared->sums[tile.line(p)][tile.place()]);
    Wide<A> out;
    const Wide<A> base = read(job.base, row, column, count);
    const Wide<A> prior = read(job.prior, row, column, count);
    A largest = kLowest<A>;
#pragma unroll
    for (int i = 0; i < kWidest<A>; ++i) {
      if (i >= count) continue;
      const A of_column = job.columns ? job.columns[column + i] : A(0);
      const bool done = small >> (p * kWidest<A> + i) & 1;
      const A log_sum = done ? sum.value[i] : std::log(sum.value[i]) + (of_column + job.rows[row]);
      out.value[i] = base.value[i] + log_sum;
      const A evidence = prior.value[i] - out.value[i] + of_column;
      largest = evidence > largest ? evidence : largest;
    }
    write(out, job.out, row, column, job.width, count);
    if (!job.parts) continue;
    largest = largest_of_lanes(largest, T::kLanes);
    if (count && tile.place() == 0) job.parts[row * ((job.width + TILE - 1) / TILE) + tile.across] = largest;
  }
}

// ---- backward ----

// out = base + sign * scale * (the sum of the products)
template <typename A>
struct ScaledSum {
  Product<A> products[2];
  int count;
  Exponents<A> scale;
  A* out;
  A sign = 1;
  Matrix<A> base = {};
};

// -h alone, or the gradient of the feature's logits and, in tiles that come after, that of the contexts'.
template <typename A>
struct ScaledSums {
  bool of_norm;
  ScaledSum<A> sums[2] = {};
  unsigned first = 0;  // tiles
  Maxima<A> of_rows[2] = {}, of_columns = {};
};

template <typename A, int TILE>
__global__ void __launch_bounds__(kThreads, kBlocks<A>) scaled_sum_kernel(__grid_constant__ const ScaledSums<A> jobs) {
  using T = Tiling<A, TILE>;
  DEBIASKD_DYNAMIC_SHARED(typename T::Shared, shared);
  const bool second = blockIdx.x >= jobs.first;
  const ScaledSum<A>& job = jobs.sums[second];
  const Tile<A, TILE> tile(second ? blockIdx.x - jobs.first : blockIdx.x, job.scale.width);
  for (const Maxima<A>& of : jobs.of_rows) find_maxima_of_block(of, tile.row(), TILE);
  find_maxima_of_block(jobs.of_columns, tile.column(), TILE);
  if (threadIdx.x == 0) shared->far = false;
  __syncthreads();
  typename T::Sums sums = {};
  // Parameters at places that are known to the compiler cost these loops no registers.
  if (second) {
    const Product<A>* products = jobs.sums[1].products;
    add_terms<A, TILE, kW | kTransposed, kG | kTransposed>(products[0], tile, *shared, sums);
    add_terms<A, TILE, kH | kTransposed, kP | kTransposed>(products[1], tile, *shared, sums);
  } else if (jobs.of_norm) {
    add_terms<A, TILE, kG, kQ>(jobs.sums[0].products[0], tile, *shared, sums);
  } else {
    add_terms<A, TILE, kH, kQ | kTransposed>(jobs.sums[0].products[0], tile, *shared, sums);
  }
  gather<A, TILE>(sums, *shared);

  typename T::Results results;
#pragma unroll
  for (int p = 0; p < T::kPacks; ++p) {
    const int64_t row = tile.row() + tile.line(p), column = tile.column() + tile.place();
    const int count = inside<A>(job.scale.height, job.scale.width, row, column);
    const Wide<A> logs = unshifted(job.scale, row, column, count);
    const Wide<A> scale = shifted(job.scale, logs, row, column, count);
#pragma unroll
    for (int i = 0; i < kWidest<A>; ++i) {
      results[p].value[i] = shared->sums[tile.line(p)][tile.place() + i] * std::exp(scale.value[i]);
    }
  }
  if (shared->far) {
#pragma unroll 1
    for (int i = 0; i < job.count; ++i) add_far<A, TILE>(job.products[i], tile, job.scale, *shared, results);
  }
#pragma unroll
  for (int p = 0; p < T::kPacks; ++p) {
    const int64_t row = tile.row() + tile.line(p), column = tile.column() + tile.place();
    const int count = inside<A>(job.scale.height, job.scale.width, row, column);
    const Wide<A> base = read(job.base, row, column, count);
#pragma unroll
    for (int i = 0; i < kWidest<A>; ++i) {
      results[p].value[i] = base.value[i] + job.sign * results[p].value[i];
    }
    write(results[p], job.out, row, column, job.scale.width, count);
  }
}

}  // namespace
}  // namespace debiaskd
