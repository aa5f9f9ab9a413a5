// Localization losses on the GPU: forward reads the map once, backward writes its gradient once.
//
// Bytes: energy on a map of the output's own size reads it in forward and leaves one bit a pixel (is it positive?) and
// two numbers a map; backward reads those and writes the gradient. That over the memory's bandwidth is the floor. The
// other kinds read the map again in backward. An upsampled map is never stored: its floor is the arithmetic of its
// pixels, once in forward and, where the rows of two cells overlap, once for each of them in backward.
//
// A map is cut into tiles of up to 32 rows and 256 columns, a block each, so that few maps fill the device too. A block
// has the union of its boxes as bits in shared memory before it looks at pixels: 64 maps cost the same with 1 box and
// with 60. Forward takes two launches, the tiles and then what becomes of their sums (up to four for thousands of maps,
// whose losses or annotations one block alone would take long to add up); backward takes one.

#include "cuda/localization_gather.cuh"
#include "cuda/localization_kernels.cuh"

namespace debiaskd {
namespace {

constexpr int64_t kOwnCount = 8192;  // so many annotations, or fewer, every block counts for itself
constexpr int64_t kOneBlock = 8192;  // so many threads' work, or less, is left to one block
constexpr int kStage = 40 * 1024;    // bytes of shared memory that a part of a map may take

// ---- from sums to losses ----

struct Annotations {
  const bool* data;
  int64_t step, count;

  __device__ double counted() const {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += data[i * step];
    return block_sum(sum);
  }
};

__global__ void count_kernel(Annotations annotated, double* count) {
  const double sum = annotated.counted();
  if (threadIdx.x == 0) *count = sum;
}

struct Outcome {
  void *each, *sum, *coefficients;  // of the accumulator's type; null where nobody asks
  double* sums;                     // a block's losses, where there is more than one block; else null
};

// `team` threads, a power of two up to 32, add up the `parts` tiles of a map.
template <typename A>
__global__ void finish_kernel(const Partial* partial, int64_t parts, int team, Annotations annotated,
    const double* count, int64_t kind, double pixels, bool mean, Outcome out) {
  double factor = 1;
  if (mean) {
    const double known = count ? *count : annotated.counted();
    factor = known > 0 ? 1 / known : 1;
  }
  const int teams = blockDim.x / team, lane = threadIdx.x % team;
  double total = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < annotated.count;
      first += static_cast<int64_t>(gridDim.x) * teams) {
    const int64_t image = first + threadIdx.x / team;
    const bool counts = image < annotated.count && annotated.data[image * annotated.step];
    Partial sum = {0, 0};
    for (int64_t i = lane; counts && i < parts; i += team) {
      const Partial part = partial[image * parts + i];
      sum.all += part.all;
      sum.inside += part.inside;
    }
    for (int step = team / 2; step > 0; step /= 2) {
      sum.all += __shfl_xor_sync(kFullWarp, sum.all, step);
      sum.inside += __shfl_xor_sync(kFullWarp, sum.inside, step);
    }
    if (lane > 0 || image >= annotated.count) continue;
    MapLoss loss = {0, 0, 0};
    if (counts) loss = map_loss(kind, {sum.all, sum.inside, sum.inside}, pixels);
    if (out.coefficients) {
      A* coefficients = static_cast<A*>(out.coefficients) + 2 * image;
      coefficients[0] = static_cast<A>(loss.inside * factor);
      coefficients[1] = static_cast<A>(loss.outside * factor);
    }
    if (out.each) static_cast<A*>(out.each)[image] = static_cast<A>(loss.loss);
    total += loss.loss * factor;
  }
  if (out.each) return;
  total = block_sum(total);
  if (threadIdx.x > 0) return;
  if (out.sums) {
    out.sums[blockIdx.x] = total;
  } else {
    *static_cast<A*>(out.sum) = static_cast<A>(total);
  }
}

template <typename A>
void finish(const Device& device, Scratch& scratch, const Partial* partial, int64_t parts, const BoxTable& table,
    int64_t kind, double pixels, int64_t reduction, Tensor& loss, Tensor* coefficients) {
  const Annotations annotated = {table.annotated, table.annotated_step, table.images};
  double* count = nullptr;
  if (reduction == kMean && table.images > kOwnCount) {
    count = scratch.doubles(1);
    device.launch(Grid{1, 1024}, count_kernel, annotated, count);
  }
  int team = 1;
  while (team < parts && team < 32) team *= 2;
  const bool each = reduction == kNone, alone = table.images * team <= kOneBlock;
  const int threads = whole_warps(std::max(1, at_most(table.images * team, each || !alone ? kMapThreads : 1024)));
  const int64_t blocks = alone && !each ? 1 : grid_blocks(device, table.images * team, threads);
  Outcome out = {each ? loss.data_ptr() : nullptr, each ? nullptr : loss.data_ptr(),
      coefficients ? coefficients->data_ptr() : nullptr, blocks > 1 && !each ? scratch.doubles(blocks) : nullptr};
  device.launch(Grid{blocks, threads}, finish_kernel<A>, partial, parts, team, annotated, count, kind, pixels,
      reduction == kMean, out);
  if (out.sums) fold(device, out.sums, 1, blocks, static_cast<A*>(loss.data_ptr()));
}

// ---- what the launches of an op are told ----

template <typename T>
Maps<T> describe(const Tensor& attribution) {
  return {static_cast<const T*>(attribution.data_ptr()), attribution.stride(0), attribution.stride(1),
      attribution.stride(2)};
}

// Bands are thinner where there would be too few tiles to fill the device.
Tiles cut(const Device& device, int64_t images, int64_t height, int64_t width) {
  Tiles tiles = {images, height, width, 0, static_cast<int>((width + kTileColumns - 1) / kTileColumns), 0};
  const auto set_rows = [&](int rows) {
    tiles.rows = rows;
    tiles.bands = static_cast<int>((height + rows - 1) / rows);
  };
  set_rows(kTileRows);
  while (tiles.rows > 8 && tiles.count() < 2 * device.processors()) set_rows(tiles.rows / 2);
  return tiles;
}

// A thread a column at least, and not more than have four accesses to make.
int threads_for(const Tiles& tiles, int width) {
  const int columns = at_most(tiles.width, kTileColumns), rows = at_most(tiles.height, tiles.rows);
  return whole_warps(std::max(columns, at_most(words_per_row(columns) * (32 / width) * rows / 4, kMapThreads)));
}

// Whether maps can be read, and a contiguous gradient of theirs written, in pieces of 16 bytes.
template <typename T>
bool is_wide(const Maps<T>& maps, const Tiles& tiles, const void* gradient) {
  const auto fits = [](int64_t n) { return n % kWidest<T> == 0; };
  return fits(tiles.width) && is_aligned(gradient) &&
         (!maps.data ||
             (maps.column_step == 1 && fits(maps.row_step) && fits(maps.image_step) && is_aligned(maps.data)));
}

// Calls function(elements an access) with a constant: those of 16 bytes, or 1.
template <typename T, typename Function>
void with_width(bool wide, Function&& function) {
  if (wide) return function(std::integral_constant<int, kWidest<T>>{});
  function(std::integral_constant<int, 1>{});
}

struct Sizes {
  int64_t map_height, map_width, height, width;

