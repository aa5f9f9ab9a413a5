// The sum along each row: a team of threads a row, 16 bytes each, from a few lanes of a warp to a whole block.
//
// As in channel_dot_rows.cuh, a row that does not begin at a multiple of 16 bytes is read in the pieces that it
// touches; what a neighbour owns of the first and the last is masked. A team that reads a row of few pieces at once
// goes on to rows that begin at the same place within a piece, so that its weights stay in registers.
#pragma once

#include "cuda/channel_dot_planes.cuh"
#include "cuda/reduce.cuh"

namespace debiaskd {
namespace {

constexpr int kAlongThreads = 256;

// Pieces that a thread loads at once: as many as its registers hold.
template <int WIDTH, bool WEIGHTED>
constexpr int along_unroll = WEIGHTED || WIDTH == 1 || WIDTH == 4 ? 4 : 2;

// Elements of a row that are added up, by all lanes, before doubles take the sums: weights for so many are at hand.
template <typename A>
constexpr int kAlongRun = sizeof(A) == 4 ? 4096 : 2048;

template <typename T>
struct AlongSums {
  Sizes sizes;
  Planes<T> a, g;  // g: unless weighted
  Factor weight;
  int team;               // threads a row: 32 or a power of 2 below it, or all of a block
  int64_t pieces;         // that a row touches, at most
  int64_t chunks, chunk;  // of a plane's rows, and rows in each
  int64_t shares, share;  // of a row, and pieces in each
  typename accumulator<T>::type* out;
  double* partial;  // in place of `out` where there are several shares: a row's side by side
};

// Every lane of a team gets the team's sums. All lanes of the warp must take part.
template <typename A, int COUNT>
__device__ __forceinline__ void lanes_sum(A (&values)[COUNT], int team) {
  for (int step = team / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) values[i] += __shfl_xor_sync(kFullWarp, values[i], step);
  }
}

// Products of two pieces' elements, or of one's and weights, from `low` up to `high`.
template <typename T, int WIDTH, typename A, typename Other>
__device__ __forceinline__ A piece_sum(const Pack<T, WIDTH>& a, Other&& other, int low, int high) {
  A sum = 0;
#pragma unroll
  for (int v = 0; v < WIDTH; ++v) {
    if (v >= low && v < high) sum += element<A>(a, v) * other(v);
  }
  return sum;
}

// ---- rows that a team reads at once ----

template <typename T, int WIDTH, bool WEIGHTED>
__global__ void __launch_bounds__(kAlongThreads, 3) short_sums_kernel(__grid_constant__ const AlongSums<T> job) {
  using A = typename accumulator<T>::type;
  const Block at(job.sizes, job.chunks, 1);
  const int lane = threadIdx.x % job.team, teams = static_cast<int>(blockDim.x) / job.team;
  const int64_t first = at.part * job.chunk + threadIdx.x / job.team;
  const int64_t end = smaller((at.part + 1) * job.chunk, job.sizes.rows);
  const int64_t from = job.a.offset(at.sample, at.line, first);
  const int place = lane * WIDTH - static_cast<int>(from % WIDTH);  // of the piece's first element
  const int low = -place, high = static_cast<int>(job.sizes.length) - place;
  const T* a = job.a.data + from + place;
  const T* g = nullptr;
  A weights[WEIGHTED ? WIDTH : 1] = {};
  if constexpr (WEIGHTED) {
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) {
      if (v >= low && v < high) weights[v] = job.weight.template at<A>(at.sample, 0, place + v);
    }
  } else {
    g = job.g.data + job.g.offset(at.sample, at.line, first) + place;
  }
  const int64_t a_step = teams * job.a.row, g_step = teams * job.g.row;
  A* const out = job.out + (at.sample * job.sizes.lines + at.line) * job.sizes.rows;

  constexpr int kUnroll = along_unroll<WIDTH, WEIGHTED>;
  const int64_t turn = kUnroll * teams, turns = (end - at.part * job.chunk + turn - 1) / turn;
  for (int64_t i = 0, row = first; i < turns; ++i, row += turn) {  // all lanes of a warp take part in its sums
    Pack<T, WIDTH> as[kUnroll], gs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (row + u * teams >= end || high <= 0) continue;
      as[u] = load_pack<WIDTH>(a + u * a_step);
      if constexpr (!WEIGHTED) gs[u] = load_pack<WIDTH>(g + u * g_step);
    }
    a += kUnroll * a_step;
    if constexpr (!WEIGHTED) g += kUnroll * g_step;
    A sums[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const auto other = [&](int v) { return WEIGHTED ? weights[v] : element<A>(gs[u], v); };
      sums[u] = piece_sum<T, WIDTH, A>(as[u], other, low, high);
    }
    lanes_sum(sums, job.team);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lane == 0 && row + u * teams < end) out[row + u * teams] = sums[u];
    }
  }
}

