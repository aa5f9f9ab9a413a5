// Weighted feature matching on the GPU: loss and gradient in one pass over student and teacher.
//
// Bytes: student and teacher read, gradient written, 3 passes: that over the memory's bandwidth is the floor. A sample
// is cut into tiles; each tile belongs to a team of threads, which holds all of it in registers between reading and
// writing: a warp for samples of 512 elements or fewer, else a block. Teams go from tile to tile and add up what their
// tiles lose; one number a block remains, and a second, small launch adds those up.
//
// With normalize, a sample's factor is known only when all of its teacher has been read. A sample of one tile has it in
// registers by then; for larger ones a launch before sums the teacher's squares, the fourth pass, and the last
// block of the second launch then does the third's work. So there are two launches forward. (Three where there are more
// than 4096 weights to be added up or, with normalize, distances of many tiles each to be returned one by one, or
// samples of more than a million elements.) Backward is one: it scales the gradient in place, or returns having read
// that it is multiplied by 1.

#include "cuda/reduce.cuh"
#include "cuda/sample_tiles.cuh"

namespace debiaskd {
namespace {

constexpr int64_t kOwnWeights = 4096;         // so many weights, or fewer, every block adds up for itself
constexpr int64_t kOwnNorms = kMatchThreads;  // likewise the partial sums of a teacher's squares

// ---- what each sample counts ----

struct SampleFactors {
  Numbers weight, upstream;  // without data: 1
  const double* total;       // the sum of weights; null: every block adds up `weights` of them
  int64_t weights;           // 0: what to divide by is known
  double known_total;
  // Of the teachers' squares, `parts` sums a sample. Null: not normalized, or a tile holds a whole sample.
  const double* norms;
  int64_t parts;
  bool normalize;
};

__device__ double total_weight(const SampleFactors& factors) {
  if (factors.total) return *factors.total;
  if (factors.weights == 0) return factors.known_total;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < factors.weights; i += blockDim.x) sum += factors.weight[i];
  return block_sum(sum);
}

__global__ void total_weight_kernel(Numbers weight, int64_t count, double* total) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += weight[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *total = sum;
}

// Factor of a sample's squared distance in the loss: 0 where nothing has weight, or where all of a teacher is 0 and
// distances are to be relative to it.
template <typename A>
__device__ __forceinline__ A sample_factor(const SampleFactors& factors, int64_t sample, A total, A divisor) {
  const A weight = factors.weight.data ? static_cast<A>(factors.weight[sample]) : A(1);
  return divisor > 0 && total > 0 ? weight / total / divisor : A(0);
}

// ---- the pass ----

struct Losses {
  double* partial;  // each block's loss or, one by one, each tile's squared distance times its factor
  void* each;       // [N]: the losses themselves, where tiles are samples; of the accumulator's type
  bool one_by_one;
  unsigned* finished;  // blocks that are done; null: the blocks' losses are added up by another launch
  void* sum;           // where to, otherwise
};

template <typename T, int TEAM, int WIDTH>
__global__ void __launch_bounds__(kMatchThreads)
    match_kernel(__grid_constant__ const Samples<T> in, SampleFactors factors, Losses losses) {
  using A = typename accumulator<T>::type;
  constexpr int kTeams = kMatchThreads / TEAM;
  const int lane = threadIdx.x % TEAM;
  const A total = static_cast<A>(total_weight(factors));
  const int64_t tiles = in.count * in.tiles;
  double loss = 0;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / TEAM; tile < tiles;
      tile += static_cast<int64_t>(gridDim.x) * kTeams) {
    const int64_t sample = tile / in.tiles, begin = tile % in.tiles * (TEAM * kItems);
    A s[kItems], t[kItems];
    read_tile<T, TEAM, WIDTH>(in, sample, begin, lane, s, t);

    A divisor = static_cast<A>(in.elements);
    if (factors.normalize) {
      double square = 0;
      if (factors.norms) {
        for (int64_t i = lane; i < factors.parts; i += TEAM) square += factors.norms[sample * factors.parts + i];
      } else {
        A own = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) own += t[i] * t[i];
        square = own;
      }
      divisor = static_cast<A>(team_sum<TEAM>(square));
    }
    const A factor = sample_factor(factors, sample, total, divisor);