  bool upsampled() const { return map_height != height || map_width != width; }
  Scaling scaling() const { return {{height, map_height}, {width, map_width}}; }
};

// Bytes of shared memory that the part of a map takes which a tile is made of; 0 where they are too many.
int64_t stage_bytes(const Tiles& tiles, const Scaling& scaling, int64_t element) {
  const auto cells = [](int64_t pixels, double scale) { return static_cast<int64_t>(pixels * scale) + 3; };
  const int64_t columns = std::min<int64_t>(tiles.width, kTileColumns);
  const int64_t bytes = cells(tiles.rows, scaling.rows.scale) * cells(columns, scaling.columns.scale) * element;
  return bytes <= kStage ? bytes : 0;
}

// As many rows of cells as 32 rows of the output feed; all columns, or as many as the output's columns that feed them
// have room in a tile.
Cells deal_out(const Device& device, const Sizes& sizes, const Scaling& scaling, int64_t images, int64_t element) {
  Cells cells = {images, 0, 0, 0, 0};
  const double most_rows = std::min<double>(kMostCellRows, 64 / static_cast<double>(element));
  cells.rows = static_cast<int>(std::clamp(kTileRows * scaling.rows.scale - 1, 1.0, most_rows));
  const double room = sizes.width <= kTileColumns ? kTileColumns : kTileColumns * scaling.columns.scale - 3;
  const double columns = std::min<double>(static_cast<double>(sizes.map_width), kTileColumns);
  cells.columns = static_cast<int>(std::clamp(room, 1.0, columns));
  cells.column_groups = static_cast<int>((sizes.map_width + cells.columns - 1) / cells.columns);
  const auto set_groups = [&] {
    cells.row_groups = static_cast<int>((sizes.map_height + cells.rows - 1) / cells.rows);
  };
  set_groups();
  while (cells.rows > 1 && cells.count() < 2 * device.processors()) {
    cells.rows /= 2;
    set_groups();
  }
  return cells;
}

// ---- the ops ----

std::tuple<Tensor, Tensor, Tensor> localization(const Tensor& attribution, const Tensor& coords, const Tensor& offsets,
    const Tensor& annotated, const std::optional<Tensor>& mask, int64_t kind, int64_t height, int64_t width,
    int64_t reduction, bool with_state) {
  const Sizes sizes = {attribution.size(1), attribution.size(2), height, width};
  const int64_t images = attribution.size(0);
  const bool with_bits = with_state && kind == kEnergy && !sizes.upsampled();
  const ScalarType type = accumulator_type(attribution.scalar_type());
  std::vector<int64_t> loss_shape, bits_shape = {0};
  if (reduction == kNone) loss_shape.push_back(images);
  if (with_bits) bits_shape = {images, height, words_per_row(width)};
  Tensor loss = new_empty(attribution, loss_shape, type);
  Tensor coefficients = new_empty(attribution, {with_state ? images : 0, 2}, type);
  Tensor positive = new_empty(attribution, bits_shape, ScalarType::Int);

  const Device device(attribution);
  Scratch scratch(attribution);
  const Tensor packed = torch::stable::contiguous(coords);
  const std::optional<Tensor> words = contiguous_or_none(mask);
  const BoxTable table(packed, offsets, annotated, words);
  const Tiles tiles = cut(device, images, height, width);
  auto* partial = reinterpret_cast<Partial*>(scratch.doubles(2 * tiles.count()));
  auto* bits = with_bits ? static_cast<int32_t*>(positive.data_ptr()) : nullptr;
  dispatch_floating(attribution.scalar_type(), "attribution", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    const Maps<T> maps = describe<T>(attribution);
    const auto sum = [&](auto source, int threads, int64_t shared) {
      using Source = decltype(source);
      const Grid grid = {grid_blocks(device, tiles.count(), 1), threads, shared};
      const auto kernel = kind == kEnergy ? sum_kernel<Source, kEnergy> : sum_kernel<Source, kOther>;
      device.launch(grid, kernel, source, table, tiles, static_cast<int>(kind), partial, bits);
    };
    if (sizes.upsampled()) {
      const int64_t stage = stage_bytes(tiles, sizes.scaling(), sizeof(A));
      sum(BlendedPixels<T>{maps, sizes.scaling(), stage > 0}, whole_warps(at_most(width, kTileColumns)), stage);
    } else {
      with_width<T>(is_wide(maps, tiles, nullptr),
          [&](auto constant) { sum(OwnPixels<T, decltype(constant)::value>{maps}, threads_for(tiles, constant), 0); });
    }
    finish<A>(device, scratch, partial, tiles.parts(), table, kind, static_cast<double>(height * width), reduction,
        loss, with_state ? &coefficients : nullptr);
  });
  return {loss, coefficients, positive};
}