// ---- rows of any length ----

// Weights of elements `first - WIDTH` to `first + run` of a row, 0 where it has none. Gaps keep lanes, which read at a
// step of WIDTH, on different banks.
template <typename T, int WIDTH>
class NearWeights {
 public:
  using A = typename accumulator<T>::type;
  static constexpr int kCount = kAlongRun<A> + WIDTH;
  static constexpr int kSize = WIDTH == 1 ? kCount : kCount + kCount / WIDTH;

  __device__ explicit NearWeights(A* memory) : memory_(memory) {}

  __device__ void load(const Factor& weight, int64_t sample, int64_t first, int64_t length) const {
    __syncthreads();  // until nobody reads the last ones any more
    for (int i = threadIdx.x; i < kCount; i += blockDim.x) {
      const int64_t element = first - WIDTH + i;
      memory_[slot(i)] = element >= 0 && element < length ? weight.at<A>(sample, 0, element) : A(0);
    }
    __syncthreads();
  }

  __device__ A operator[](int i) const { return memory_[slot(i + WIDTH)]; }  // from `first` on

 private:
  __device__ static int slot(int i) { return WIDTH == 1 ? i : i + i / WIDTH; }

  A* memory_;
};

// One thread's share of a run. Element 0 of the run's first piece lies at `a`; the row owns `low` up to `high`.
template <typename T, int WIDTH, bool WEIGHTED, typename A>
__device__ __forceinline__ A run_sum(
    const T* a, const T* g, const NearWeights<T, WIDTH>& weights, int shift, int team, int low, int high) {
  constexpr int kUnroll = along_unroll<WIDTH, WEIGHTED>;
  A sum[kUnroll] = {};
  const int pieces = (high + WIDTH - 1) / WIDTH;
#pragma unroll 1
  for (int piece = threadIdx.x % team; piece < pieces; piece += kUnroll * team) {
    Pack<T, WIDTH> as[kUnroll], gs[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int first = (piece + u * team) * WIDTH;
      if (first >= high) continue;
      as[u] = load_pack<WIDTH>(a + first);
      if constexpr (!WEIGHTED) gs[u] = load_pack<WIDTH>(g + first);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int first = (piece + u * team) * WIDTH;
      if (first >= high) continue;
      const auto other = [&](int v) {
        if constexpr (WEIGHTED) return weights[first - shift + v];
        return element<A>(gs[u], v);
      };
      sum[u] += piece_sum<T, WIDTH, A>(as[u], other, low - first, high - first);
    }
  }
  A total = 0;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) total += sum[u];
  return total;
}

template <typename T, int WIDTH, bool WEIGHTED>
__global__ void __launch_bounds__(kAlongThreads, 3) long_sums_kernel(__grid_constant__ const AlongSums<T> job) {
  using A = typename accumulator<T>::type;
  constexpr int kPieces = kAlongRun<A> / WIDTH;
  __shared__ A memory[WEIGHTED ? NearWeights<T, WIDTH>::kSize : 1];
  const NearWeights<T, WIDTH> weights(memory);
  const Block at(job.sizes, job.chunks, job.shares);
  const int lane = threadIdx.x % job.team, teams = static_cast<int>(blockDim.x) / job.team;
  const int64_t first = at.part * job.chunk, end = smaller(first + job.chunk, job.sizes.rows);
  const int64_t begin = at.share * job.share, stop = smaller(begin + job.share, job.pieces);
  int64_t at_hand = -1;
  for (int64_t rows = first; rows < end; rows += teams) {
    const int64_t row = rows + threadIdx.x / job.team;
    const int64_t from = job.a.offset(at.sample, at.line, row);
    const int shift = WIDTH == 1 ? 0 : static_cast<int>(from % WIDTH);
    double total = 0;
    for (int64_t piece = begin; piece < stop; piece += kPieces) {
      if (WEIGHTED && piece != at_hand) weights.load(job.weight, at.sample, piece * WIDTH, job.sizes.length);
      at_hand = piece;
      if (row >= end) continue;
      const int64_t left = smaller(smaller(piece + kPieces, stop) * WIDTH, job.sizes.length + shift) - piece * WIDTH;
      const int64_t skipped = piece * WIDTH - shift;
      const T* a = job.a.data + from + skipped;
      const T* g = nullptr;
      if constexpr (!WEIGHTED) g = job.g.data + job.g.offset(at.sample, at.line, row) + skipped;
      total += run_sum<T, WIDTH, WEIGHTED, A>(
          a, g, weights, shift, job.team, piece == 0 ? shift : 0, static_cast<int>(left));
    }
    if (job.team > 32) {
      total = block_sum(total);
    } else {
      A sum[] = {static_cast<A>(total)};
      lanes_sum(sum, job.team);
      total = sum[0];
    }
    if (lane > 0 || row >= end) continue;
    const int64_t out = (at.sample * job.sizes.lines + at.line) * job.sizes.rows + row;
    if (job.partial) {
      job.partial[out * job.shares + at.share] = total;
    } else {
      job.out[out] = static_cast<A>(total);
    }
  }
}