    A square = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const A difference = s[i] - t[i];
      square += difference * difference;
      s[i] = difference;
    }
    if (losses.one_by_one) {
      const double own = factor * team_sum<TEAM>(static_cast<double>(square));
      if (lane == 0 && losses.each) static_cast<A*>(losses.each)[sample] = static_cast<A>(own);
      if (lane == 0 && losses.partial) losses.partial[tile] = own;
    } else {
      loss += factor * static_cast<double>(square);
    }
    if (in.gradient) {
      const A upstream = factors.upstream.data ? static_cast<A>(factors.upstream[sample]) : A(1);
      const A scale = 2 * factor * upstream;
#pragma unroll
      for (int i = 0; i < kItems; ++i) s[i] *= scale;
      write_tile<T, TEAM, WIDTH>(in, sample, begin, lane, s);
    }
  }
  if (losses.one_by_one || !losses.partial) return;
  loss = block_sum(loss);
  if (threadIdx.x == 0) losses.partial[blockIdx.x] = loss;
  if (losses.finished) fold_in_last_block(losses.partial, gridDim.x, losses.finished, static_cast<A*>(losses.sum));
}

// Sums of a tile's squares of the teacher, for samples of several tiles. Sets `finished` to 0 for the launch that
// follows.
template <typename T, int WIDTH>
__global__ void __launch_bounds__(kMatchThreads)
    norm_kernel(__grid_constant__ const Samples<T> in, double* norms, unsigned* finished) {
  using A = typename accumulator<T>::type;
  if (blockIdx.x == 0 && threadIdx.x == 0) *finished = 0;
  for (int64_t tile = blockIdx.x; tile < in.count * in.tiles; tile += gridDim.x) {
    A s[kItems], t[kItems], square = 0;
    read_tile<T, kMatchThreads, WIDTH>(
        in, tile / in.tiles, tile % in.tiles * (kMatchThreads * kItems), threadIdx.x, s, t);
#pragma unroll
    for (int i = 0; i < kItems; ++i) square += t[i] * t[i];
    const double sum = block_sum(static_cast<double>(square));
    if (threadIdx.x == 0) norms[tile] = sum;
  }
}

// gradient *= upstream, where that is not 1.
template <typename T, int TEAM, int WIDTH>
__global__ void __launch_bounds__(kMatchThreads) scale_kernel(__grid_constant__ const Samples<T> in, Numbers upstream) {
  using A = typename accumulator<T>::type;
  if (upstream.stride == 0 && upstream[0] == 1) return;
  constexpr int kTeams = kMatchThreads / TEAM;
  const int lane = threadIdx.x % TEAM;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / TEAM; tile < in.count * in.tiles;
      tile += static_cast<int64_t>(gridDim.x) * kTeams) {
    const int64_t sample = tile / in.tiles, begin = tile % in.tiles * (TEAM * kItems);
    const A scale = static_cast<A>(upstream[sample]);
    if (scale == 1) continue;
    A s[kItems], t[kItems];
    read_tile<T, TEAM, WIDTH>(in, sample, begin, lane, s, t);
#pragma unroll
    for (int i = 0; i < kItems; ++i) s[i] *= scale;
    write_tile<T, TEAM, WIDTH>(in, sample, begin, lane, s);
  }
}

// ---- the ops ----

SampleFactors make_factors(const Device& device, Scratch& scratch, const std::optional<Tensor>& weight,
    const Tensor* upstream, bool normalize, int64_t reduction, int64_t samples) {
  SampleFactors factors = {};
  if (weight) factors.weight = Numbers(*weight);
  if (upstream) factors.upstream = Numbers(*upstream);
  factors.normalize = normalize;
  factors.known_total = reduction == kMean ? static_cast<double>(samples) : 1;
  if (reduction != kMean || !weight) return factors;
  factors.weights = samples;
  if (samples <= kOwnWeights) return factors;
  double* total = scratch.doubles(1);
  device.launch(Grid{1, 1024}, total_weight_kernel, factors.weight, samples, total);
  factors.total = total;
  return factors;
}

