// Products of the rows of a class, each with each: a Gram matrix for every class, tile by tile.
//
// Small classes are cut into tiles of 8 x 8 products: a thread takes some columns of all 16 rows in 16-byte loads
// straight into registers, multiplies them all, and the block adds up what its threads have. Classes of kLarge members
// or more have tiles of 32 x 32, four times as much arithmetic for each byte; their rows go through shared memory,
// piece by piece, and each warp multiplies a part of every piece.
//
// A class of n has n blocks on each side, which deal its tiles out among them: that takes no agreement between blocks.
#pragma once

#include "cuda/class_relation_groups.cuh"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

constexpr int kGramThreads = 128;
constexpr int kGramWarps = kGramThreads / 32;
constexpr int kLarge = 256;
constexpr double kSmallestSquare = 1e-24;  // of a norm of 1e-12, below which a row has no direction

// The features of one side, and what is kept of them: for each place, the products of its sample with the members of
// its class, by their ranks; 1 / norm of its sample, 0 without a direction.
template <typename X>
struct Side {
  using A = typename accumulator<X>::type;

  const X* data;
  int64_t row_step, step, width;
  A* products;  // [places kept, N]; null: norms are all that is asked for
  A* inverse;   // [N]
};

template <typename X>
struct Sides {
  Side<X> side[2];
};

// `begin` is where a row's element would be, at least 0, or negative where there is no row.
template <int WIDTH, typename X>
__device__ __forceinline__ Pack<X, WIDTH> read(const Side<X>& in, int64_t begin, int64_t column) {
  if (begin < 0 || column >= in.width) return {};
  if constexpr (WIDTH > 1) return load_pack<WIDTH>(in.data + begin + column);
  return {in.data[begin + column * in.step]};
}

template <typename A>
__device__ __forceinline__ A inverse_norm(A square) {
  return square < static_cast<A>(kSmallestSquare) ? A(0) : 1 / std::sqrt(square);  // NaN stays
}

// What a block knows of its class. In shared memory, since registers are for sums.
struct Task {
  Group group;
  const int* members;
  Stretch stretch;
  int samples;
  Share share;
  int rank, side;  // of the block's own member; of tiles
};

// Where the rows of a tile begin, `side` of them from each of two ranks on; -1 for those that there are not.
template <typename X>
__device__ __forceinline__ void find_rows(
    const Side<X>& in, const Task& task, int side, int row, int column, int64_t* begins) {
  __syncthreads();  // until nobody reads an earlier tile's any more
  const int i = threadIdx.x;
  if (i < 2 * side) {
    const int rank = i < side ? row + i : column + i - side;
    begins[i] = rank < task.group.size ? task.members[rank] * in.row_step : -1;
  }
  __syncthreads();
}

template <typename X, typename A>
__device__ __forceinline__ void keep(
    const Side<X>& in, const Task& task, int row, int column, bool mirrored, A product) {
  const Group& group = task.group;
  if (row >= group.size || column >= group.size) return;
  if (row == column) in.inverse[group.first + row] = inverse_norm(product);
  if (!in.products) return;
  const int64_t place = group.first - task.stretch.begin;
  in.products[(place + row) * task.samples + column] = product;
  if (mirrored) in.products[(place + column) * task.samples + row] = product;
}

// ---- tiles in registers ----

// Sums each of COUNT values over a warp. Each lane ends with COUNT / 32 of the sums, or two lanes with one, in the
// order of the lanes, and has made less than two shuffles a value instead of five.
template <int COUNT, int STEP = 16, typename A>
__device__ __forceinline__ void scatter_sums(A* values) {
  if constexpr (COUNT > 1) {
    const bool upper = threadIdx.x & STEP;
#pragma unroll
    for (int i = 0; i < COUNT / 2; ++i) {
      const A sent = upper ? values[i] : values[i + COUNT / 2], kept = upper ? values[i + COUNT / 2] : values[i];
      values[i] = kept + __shfl_xor_sync(kFullWarp, sent, STEP);
    }
  } else {
    values[0] += __shfl_xor_sync(kFullWarp, values[0], STEP);
  }
  if constexpr (STEP > 1) scatter_sums<(COUNT > 1 ? COUNT / 2 : 1), STEP / 2>(values);
}