// ---- on the host ----

inline int team_for(int64_t pieces) {
  int team = 1;
  while (team < 32 && team < pieces) team *= 2;
  return team;
}

// Rows of a block: so many that blocks, `wanted` of them, have something to do; then whole turns of its teams.
template <typename T>
int cut_rows(int64_t wanted, int64_t turns, AlongSums<T>& job) {
  const int64_t teams = kAlongThreads / job.team, planes = job.sizes.samples * job.sizes.lines;
  job.chunks = std::min(ceil_divide(wanted, planes * job.shares), ceil_divide(job.sizes.rows, teams * turns));
  job.chunk = ceil_divide(job.sizes.rows, job.chunks);
  if (job.chunk > teams) job.chunk = ceil_divide(job.chunk, teams) * teams;
  job.chunks = ceil_divide(job.sizes.rows, job.chunk);
  return threads_for(job.chunk * job.team, kAlongThreads);
}

// Few rows get a block each, and very few are cut into shares.
template <typename T>
int cut_long(const Device& device, bool weighted, AlongSums<T>& job) {
  constexpr int64_t kTurns = 4, kMostShares = 1024;
  const int64_t rows = job.sizes.samples * job.sizes.lines * job.sizes.rows;
  if (rows < 4 * filling(device) && job.pieces > 64) job.team = kAlongThreads;
  const int64_t turns = job.pieces / (kAlongThreads * kTurns);
  if (rows < filling(device) && turns > 1) {
    job.shares = std::min({ceil_divide(2 * filling(device), rows), turns, kMostShares});
  }
  job.share = ceil_divide(job.pieces, job.shares);
  job.shares = ceil_divide(job.pieces, job.share);
  return cut_rows(filling(device) * (weighted ? 2 : 8), 1, job);
}

template <typename T, int WIDTH>
void sum_along(const Device& device, Scratch& scratch, bool weighted, AlongSums<T>& job) {
  if (!weighted) merge_samples(job.sizes, job.a, job.g);
  job.pieces = ceil_divide(job.sizes.length + (WIDTH > 1 ? most_shift(job.a) : 0), WIDTH);
  job.team = team_for(job.pieces);
  job.shares = 1;
  const int64_t planes = job.sizes.samples * job.sizes.lines;
  if constexpr (WIDTH > 1) {
    if (job.pieces <= 32) {
      const int threads = cut_rows(16 * filling(device), weighted ? 8 : 4, job);
      const auto kernel = weighted ? short_sums_kernel<T, WIDTH, true> : short_sums_kernel<T, WIDTH, false>;
      return device.launch(Grid{planes * job.chunks, threads}, kernel, job);
    }
  }
  const int threads = cut_long(device, weighted, job);
  if (job.shares > 1) job.partial = scratch.doubles(planes * job.sizes.rows * job.shares);
  const auto kernel = weighted ? long_sums_kernel<T, WIDTH, true> : long_sums_kernel<T, WIDTH, false>;
  device.launch(Grid{planes * job.chunks * job.shares, threads}, kernel, job);
  if (job.shares > 1) fold(device, job.partial, planes * job.sizes.rows, job.shares, job.out);
}

}  // namespace
}  // namespace debiaskd