Tensor localization_backward(const Tensor& grad_output, const std::optional<Tensor>& attribution, const Tensor& coords,
    const Tensor& offsets, const Tensor& annotated, const std::optional<Tensor>& mask, const Tensor& coefficients,
    const Tensor& positive, int64_t kind, int64_t height, int64_t width, int64_t map_height, int64_t map_width,
    ScalarType dtype) {
  const Sizes sizes = {map_height, map_width, height, width};
  const int64_t images = annotated.size(0);
  Tensor gradient = new_empty(coefficients, {images, map_height, map_width}, dtype);

  const Device device(coefficients);
  const Tensor packed = torch::stable::contiguous(coords);
  const std::optional<Tensor> words = contiguous_or_none(mask);
  const BoxTable table(packed, offsets, annotated, words);
  dispatch_floating(dtype, "attribution", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    const Maps<T> maps = attribution ? describe<T>(*attribution) : Maps<T>{};
    const MapFactors<A> factors = {static_cast<const A*>(coefficients.data_ptr()),
        static_cast<const A*>(grad_output.data_ptr()), grad_output.dim() ? grad_output.stride(0) : 0};
    T* out = static_cast<T*>(gradient.data_ptr());
    if (sizes.upsampled()) {
      const Scaling scaling = sizes.scaling();
      const Cells cells = deal_out(device, sizes, scaling, images, sizeof(A));
      const int64_t memory = ((cells.rows + 2) * (cells.columns + 2) + cells.rows * kMapThreads) * sizeof(A);
      const Grid grid = {grid_blocks(device, cells.count(), 1), whole_warps(at_most(width, kTileColumns)), memory};
      const auto kernel =
          kind == kEnergy ? upsampled_gradient_kernel<T, kEnergy> : upsampled_gradient_kernel<T, kOther>;
      device.launch(grid, kernel, maps, scaling, table, cells, static_cast<int>(kind), factors, out);
      return;
    }
    const Tiles tiles = cut(device, images, height, width);
    with_width<T>(is_wide(maps, tiles, out), [&](auto constant) {
      constexpr int kWidth = decltype(constant)::value;
      const Grid grid = {grid_blocks(device, tiles.count(), 1), threads_for(tiles, kWidth)};
      if (kind == kEnergy) {
        const PositiveBits<T, kWidth> source = {static_cast<const int32_t*>(positive.data_ptr())};
        device.launch(grid, gradient_kernel<PositiveBits<T, kWidth>, T, kEnergy>, source, table, tiles,
            static_cast<int>(kind), factors, out);
      } else {
        device.launch(grid, gradient_kernel<OwnPixels<T, kWidth>, T, kOther>, OwnPixels<T, kWidth>{maps}, table, tiles,
            static_cast<int>(kind), factors, out);
      }
    });
  });
  return gradient;
}

}  // namespace
}  // namespace debiaskd

DEBIASKD_CUDA_LIBRARY(m) {
  m.impl("localization", TORCH_BOX(&debiaskd::localization));
  m.impl("localization_backward", TORCH_BOX(&debiaskd::localization_backward));
}
