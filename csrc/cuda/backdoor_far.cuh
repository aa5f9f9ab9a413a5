// What a product of shifted exponentials cannot hold, term by term: sums that came out too small, and terms that were
// left out for being too large. A tile's terms go through shared memory as logarithms, and a warp takes the
// exponentials of those that any of its threads needs.
#pragma once

#include "cuda/backdoor_tiles.cuh"

namespace debiaskd {
namespace {

// Every thread learns whether it is so for any. All threads of the block must take part.
__device__ __forceinline__ bool block_any(bool own) { return block_sum(own ? 1 : 0) != 0; }

// The unshifted logarithms of a thread's pack and, if asked for, the factors of those too large: 0 for all others.
template <int TILE, typename A>
__device__ __forceinline__ void put_logs(
    const Side<A>& side, int64_t first_line, int64_t first_term, A (*to)[kPitch<TILE>], A (*far)[kPitch<TILE>]) {
  const Exponents<A>& of = side.values;
  const Spot<A, TILE> spot(side.transposed);
  const int64_t line = first_line + spot.line, term = first_term + spot.term;
  const int64_t row = side.transposed ? term : line, column = side.transposed ? line : term;
  const int count = inside<A>(of.height, of.width, row, column);
  const Wide<A> logs = unshifted(of, row, column, count);
  put<TILE>(side.transposed, spot, logs, to);
  if (!far || !of.factor.data) return;
  Wide<A> factor = read(of.factor, row, column, count);
  const Wide<A> distance = shifted(of, logs, row, column, count);
#pragma unroll
  for (int i = 0; i < kWidest<A>; ++i) {
    if (!(distance.value[i] > kFarthest<A>)) factor.value[i] = 0;
  }
  put<TILE>(side.transposed, spot, factor, far);
}

// Calls function(terms there are) with the logarithms of kDepth terms after the other in shared.x[0] and shared.y[0],
// and in shared.x[1] the factors of what was too large, 0 for all else, if `far` asks for them.
template <typename A, int TILE, typename Function>
__device__ __forceinline__ void for_logs(const Product<A>& product, const Tile<A, TILE>& tile,
    typename Tiling<A, TILE>::Shared& shared, bool far, Function&& function) {
  constexpr int kDepth = Tiling<A, TILE>::kDepth;
  for (int64_t term = 0; term < product.terms; term += kDepth) {
    A(*factors)[kPitch<TILE>] = far ? shared.x[1] : nullptr;
    put_logs<TILE>(product.x, tile.row(), term, shared.x[0], factors);
    put_logs<TILE>(product.y, tile.column(), term, shared.y[0], factors);
    __syncthreads();
    function(static_cast<int>(product.terms - term < kDepth ? product.terms - term : kDepth));
    __syncthreads();
  }
}

// The logarithms of the sums whose bits are set, from unshifted terms: each sum is shifted by its own largest term.
template <typename A, int TILE>
__device__ __forceinline__ void add_again(
    const Product<A>& product, const Tile<A, TILE>& tile, unsigned marked, typename Tiling<A, TILE>::Shared& shared) {
  using T = Tiling<A, TILE>;
  typename T::Results shift, total;
  bool needed[T::kPacks];
#pragma unroll
  for (int p = 0; p < T::kPacks; ++p) {
    needed[p] = __any_sync(kFullWarp, marked >> p * kWidest<A> & ((1u << kWidest<A>)-1));
#pragma unroll
    for (int i = 0; i < kWidest<A>; ++i) shift[p].value[i] = kLowest<A>, total[p].value[i] = 0;
  }
  const auto for_terms = [&](int count, auto&& function) {
#pragma unroll
    for (int p = 0; p < T::kPacks; ++p) {
      if (!needed[p]) continue;
#pragma unroll 1
      for (int term = 0; term < count; ++term) {
        const A x = shared.x[0][term][tile.line(p)];
        const Wide<A> y = load_pack<kWidest<A>>(&shared.y[0][term][tile.place()]);
#pragma unroll
        for (int i = 0; i < kWidest<A>; ++i) function(x + y.value[i], shift[p].value[i], total[p].value[i]);
      }
    }
  };
  for_logs<A, TILE>(product, tile, shared, false,
      [&](int count) { for_terms(count, [](A log, A& largest, A&) { largest = log > largest ? log : largest; }); });
  for_logs<A, TILE>(product, tile, shared, false,
      [&](int count) { for_terms(count, [](A log, A& largest, A& sum) { sum += std::exp(log - largest); }); });
#pragma unroll
  for (int p = 0; p < T::kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < kWidest<A>; ++i) {
      if (!(marked >> (p * kWidest<A> + i) & 1)) continue;
      shared.sums[tile.line(p)][tile.place() + i] = shift[p].value[i] + std::log(total[p].value[i]);
    }
  }
}

// results += the terms that were left out, times exp(of). Shifts cancel, and none are used.
template <typename A, int TILE>
__device__ __forceinline__ void add_far(const Product<A>& product, const Tile<A, TILE>& tile, const Exponents<A>& of,
    typename Tiling<A, TILE>::Shared& shared, typename Tiling<A, TILE>::Results& results) {
  using T = Tiling<A, TILE>;
  typename T::Results scale;
#pragma unroll
  for (int p = 0; p < T::kPacks; ++p) {
    const int64_t row = tile.row() + tile.line(p), column = tile.column() + tile.place();
    scale[p] = unshifted(of, row, column, inside<A>(of.height, of.width, row, column));
  }
  const bool of_x = product.x.values.factor.data;
  for_logs<A, TILE>(product, tile, shared, true, [&](int count) {
#pragma unroll 1
    for (int term = 0; term < count; ++term) {
      const Wide<A> y = load_pack<kWidest<A>>(&shared.y[0][term][tile.place()]);
#pragma unroll
      for (int p = 0; p < T::kPacks; ++p) {
        const A x = shared.x[0][term][tile.line(p)];
        const A* from = &shared.x[1][term][of_x ? tile.line(p) : tile.place()];
        A factor[kWidest<A>];
        bool any = false;
#pragma unroll
        for (int i = 0; i < kWidest<A>; ++i) {
          factor[i] = from[of_x ? 0 : i];
          any |= factor[i] != 0;
        }
        if (!__any_sync(kFullWarp, any)) continue;
#pragma unroll
        for (int i = 0; i < kWidest<A>; ++i) {
          if (factor[i] != 0) results[p].value[i] += factor[i] * std::exp(x + y.value[i] + scale[p].value[i]);
        }
      }
    }
  });
}

}  // namespace
}  // namespace debiaskd
