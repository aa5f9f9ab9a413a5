// Products of matrices of exponentials, in tiles: sum_l X_il Y_jl, with X and Y made from logarithms as they are read.
//
// A block has a tile of sums and goes through their terms kDepth at a time. Each thread reads 16 bytes of either side,
// takes exponentials, and puts them into shared memory, from where all is as in any matrix product, in full precision:
// no TF32. Meanwhile the next 16 bytes are on their way. Threads form teams, every team adds up a share of the terms
// for the whole tile, with up to 64 sums in each thread's registers, and at the end one team after the other adds its
// sums: the order depends on sizes alone.
#pragma once

#include "cuda/backdoor_exponents.cuh"

namespace debiaskd {
namespace {

// What the exponentials of a side are made of, known when a loop over them is compiled.
enum Parts : int { kPlus = 1, kMinus = 2, kFactor = 4, kColumns = 8, kTransposed = 16 };

// One side of a product. Its lines are the matrix's rows or, transposed, its columns; along a line lie the terms.
template <typename A>
struct Side {
  Exponents<A> values;
  bool transposed;
};

template <typename A>
struct Product {
  Side<A> x, y;
  int64_t terms;
};

template <int TILE>
constexpr int kPitch = TILE + 4;  // so that what is written across lines hits different banks

template <typename A, int TILE>
struct Tiling {
  static constexpr int kDepth = kThreads * kWidest<A> / TILE;  // terms at a time: of each side, a pack a thread
  // Sums of a thread, and the team of threads that has all sums of the tile.
  static constexpr int kOwnRows = TILE / 8, kOwnColumns = 8;
  static constexpr int kAcross = TILE / kOwnColumns, kTeam = TILE / kOwnRows * kAcross, kTeams = kThreads / kTeam;
  // A thread's sums lie in packs, so many elements apart that neighbouring threads have neighbouring packs.
  static constexpr int kRowStep = TILE / kOwnRows * kWidest<A>, kColumnStep = kAcross * kWidest<A>;
  // Results are dealt out to all threads alike, a pack of neighbours at a time.
  static constexpr int kPacks = TILE * TILE / (kThreads * kWidest<A>);
  static constexpr int kLanes = TILE / kWidest<A>;  // threads whose packs make up a row

  struct Shared {
    A x[2][kDepth][kPitch<TILE>], y[2][kDepth][kPitch<TILE>];
    A sums[TILE][kPitch<TILE>];
    bool far;  // whether terms were left out for being too large
  };
  using Sums = A[kOwnRows][kOwnColumns];
  using Results = Wide<A>[kPacks];

  static int64_t count(int64_t length) { return (length + TILE - 1) / TILE; }
};

// Which tile a block has, of those in rows of tiles, and which of its results belong to this thread.
template <typename A, int TILE>
struct Tile {
  unsigned down, across;

  __device__ Tile(unsigned index, int64_t width) {
    const auto count = static_cast<unsigned>((width + TILE - 1) / TILE);
    down = index / count, across = index % count;
  }
  __device__ int64_t row() const { return static_cast<int64_t>(down) * TILE; }
  __device__ int64_t column() const { return static_cast<int64_t>(across) * TILE; }

  __device__ static int line(int pack) {
    return (pack * kThreads + static_cast<int>(threadIdx.x)) / Tiling<A, TILE>::kLanes;
  }
  __device__ static int place() { return static_cast<int>(threadIdx.x) % Tiling<A, TILE>::kLanes * kWidest<A>; }
};

// ---- reading ----

// Where in a tile the pack lies that a thread reads of a side: it lies along the matrix's rows.
template <typename A, int TILE>
struct Spot {
  int line, term;