// SIDE x SIDE products from the ranks `row` and `column` on. BATCH loads of each row are under way at a time.
template <int SIDE, int BATCH, int WIDTH, bool DIAGONAL, typename X>
__device__ __forceinline__ void direct_tile(const Side<X>& in, const Task& task, int row, int column) {
  using A = typename accumulator<X>::type;
  constexpr int kCount = SIDE * SIDE;
  __shared__ int64_t begins[2 * SIDE];
  __shared__ A parts[kGramWarps][kCount];
  find_rows(in, task, SIDE, row, column, begins);
  const volatile int64_t* begin = begins;  // not kept in 4 registers a row
  A sums[kCount] = {};
  for (int64_t from = threadIdx.x * WIDTH; from < in.width; from += BATCH * kGramThreads * WIDTH) {
    Pack<X, WIDTH> x[BATCH][SIDE];
#pragma unroll
    for (int i = 0; i < BATCH * SIDE; ++i) {
      x[i / SIDE][i % SIDE] = read<WIDTH>(in, begin[i % SIDE], from + i / SIDE * kGramThreads * WIDTH);
    }
#pragma unroll
    for (int b = 0; b < BATCH; ++b) {
      Pack<X, WIDTH> y[SIDE];
#pragma unroll
      for (int j = 0; j < SIDE; ++j) {
        y[j] = DIAGONAL || row == column ? x[b][j] : read<WIDTH>(in, begin[SIDE + j], from + b * kGramThreads * WIDTH);
      }
#pragma unroll
      for (int e = 0; e < WIDTH; ++e) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          sums[i] += element<A>(x[b][i / SIDE], e) * element<A>(y[i % SIDE], e);
        }
      }
    }
  }
  scatter_sums<kCount>(sums);
  constexpr int kOwn = kCount > 32 ? kCount / 32 : 1;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) parts[threadIdx.x / 32][lane * kCount / 32 + i] = sums[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kCount; i += kGramThreads) {
    A sum = 0;
    for (int w = 0; w < kGramWarps; ++w) sum += parts[w][i];
    keep(in, task, row + i / SIDE, column + i % SIDE, task.stretch.only && row != column, sum);
  }
}

// ---- tiles through shared memory ----

constexpr int kStagedSide = 32;

template <typename A>
struct alignas(16) Stage {
  static constexpr int kWidest = 16 / sizeof(A);
  static constexpr int kPiece = 128 / sizeof(A);          // of a row
  static constexpr int kStride = kPiece + kWidest;        // the same columns of eight rows lie in different banks
  static constexpr int kWarpPiece = kPiece / kGramWarps;  // of a piece: what one warp multiplies

  A rows[2 * kStagedSide * kStride];
};

// A thread's 8 x 4 products: rows 4 apart, columns 8 apart, so that a warp has all of a tile.
template <typename A>
__device__ __forceinline__ void multiply(const Stage<A>& stage, A (&sums)[32]) {
  constexpr int kWidest = Stage<A>::kWidest, kStride = Stage<A>::kStride;
  const int lane = threadIdx.x % 32, begin = threadIdx.x / 32 * Stage<A>::kWarpPiece;
  const A* x = stage.rows + lane / 8 * kStride + begin;
  const A* y = stage.rows + (kStagedSide + lane % 8) * kStride + begin;
#pragma unroll
  for (int k = 0; k < Stage<A>::kWarpPiece; k += kWidest) {
    Pack<A, kWidest> a[8], b[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = load_pack<kWidest>(x + 4 * i * kStride + k);
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = load_pack<kWidest>(y + 8 * j * kStride + k);
#pragma unroll
    for (int e = 0; e < kWidest; ++e) {
#pragma unroll
      for (int i = 0; i < 32; ++i) sums[i] += a[i / 4].value[e] * b[i % 4].value[e];
    }
  }
}

template <int WIDTH, typename X>
__device__ __forceinline__ void staged_tile(const Side<X>& in, const Task& task, int row, int column) {
  using A = typename accumulator<X>::type;
  using S = Stage<A>;
  constexpr int kPacks = S::kPiece / WIDTH, kLoads = 2 * kStagedSide * kPacks / kGramThreads;
  __shared__ int64_t begins[2 * kStagedSide];
  __shared__ S stage;
  __shared__ A tile[kStagedSide * kStagedSide];
  find_rows(in, task, kStagedSide, row, column, begins);
  const volatile int64_t* begin = begins;
  A sums[32] = {};
  Pack<X, WIDTH> next[kLoads];
  const auto read_piece = [&](int64_t from) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int pack = i * kGramThreads + threadIdx.x;
      next[i] = read<WIDTH>(in, begin[pack / kPacks], from + pack % kPacks * WIDTH);
    }
  };
  read_piece(0);
  for (int64_t from = 0; from < in.width; from += S::kPiece) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int pack = i * kGramThreads + threadIdx.x;
      A* to = stage.rows + pack / kPacks * S::kStride + pack % kPacks * WIDTH;
      constexpr int kStored = WIDTH < S::kWidest ? WIDTH : S::kWidest;
