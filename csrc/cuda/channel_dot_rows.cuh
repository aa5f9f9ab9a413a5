// The sum over rows, at every place within a row: threads lie along rows, 16 bytes each, and one above the other.
//
// A row of 7×7 positions does not begin at a multiple of 16 bytes. It is read in the pieces that it touches, the first
// and the last of which hold a neighbour's elements, too. Above each other lie only rows that begin at the same place
// within a piece: what a thread sums up in one lane of its register belongs to one place in a row, or to none and is
// dropped. So odd rows cost one more piece and no other arithmetic, and each thread needs one weight a row.
#pragma once

#include "cuda/channel_dot_planes.cuh"

namespace debiaskd {
namespace {

constexpr int kRowThreads = 448;       // shared out without rest among maps of 7, 14, 28 or 56 positions a side
constexpr int kRowRun = 64;            // rows that are added up before a double takes the sum
constexpr int64_t kRowWeights = 2048;  // that a block has at hand

// Rows that a thread loads at once: as many as its registers hold.
template <int WIDTH, bool WEIGHTED>
constexpr int row_unroll = WEIGHTED || WIDTH == 1 ? 4 : 2;

// Sums lie in shared memory, those of a group in order. Gaps keep threads that write at the same time on different
// banks.
template <int WIDTH>
__host__ __device__ constexpr int slot_of(int element) {
  return WIDTH == 1 ? element : element + element / WIDTH;
}

template <typename T>
struct RowSums {
  Sizes sizes;
  Planes<T> a, g;  // g: unless weighted
  Factor weight;
  int64_t tiles, tile;     // of a row, and places in each
  int64_t shares, share;   // of the rows, and rows in each
  int64_t a_turn, g_turn;  // from a thread's row to its next
  int pieces, groups;      // threads of a block: so many along the row, so many above each other
  typename accumulator<T>::type* out;
  double* partial;  // in place of `out` where there are several shares: one after the other
};

template <typename A>
__device__ void load_weights(const Factor& weight, int64_t sample, int64_t first, int count, A* to) {
  __syncthreads();  // until nobody reads the last ones any more
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = weight.at<A>(sample, 0, first + i);
  __syncthreads();
}

// Where a thread is: its piece of a row, of both inputs, or of one and the row's weight.
template <typename T, typename A>
struct Here {
  const T *a, *g;
  const A* weight;
};

// Sums the products of COUNT rows, which are all loaded before any is used, and goes past them.
template <int COUNT, bool WEIGHTED, typename T, int WIDTH, typename A>
__device__ __forceinline__ void add_rows(const RowSums<T>& job, Here<T, A>& here, A (&sum)[WIDTH]) {
  Pack<T, WIDTH> as[COUNT], gs[COUNT];
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    as[u] = load_pack<WIDTH>(here.a);
    here.a += job.a_turn;
    if constexpr (WEIGHTED) continue;
    gs[u] = load_pack<WIDTH>(here.g);
    here.g += job.g_turn;
  }
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    const A weight = WEIGHTED ? *here.weight : A(0);
    if constexpr (WEIGHTED) here.weight += job.groups;
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) sum[v] += element<A>(as[u], v) * (WEIGHTED ? weight : element<A>(gs[u], v));
  }
}

// The same for `count` rows of a thread; doubles take the sums.
template <bool WEIGHTED, int WIDTH, typename T, typename A>
__device__ __forceinline__ void add_rows(const RowSums<T>& job, Here<T, A>& here, int count, double* total) {
  constexpr int kUnroll = row_unroll<WIDTH, WEIGHTED>;
#pragma unroll 1
  for (; count > 0; count -= kRowRun) {
    A sum[WIDTH] = {};
    int left = smaller(count, kRowRun);
#pragma unroll 1
    for (; left >= kUnroll; left -= kUnroll) add_rows<kUnroll, WEIGHTED>(job, here, sum);
#pragma unroll 1
    for (; left > 0; --left) add_rows<1, WEIGHTED>(job, here, sum);
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) total[v] += sum[v];
  }
}

// Where a thread works, and the piece of every row that is its own.
template <int WIDTH>
struct Own {
  int piece, group;
  int shift;  // elements of the group's first piece that lie before the row
  int pitch;  // slots of a group

