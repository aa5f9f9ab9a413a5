// A map times each channel: planes of rows are written, 16 bytes a thread, by threads along rows and above each other.
//
// The output is dense, so that rows which do not begin at a multiple of 16 bytes are written several together, as one
// long row that does; what depends on the place within a row alone is loaded once a thread.
#pragma once

#include "cuda/channel_dot_planes.cuh"

namespace debiaskd {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kScaleUnroll = 4;    // rows that a thread loads at once
constexpr int kRowFactors = 1024;  // that a block has at hand

// What an element of the output is the product of.
enum class Product { kFactors, kValuesByPlace, kValuesByRow };  // values times the factor of the place, or of the row

template <typename T>
struct Scale {
  Sizes sizes;        // of the output; its rows may be `alike` of the tensors' own in one
  Planes<T> values;   // unless kFactors
  Factor place, row;  // unless kValuesByRow, kValuesByPlace
  T* out;
  int64_t out_sample, out_line, out_row;  // from one to the next
  int64_t period;                         // places of one of the tensors' own rows
  int64_t alike;
  int64_t tiles, shares, share;  // tiles of a row; shares of the rows, and rows in each
  int pieces, groups;            // threads of a block: so many along the row, so many above each other
};

// The factors of a thread's places, and of which rows they are: the first `ending` of row `own`, the others of the
// next.
template <int WIDTH, typename A>
struct Places {
  A factor[WIDTH];
  int own, ending;
};

template <Product PRODUCT, int WIDTH, typename A, typename Job>
__device__ __forceinline__ Places<WIDTH, A> places_of(const Job& job, const Block& at, int64_t begin) {
  Places<WIDTH, A> places = {};
  int64_t place = begin;
  if (job.alike > 1) {
    places.own = static_cast<int>(begin / job.period);
    place = begin % job.period;
  }
  places.ending = static_cast<int>(smaller(job.period - place, static_cast<int64_t>(WIDTH)));
  if constexpr (PRODUCT != Product::kValuesByRow) {
#pragma unroll
    for (int v = 0; v < WIDTH; ++v) {
      const int64_t i = v < places.ending ? place + v : place + v - job.period;
      places.factor[v] = job.place.template at<A>(at.sample, at.line, i);
    }
  }
  return places;
}

template <typename T, int WIDTH, Product PRODUCT>
__global__ void __launch_bounds__(kScaleThreads, 4) scale_kernel(__grid_constant__ const Scale<T> job) {
  using A = typename accumulator<T>::type;
  constexpr bool kValues = PRODUCT != Product::kFactors, kByRow = PRODUCT != Product::kValuesByPlace;
  __shared__ A factors[kByRow ? kRowFactors : 1];
  const Block at(job.sizes, job.tiles, job.shares);
  const int64_t first = at.share * job.share;
  const int rows = static_cast<int>(smaller(job.share, job.sizes.rows - first)), alike = static_cast<int>(job.alike);
  if constexpr (kByRow) {
    for (int i = threadIdx.x; i < rows * alike; i += blockDim.x) {
      factors[i] = job.row.template at<A>(at.sample, at.line, first * alike + i);
    }
    __syncthreads();
  }
  const int x = threadIdx.x % job.pieces, y = threadIdx.x / job.pieces;
  const int64_t begin = (static_cast<int64_t>(at.part) * job.pieces + x) * WIDTH;
  if (y >= job.groups || begin >= job.sizes.length) return;
  const Places<WIDTH, A> places = places_of<PRODUCT, WIDTH, A>(job, at, begin);
  const int64_t row = first + y;
  const T* from = nullptr;
  if constexpr (kValues) from = job.values.data + job.values.offset(at.sample, at.line, row) + begin * job.values.step;
  T* to = job.out + at.sample * job.out_sample + at.line * job.out_line + row * job.out_row + begin;

  for (int r = y; r < rows; r += kScaleUnroll * job.groups) {
    Pack<T, WIDTH> values[kScaleUnroll];
    if constexpr (kValues) {
#pragma unroll
      for (int u = 0; u < kScaleUnroll; ++u) {
        if (r + u * job.groups < rows) values[u] = load_pack<WIDTH>(from + (r - y + u * job.groups) * job.values.row);
      }
    }
#pragma unroll
    for (int u = 0; u < kScaleUnroll; ++u) {
      const int own = r + u * job.groups;
      if (own >= rows) continue;
      A here = 1, next = 1;
      if constexpr (kByRow) {
        const A* const factor = factors + own * alike + places.own;
        here = *factor, next = places.ending < WIDTH ? factor[1] : here;
      }
      Pack<T, WIDTH> product;
#pragma unroll
      for (int v = 0; v < WIDTH; ++v) {
        const A of_row = v < places.ending ? here : next;
        const A one = kValues ? element<A>(values[u], v) : places.factor[v];
        product.value[v] = static_cast<T>(one * (PRODUCT == Product::kValuesByPlace ? places.factor[v] : of_row));
      }
      store_pack(product, to + (own - y) * job.out_row);
    }
  }
}

// ---- on the host ----

// Takes rows together until they begin at multiples of 16 bytes. Whether all accesses can be of 16 bytes then.
template <typename T>
bool widen(bool with_values, Scale<T>& job) {
  const Planes<T>& in = job.values;
  const auto fits = [](int64_t n) { return n % kWidest<T> == 0; };
  int64_t alike = 1;
  while (!fits(job.sizes.length * alike)) alike *= 2;
  if (job.period < kWidest<T> || job.sizes.rows % alike || !is_aligned(job.out)) return false;
  if (with_values && !(in.step == 1 && is_aligned(in.data) && fits(in.sample) && fits(in.line))) return false;
  if (alike == 1) return fits(job.out_row) && fits(job.out_line) && fits(in.row);
  if (job.sizes.lines > 1 || job.out_row != job.period || (with_values && in.row != job.period)) return false;
  job.alike = alike;
  job.sizes.rows /= alike, job.sizes.length *= alike;
  job.values.row *= alike, job.out_row *= alike;
  return true;
}

template <typename T, Product PRODUCT>
void scale(const Device& device, Scale<T>& job) {
  if (PRODUCT == Product::kValuesByRow) merge_samples(job.sizes, job.values);
  const int64_t width = widen(PRODUCT != Product::kFactors, job) ? kWidest<T> : 1;
  const int64_t pieces = job.sizes.length / width, planes = job.sizes.samples * job.sizes.lines;
  job.tiles = ceil_divide(pieces, kScaleThreads);
  job.pieces = static_cast<int>(ceil_divide(pieces, job.tiles));
  job.groups = static_cast<int>(std::min<int64_t>(kScaleThreads / job.pieces, job.sizes.rows));
  // Not so few rows a block that its threads load factors more often than they use them.
  const int64_t wanted = ceil_divide(16 * filling(device), planes * job.tiles), turn = job.groups * kScaleUnroll;
  const int64_t shares = std::min(wanted, ceil_divide(job.sizes.rows, turn));
  job.share = std::min(ceil_divide(job.sizes.rows, shares), kRowFactors / job.alike);
  job.shares = ceil_divide(job.sizes.rows, job.share);
  const Grid grid = {planes * job.tiles * job.shares, threads_for(job.pieces * job.groups, kScaleThreads)};
  if (width > 1) return device.launch(grid, scale_kernel<T, kWidest<T>, PRODUCT>, job);
  device.launch(grid, scale_kernel<T, 1, PRODUCT>, job);
}

}  // namespace
}  // namespace debiaskd