  __device__ explicit Spot(bool transposed) {
    const int thread = threadIdx.x;
    if (transposed) {
      line = thread % (TILE / kWidest<A>)*kWidest<A>, term = thread / (TILE / kWidest<A>);
    } else {
      // Two threads to a line: 32 bytes of it are a whole sector, and 16 lines by 2 packs are 32 banks.
      line = thread / 2 % TILE, term = (thread % 2 + thread / (2 * TILE) * 2) * kWidest<A>;
    }
  }
};

template <int TILE, typename A>
__device__ __forceinline__ void put(
    bool transposed, const Spot<A, TILE>& spot, const Wide<A>& pack, A (*to)[kPitch<TILE>]) {
  if (transposed) return store_shared(pack, &to[spot.term][spot.line]);
#pragma unroll
  for (int i = 0; i < kWidest<A>; ++i) to[spot.term + i][spot.line] = pack.value[i];
}

// A thread's packs of one side, kDepth terms further at each turn. Outside of the matrix logarithms are -inf.
template <typename A, int TILE, int PARTS>
class Reader {
 public:
  __device__ Reader(const Side<A>& side, int64_t first_line) : of_(side.values), spot_(kAcross) {
    const int64_t line = first_line + spot_.line;
    const int64_t row = kAcross ? spot_.term : line, column = kAcross ? line : spot_.term;
    lines_ = kAcross ? inside<A>(1, of_.width, 0, line) : line < of_.height ? kWidest<A> : 0;
    if (PARTS & kPlus) plus_.from = of_.plus.at(row, column);
    if (PARTS & kMinus) minus_.from = of_.minus.at(row, column);
    if (PARTS & kFactor) factor_.from = of_.factor.at(row, column);
    if (PARTS & kColumns) columns_.from = of_.columns + column;
    rows_ = of_.rows + row;
    if (!kAcross && lines_) row_ = *rows_;
  }

  // The next packs, where only `left` terms are left.
  __device__ __forceinline__ void read(int64_t left) {
    const int terms = static_cast<int>(left < kDepth ? left : kDepth) - spot_.term;
    const int count = kAcross ? (terms > 0 ? lines_ : 0) : terms < lines_ ? terms : lines_;
    if (PARTS & kPlus) next(plus_, of_.plus, count, -INFINITY);
    if (PARTS & kMinus) next(minus_, of_.minus, count, PARTS & kPlus ? 0 : INFINITY);
    if (PARTS & kFactor) next(factor_, of_.factor, count, 0);
    if (PARTS & kColumns && !kAcross) {
      columns_.pack = debiaskd::read(columns_.from, 1, true, count);
      columns_.from += kDepth;
    }
    if (kAcross) {
      row_ = count > 0 ? *rows_ : A(0);
      rows_ += kDepth;
    }
  }

  // Their exponentials. One that is too large counts 0, and is reported.
  __device__ __forceinline__ void put(A (*to)[kPitch<TILE>], bool& far) const {
    Wide<A> pack, columns = columns_.pack;
    // The same at every turn, from a cache, which spares registers.
    if (PARTS & kColumns && kAcross) columns = debiaskd::read(columns_.from, 1, true, lines_);
#pragma unroll
    for (int i = 0; i < kWidest<A>; ++i) {
      A log = PARTS & kPlus ? plus_.pack.value[i] : A(0);
      if (PARTS & kMinus) log -= minus_.pack.value[i];
      if (PARTS & kColumns) log += columns.value[i];
      log += of_.sign * row_;
      pack.value[i] = std::exp(log);
      if (PARTS & kFactor) {
        const bool beyond = log > kFarthest<A>;
        pack.value[i] = beyond ? A(0) : pack.value[i] * factor_.pack.value[i];
        if (beyond) far = true;
      }
    }
    debiaskd::put<TILE>(kAcross, spot_, pack, to);
  }

 private:
  static constexpr bool kAcross = PARTS & kTransposed;  // packs lie across lines
  static constexpr int kDepth = Tiling<A, TILE>::kDepth;

  struct Part {
    const A* from = nullptr;
    Wide<A> pack;
  };

  __device__ __forceinline__ void next(Part& part, const Matrix<A>& of, int count, A other) {
    part.pack = debiaskd::read(part.from, of.column, wide_, count, other);
    part.from += kDepth * (kAcross ? of.row : of.column);
  }