  __device__ int slot(int group_, int shift_, int v) const {
    return group_ * pitch + slot_of<WIDTH>(piece * WIDTH - shift + v + shift_);
  }
  __device__ bool has(int v, int count) const {
    const int place = piece * WIDTH - shift + v;
    return place >= 0 && place < count;
  }
};

// Adds up what the groups have left, place by place; group 0 has the sums. `row` is the step from a group to the next.
template <int WIDTH>
__device__ void add_groups(const Own<WIDTH>& own, int groups, int64_t row, int count, double* totals) {
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (own.group + half < left) {
      const int shift = WIDTH == 1 ? 0 : static_cast<int>((own.shift + half * row) % WIDTH);
#pragma unroll
      for (int v = 0; v < WIDTH; ++v) {
        if (own.has(v, count)) {
          totals[own.slot(own.group, own.shift, v)] += totals[own.slot(own.group + half, shift, v)];
        }
      }
    }
    left = half;
  }
  __syncthreads();
}

template <typename T, int WIDTH, bool WEIGHTED>
__global__ void __launch_bounds__(kRowThreads, 2) row_sums_kernel(__grid_constant__ const RowSums<T> job) {
  using A = typename accumulator<T>::type;
  DEBIASKD_DYNAMIC_SHARED(double, totals);
  A* const weights = reinterpret_cast<A*>(totals + job.groups * slot_of<WIDTH>(job.pieces * WIDTH));
  const Block at(job.sizes, job.tiles, job.shares);
  const int64_t begin = at.part * job.tile, first = at.share * job.share;
  const int64_t rows = smaller(job.share, job.sizes.rows - first);
  const int count = static_cast<int>(smaller(job.tile, job.sizes.length - begin));
  Own<WIDTH> own = {static_cast<int>(threadIdx.x) % job.pieces, static_cast<int>(threadIdx.x) / job.pieces, 0,
      slot_of<WIDTH>(job.pieces * WIDTH)};
  const int64_t from = job.a.offset(at.sample, at.line, first + own.group) + begin * job.a.step;
  if (WIDTH > 1) own.shift = static_cast<int>(from % WIDTH);
  double* const total = totals + own.slot(own.group, own.shift, 0);
  if (own.group < job.groups) {
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) total[v] = 0;
  }

  const int place = own.piece * WIDTH - own.shift;  // of the piece's first element
  const bool takes_part = own.group < job.groups && place < count && rows > 0;
  Here<T, A> here = {};
  if (takes_part) here.a = job.a.data + from + (WIDTH == 1 ? own.piece * job.a.step : place);
  if constexpr (WEIGHTED) {
    const int64_t stage = kRowWeights / job.groups * job.groups;
    for (int64_t row = 0; row < rows; row += stage) {
      const int staged = static_cast<int>(smaller(stage, rows - row));
      load_weights(job.weight, at.sample, first + row, staged, weights);
      here.weight = weights + own.group;
      if (takes_part) add_rows<true, WIDTH>(job, here, (staged - own.group + job.groups - 1) / job.groups, total);
    }
  } else if (takes_part) {
    here.g = job.g.data + job.g.offset(at.sample, at.line, first + own.group) + begin * job.g.step +
             (WIDTH == 1 ? own.piece * job.g.step : place);
    const int64_t mine = (rows - own.group + job.groups - 1) / job.groups;
    add_rows<false, WIDTH>(job, here, static_cast<int>(mine), total);
  }
  add_groups(own, job.groups, job.a.row, count, totals);

  const int shift = WIDTH == 1 ? 0 : static_cast<int>((job.a.offset(at.sample, at.line, first) + begin) % WIDTH);
  const int64_t out = (at.sample * job.sizes.lines + at.line) * job.sizes.length + begin;
  const int64_t outs = job.sizes.samples * job.sizes.lines * job.sizes.length;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const double sum = totals[slot_of<WIDTH>(i + shift)];
    if (job.partial) {
      job.partial[at.share * outs + out + i] = sum;
    } else {
      job.out[out + i] = static_cast<A>(sum);
    }
  }
}

// out[i] = the sum of what the shares have left for place i: 32 places and 8 threads for each of them a block.
template <typename A>
__global__ void add_shares_kernel(const double* partial, int64_t shares, int64_t outs, A* out) {
  __shared__ double sums[8][32];
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 32 + x;
  double sum = 0;
#pragma unroll 4
  for (int64_t share = y; share < shares; share += 8) {
    if (i < outs) sum += partial[share * outs + i];
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y > 0 || i >= outs) return;
  for (int k = 1; k < 8; ++k) sum += sums[k][x];
  out[i] = static_cast<A>(sum);
}