// The pass, with the launches before and after it. `loss` or `gradient` may be null, and `upstream` where 1 is meant.
template <typename T>
void match(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight, bool normalize,
    int64_t reduction, const Tensor* upstream, Tensor* loss, Tensor* gradient) {
  using A = typename accumulator<T>::type;
  const Device device(student);
  Scratch scratch(student);
  Samples<T> in = describe<T>(student, teacher, gradient);
  with_tiles(in, [&](auto team, auto width) {
    constexpr int kTeam = decltype(team)::value, kWidth = decltype(width)::value;
    const int64_t tiles = in.count * in.tiles, blocks = grid_blocks(device, tiles, kMatchThreads / kTeam);
    SampleFactors factors = make_factors(device, scratch, weight, upstream, normalize, reduction, in.count);
    Losses losses = {};
    losses.one_by_one = loss && reduction == kNone;

    if (normalize && in.tiles > 1 && tiles > 0) {
      double* norms = scratch.doubles(tiles);
      auto* finished = reinterpret_cast<unsigned*>(scratch.doubles(1));
      device.launch(Grid{blocks, kMatchThreads}, norm_kernel<T, kWidth>, in, norms, finished);
      factors.parts = in.tiles;
      if (in.tiles > kOwnNorms) {
        double* whole = scratch.doubles(in.count);
        fold(device, norms, in.count, in.tiles, whole);
        norms = whole;
        factors.parts = 1;
      }
      factors.norms = norms;
      if (loss && !losses.one_by_one) losses.finished = finished;
    }
    A* out = loss ? static_cast<A*>(loss->data_ptr()) : nullptr;
    const int64_t rows = losses.one_by_one ? in.count : 1, parts = losses.one_by_one ? in.tiles : blocks;
    if (losses.one_by_one && in.tiles == 1) {
      losses.each = out;
    } else if (loss) {
      losses.partial = scratch.doubles(rows * parts);
      losses.sum = out;
    }
    device.launch(Grid{blocks, kMatchThreads}, match_kernel<T, kTeam, kWidth>, in, factors, losses);
    if (loss && !losses.each && !losses.finished) fold(device, losses.partial, rows, parts, out);
  });
}

std::tuple<Tensor, Tensor> feature_match(const Tensor& student, const Tensor& teacher,
    const std::optional<Tensor>& weight, bool normalize, int64_t reduction, bool with_gradient) {
  const ScalarType type = student.scalar_type();
  Tensor gradient = with_gradient ? torch::stable::empty_like(student) : new_empty(student, {0}, type);
  std::vector<int64_t> shape;
  if (reduction == kNone) shape.push_back(student.size(0));
  Tensor loss = new_empty(student, shape, accumulator_type(type));
  dispatch_floating(type, "student", [&](auto zero) {
    match<decltype(zero)>(
        student, teacher, weight, normalize, reduction, nullptr, &loss, with_gradient ? &gradient : nullptr);
  });
  return {loss, gradient};
}

Tensor feature_match_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
    const std::optional<Tensor>& weight, bool normalize, int64_t reduction) {
  Tensor gradient = torch::stable::empty_like(student);
  dispatch_floating(student.scalar_type(), "student", [&](auto zero) {
    match<decltype(zero)>(student, teacher, weight, normalize, reduction, &grad_output, nullptr, &gradient);
  });
  return gradient;
}

void feature_match_scale_(Tensor gradient, const Tensor& grad_output) {
  const Device device(gradient);
  dispatch_floating(gradient.scalar_type(), "gradient", [&](auto zero) {
    using T = decltype(zero);
    Samples<T> in = describe<T>(gradient, gradient, &gradient);
    with_tiles(in, [&](auto team, auto width) {
      constexpr int kTeam = decltype(team)::value;
      const Grid grid = {grid_blocks(device, in.count * in.tiles, kMatchThreads / kTeam), kMatchThreads};
      device.launch(grid, scale_kernel<T, kTeam, decltype(width)::value>, in, Numbers(grad_output));
    });
  });
}

}  // namespace
}  // namespace debiaskd

DEBIASKD_CUDA_LIBRARY(m) {
  m.impl("feature_match", TORCH_BOX(&debiaskd::feature_match));
  m.impl("feature_match_backward", TORCH_BOX(&debiaskd::feature_match_backward));
  m.impl("feature_match_scale_", TORCH_BOX(&debiaskd::feature_match_scale_));
}