  const Exponents<A>& of_;
  bool wide_ = of_.plus.wide && of_.minus.wide && of_.factor.wide;
  Spot<A, TILE> spot_;
  int lines_;  // elements of a pack that are inside the matrix, but for its last terms
  Part plus_, minus_, factor_, columns_;
  const A* rows_;
  A row_ = 0;
};

// ---- the product ----

template <int COUNT, int STEP, typename A>
__device__ __forceinline__ void fragment(const A* from, A (&to)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i += kWidest<A>) {
    const Wide<A> pack = load_pack<kWidest<A>>(from + i / kWidest<A> * STEP);
#pragma unroll
    for (int j = 0; j < kWidest<A>; ++j) to[i + j] = pack.value[j];
  }
}

// A thread's team, and the first of its sums.
template <typename A, int TILE>
struct Share {
  using T = Tiling<A, TILE>;
  int team = threadIdx.x / T::kTeam;
  int row = threadIdx.x % T::kTeam / T::kAcross * kWidest<A>, column = threadIdx.x % T::kAcross * kWidest<A>;
};

template <typename A, int TILE, int UNROLL>
__device__ __forceinline__ void multiply(
    const A (*x)[kPitch<TILE>], const A (*y)[kPitch<TILE>], typename Tiling<A, TILE>::Sums& sums) {
  using T = Tiling<A, TILE>;
  const Share<A, TILE> own;
#pragma unroll UNROLL
  for (int i = 0; i < T::kDepth; i += T::kTeams) {
    A left[T::kOwnRows], right[T::kOwnColumns];
    fragment<T::kOwnRows, T::kRowStep>(x[i + own.team] + own.row, left);
    fragment<T::kOwnColumns, T::kColumnStep>(y[i + own.team] + own.column, right);
#pragma unroll
    for (int r = 0; r < T::kOwnRows; ++r) {
#pragma unroll
      for (int c = 0; c < T::kOwnColumns; ++c) sums[r][c] += left[r] * right[c];
    }
  }
}

// Adds the terms of a product to the team's sums.
template <typename A, int TILE, int X, int Y>
__device__ __forceinline__ void add_terms(const Product<A>& product, const Tile<A, TILE>& tile,
    typename Tiling<A, TILE>::Shared& shared, typename Tiling<A, TILE>::Sums& sums) {
  // 64 sums, and packs of three matrices ahead, leave no registers for the fragments of several terms.
  constexpr int kUnroll = TILE == 64 ? 1 : Tiling<A, TILE>::kDepth;
  Reader<A, TILE, X> x(product.x, tile.row());
  Reader<A, TILE, Y> y(product.y, tile.column());
  int buffer = 0;
  int64_t left = product.terms;
  x.read(left), y.read(left);
#pragma unroll 1
  while (left > 0) {
    x.put(shared.x[buffer], shared.far), y.put(shared.y[buffer], shared.far);
    // The one barrier a turn: nobody passes it before all have multiplied what the other buffer held.
    __syncthreads();
    left -= Tiling<A, TILE>::kDepth;
    x.read(left), y.read(left);
    multiply<A, TILE, kUnroll>(shared.x[buffer], shared.y[buffer], sums);
    buffer ^= 1;
  }
  __syncthreads();
}

// Adds up what the teams have, each in its turn.
template <typename A, int TILE>
__device__ __forceinline__ void gather(
    const typename Tiling<A, TILE>::Sums& sums, typename Tiling<A, TILE>::Shared& shared) {
  using T = Tiling<A, TILE>;
  const Share<A, TILE> own;
  for (int team = 0; team < T::kTeams; ++team) {
    if (team == own.team) {
#pragma unroll
      for (int r = 0; r < T::kOwnRows; ++r) {
#pragma unroll
        for (int c = 0; c < T::kOwnColumns; c += kWidest<A>) {
          A* to = &shared.sums[own.row + r / kWidest<A> * T::kRowStep + r % kWidest<A>]
                              [own.column + c / kWidest<A> * T::kColumnStep];
          Wide<A> pack = {};
          if (team > 0) pack = load_pack<kWidest<A>>(to);
#pragma unroll
          for (int i = 0; i < kWidest<A>; ++i) pack.value[i] += sums[r][c + i];
          store_shared(pack, to);
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace debiaskd