// ---- on the host ----

// How a row is cut into tiles, and a block's threads over a tile and over rows.
template <typename T>
void cut(const Device& device, int width, RowSums<T>& job) {
  constexpr int64_t kLeastTile = 128, kFewRows = 8, kOwnRows = 4;
  const Sizes& sizes = job.sizes;
  const int64_t shift = width > 1 ? most_shift(job.a) : 0, planes = sizes.samples * sizes.lines;
  int64_t alike = 1;  // rows from one to the next that begins at the same place within a piece
  while (width > 1 && job.a.row * alike % width) alike *= 2;
  const int64_t above = std::max(alike, std::min(sizes.rows, kFewRows));
  const int64_t most = (kRowThreads / above - (shift > 0)) * width;
  job.tiles = ceil_divide(sizes.length, most);
  const auto tile = [&](int64_t tiles) { return ceil_divide(ceil_divide(sizes.length, tiles), width) * width; };
  while (planes * job.tiles < filling(device) && tile(2 * job.tiles) * sizeof(T) >= kLeastTile) job.tiles *= 2;
  job.tile = tile(job.tiles);
  job.tiles = ceil_divide(sizes.length, job.tile);
  job.pieces = static_cast<int>(ceil_divide(std::min(job.tile, sizes.length) + shift, width));
  // With enough blocks a thread has several rows; with few, rows are read side by side.
  const int64_t least = planes * job.tiles < filling(device) ? 1 : kOwnRows;
  const int64_t useful = ceil_divide(std::max<int64_t>(1, ceil_divide(sizes.rows, least)), alike) * alike;
  job.groups = static_cast<int>(std::min(kRowThreads / job.pieces / alike * alike, useful));
  job.a_turn = job.a.row * job.groups, job.g_turn = job.g.row * job.groups;
}

// Rows are cut, too, where blocks are so few, and read so much each, that a second launch takes less time than waiting
// for them.
template <typename T>
void cut_rows(const Device& device, int64_t piece, RowSums<T>& job) {
  constexpr int64_t kLaunch = 128 * 1024;  // bytes that a block reads in the time that a launch costs
  constexpr int64_t kFewRows = 8, kMostShares = 128;
  const int64_t blocks = job.sizes.samples * job.sizes.lines * job.tiles, enough = filling(device) / 2;
  const int64_t turns = job.sizes.rows / (job.groups * kFewRows), read = job.sizes.rows * job.pieces * piece;
  job.shares = 1;
  if (turns > 1 && blocks < enough && read / enough * (enough - blocks) > kLaunch) {
    job.shares = std::min({ceil_divide(filling(device), blocks), turns, kMostShares});
  }
  job.share = std::max<int64_t>(1, ceil_divide(job.sizes.rows, job.shares));
  job.shares = std::max<int64_t>(1, ceil_divide(job.sizes.rows, job.share));
}

template <typename T, int WIDTH>
void sum_rows(const Device& device, Scratch& scratch, bool weighted, RowSums<T>& job) {
  cut(device, WIDTH, job);
  cut_rows(device, WIDTH * sizeof(T) * (weighted ? 1 : 2), job);
  const int64_t planes = job.sizes.samples * job.sizes.lines, outs = planes * job.sizes.length;
  if (job.shares > 1) job.partial = scratch.doubles(job.shares * outs);
  using A = typename accumulator<T>::type;
  const int64_t weights = weighted ? std::min(job.share, kRowWeights) : 0;
  const int64_t shared = job.groups * slot_of<WIDTH>(job.pieces * WIDTH) * sizeof(double) + weights * sizeof(A);
  const Grid grid = {planes * job.tiles * job.shares, threads_for(job.pieces * job.groups, kRowThreads), shared};
  device.launch(grid, weighted ? row_sums_kernel<T, WIDTH, true> : row_sums_kernel<T, WIDTH, false>, job);
  if (job.shares > 1) {
    device.launch(Grid{ceil_divide(outs, 32), 256}, add_shares_kernel<A>, job.partial, job.shares, outs, job.out);
  }
}

}  // namespace
}  // namespace debiaskd