#pragma unroll
      for (int e = 0; e < WIDTH; e += kStored) {
        Pack<A, kStored> wide;
#pragma unroll
        for (int f = 0; f < kStored; ++f) wide.value[f] = static_cast<A>(next[i].value[e + f]);
        store_shared(wide, to + e);
      }
    }
    __syncthreads();
    read_piece(from + S::kPiece);  // while the other is multiplied
    multiply(stage, sums);
  }
  const int lane = threadIdx.x % 32;
  for (int warp = 0; warp < kGramWarps; ++warp) {
    if (threadIdx.x / 32 == warp) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        A& at = tile[(lane / 8 + i / 4 * 4) * kStagedSide + lane % 8 + i % 4 * 8];
        at = warp == 0 ? sums[i] : at + sums[i];
      }
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kStagedSide * kStagedSide; i += kGramThreads) {
    keep(in, task, row + i / kStagedSide, column + i % kStagedSide, task.stretch.only && row != column, tile[i]);
  }
}

// ---- the launch ----

template <typename A>
__device__ __forceinline__ int tile_side(int size) {
  return size >= kLarge ? kStagedSide : sizeof(A) == 8 || size <= 4 ? 4 : 8;
}

template <int WIDTH, typename X>
__device__ __forceinline__ void tile(const Side<X>& in, const Task& task, int side, int row, int column) {
  if (side == kStagedSide) return staged_tile<WIDTH>(in, task, row, column);
  if constexpr (sizeof(typename accumulator<X>::type) == 8) {
    direct_tile<4, 2, WIDTH, false>(in, task, row, column);
  } else {
    if (side == 4) return direct_tile<4, (WIDTH > 4 ? 2 : 4), WIDTH, true>(in, task, row, column);
    direct_tile<8, 1, WIDTH, false>(in, task, row, column);
  }
}

// A block for each place in the stretch, as far as its last band reaches, and so for each side. With labels, which
// there are where there is one stretch, blocks belong to samples instead.
template <typename X, int WIDTH>
__global__ void __launch_bounds__(kGramThreads, sizeof(X) == 8 ? 2 : 3) gram_kernel(Labels labels, Classes classes,
    Stretch stretch, __grid_constant__ const Sides<X> sides, int blocks, bool remembers) {
  const bool second = blockIdx.x >= blocks;
  const int index = blockIdx.x - (second ? blocks : 0);
  const Side<X> in = second ? sides.side[1] : sides.side[0];
  Member own;
  if (labels.data) {
    own = find_member<kGramThreads>(labels, index);
    if (remembers && !second && threadIdx.x == 0) remember(classes, own, index);
  } else {
    const int place = stretch.begin + index;
    own.group = classes.groups[place];
    own.rank = place - own.group.first;
    own.members = classes.order + own.group.first;
  }
  const Share share = share_of(own.group, stretch);
  if (own.group.size < 2 || !share.has(own.rank)) return;
  __shared__ Task task;
  const int side = tile_side<typename Side<X>::A>(own.group.size);
  if (threadIdx.x == 0) task = {own.group, own.members, stretch, labels.samples, share, own.rank, side};
  __syncthreads();
  for (int64_t i = task.rank - task.share.begin;; i += task.share.end - task.share.begin) {
    // Tile (i, j) is also (j, i), unless one of the two lies outside of the stretch. Counting from the diagonal on,
    // around the end, up to half of the tiles in each row of tiles are each of those pairs once; with an even number,
    // the last ones twice.
    const int across = (task.group.size + task.side - 1) / task.side;
    const int down = (task.share.end - task.share.begin + task.side - 1) / task.side;
    const int offset = static_cast<int>(i / down), row = task.share.begin / task.side + static_cast<int>(i % down);
    if (offset >= (!in.products ? 1 : task.stretch.only ? across / 2 + 1 : across)) break;
    if (task.stretch.only && 2 * offset == across && 2 * row >= across) continue;
    const int column = row + offset < across ? row + offset : row + offset - across;
    tile<WIDTH>(in, task, task.side, row * task.side, column * task.side);
  }
}

}  // namespace
}  // namespace debiaskd
