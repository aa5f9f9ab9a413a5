// Exact backdoor adjustment on the GPU: two log-matrix-products forward, their adjoints backward.
//
// With A [N,K] the feature's logits, B [Z,K] the contexts' and L [N,Z] the log prior (derived in ops/backdoor.py):
//
//   S_nz = log sum_k exp(A_nk + B_zk)    V = L - S    T_nk = log sum_z exp(V_nz + B_zk)    output = A + T
//
// Shifted by maxima a, b over classes, and w over strata,
//
//   P_nk = exp(A - a_n)    Q_zk = exp(B - b_z)    W_nz = exp(V + b_z - w_n)    S = log P Q' + a + b    T = log W Q + w
//
// and with G_nk = g exp(w_n - T), H_nz = h exp(a_n + b_z - S), which is g or h over the sums within those logarithms,
//
//   h = -W . (G Q')    dA = g + P . (H Q)    dB = Q . (W' G + H' P)
//
// P, Q and W are at most 1. Where a sum is below kSmallest it is taken term by term, and so is what it divides in G or
// H (backdoor_far.cuh). In backward w_n is the largest T_nk: no more than log Z above, and it takes no b.
//
// Flops: 2 products of N Z K multiplications forward and 4 backward, beside which, in tiles of 64 by 64, there is one
// exponential for 32 of them. N = 1024 and Z = K = 1000 are 1.0e9 multiplications each, and one by one exponentials
// would be as many, at an eighth of the speed. Bytes: a block reads both sides of its tile, which caches hold; [N,Z] is
// all that is written besides results, and read again.
//
// Launches: 2 forward and 2 backward, since S has to be whole before T, and h before dA and dB. With more than
// kOwnMaxima classes blocks no longer find the maxima of their own rows, which takes one more launch, before the
// others. Everything is read in place, whatever its strides.

#include "cuda/backdoor_kernels.cuh"

namespace debiaskd {
namespace {

constexpr int64_t kOwnMaxima = 256;
// ---- the ops ----

// Calls function with 64 or 32, the lines of a tile: 64 multiply faster, where there are enough of them for the device.
template <typename A, typename Function>
void with_tile(const Device& device, const std::vector<std::pair<int64_t, int64_t>>& results, Function&& function) {
  if constexpr (std::is_same_v<A, float>) {
    int64_t tiles = 0;
    bool filled = true;
    for (const auto& [height, width] : results) {
      tiles += Tiling<A, 64>::count(height) * Tiling<A, 64>::count(width);
      filled = filled && height > 32 && width > 32;
    }
    if (filled && tiles >= device.processors()) return function(std::integral_constant<int, 64>{});
  }
  function(std::integral_constant<int, 32>{});
}

template <typename A, int TILE>
Grid grid(int64_t tiles) {
  return {tiles, kThreads, sizeof(typename Tiling<A, TILE>::Shared)};
}

// The logits and their maxima a, b and w, as matrices of exponentials.
template <typename A>
struct Logits {
  const Tensor &a, &b, &prior;
  int64_t samples, classes, strata;
  Tensor of_strata, of_samples;  // b; a and w

  Logits(const Tensor& feature_logits, const Tensor& context_logits, const Tensor& log_prior)
      : a(feature_logits), b(context_logits), prior(log_prior) {
    samples = a.size(0), classes = a.size(1), strata = b.size(0);
    of_strata = new_empty(a, {strata}, a.scalar_type());
    of_samples = new_empty(a, {2, samples}, a.scalar_type());
  }

  A* b_max() const { return static_cast<A*>(of_strata.data_ptr()); }
  A* a_max() const { return static_cast<A*>(of_samples.data_ptr()); }
  A* w_max() const { return a_max() + samples; }

  Exponents<A> p() const { return {samples, classes, Matrix<A>(a), {}, {}, a_max(), -1}; }
  Exponents<A> q() const { return {strata, classes, Matrix<A>(b), {}, {}, b_max(), -1}; }
  Exponents<A> w(const Tensor& norm) const {
    return {samples, strata, Matrix<A>(prior), Matrix<A>(norm), {}, w_max(), -1, b_max()};
  }
  Exponents<A> g(const Tensor& output, const Tensor& grad_output) const {
    return {samples, classes, Matrix<A>(a), Matrix<A>(output), Matrix<A>(grad_output), w_max(), 1};
  }
  Exponents<A> h(const Tensor& norm, const Tensor& grad_norm) const {
    return {samples, strata, {}, Matrix<A>(norm), Matrix<A>(grad_norm), a_max(), 1, b_max()};
  }
  Maxima<A> of_a() const { return {Matrix<A>(a), {}, samples, classes, a_max()}; }
  Maxima<A> of_b() const { return {Matrix<A>(b), {}, strata, classes, b_max()}; }
  // max_k T_nk
  Maxima<A> of_w(const Tensor& output) const { return {Matrix<A>(output), Matrix<A>(a), samples, classes, w_max()}; }

  // Whether blocks find maxima for themselves; if none of them would come by all rows, they cannot.
  bool own() const { return classes <= kOwnMaxima && samples > 0 && strata > 0; }

  void find(const Device& device, const AllMaxima<A>& all) const {
    int64_t rows = 0;
    for (const Maxima<A>& of : all.of) rows += of.rows;
    device.launch(Grid{grid_blocks(device, rows, kThreads / 32), kThreads}, maxima_kernel<A>, all);
  }
};

template <typename A>
std::tuple<Tensor, Tensor> forward(const Tensor& a, const Tensor& b, const Tensor& log_prior) {
  const Device device(a);
  const Logits<A> logits(a, b, log_prior);
  const int64_t samples = logits.samples, strata = logits.strata, classes = logits.classes;
  Tensor norm = new_empty(a, {samples, strata}, a.scalar_type());
  Tensor output = new_empty(a, {samples, classes}, a.scalar_type());
  LogProduct<A> s = {{{logits.p(), false}, {logits.q(), false}, classes}, samples, strata,
      static_cast<A*>(norm.data_ptr()), logits.a_max(), logits.b_max()};
  s.prior = Matrix<A>(log_prior);
  if (logits.own()) {
    s.of_rows = logits.of_a(), s.of_columns = logits.of_b();
  } else {
    logits.find(device, {{logits.of_a(), logits.of_b()}});
  }
  Tensor parts;
  with_tile<A>(device, {{samples, strata}}, [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    const int64_t across = Tiling<A, kTile>::count(strata);
    parts = new_empty(a, {samples, across}, a.scalar_type());
    s.parts = static_cast<A*>(parts.data_ptr());
    const int64_t tiles = Tiling<A, kTile>::count(samples) * across;
    device.launch(grid<A, kTile>(tiles), log_product_kernel<A, kTile>, s);
  });

  LogProduct<A> t = {{{logits.w(norm), false}, {logits.q(), true}, strata}, samples, classes,
      static_cast<A*>(output.data_ptr()), logits.w_max()};
  t.base = Matrix<A>(a);
  t.of_rows = {Matrix<A>(parts), {}, samples, parts.size(1), logits.w_max()};
  with_tile<A>(device, {{samples, classes}}, [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    const int64_t tiles = Tiling<A, kTile>::count(samples) * Tiling<A, kTile>::count(classes);
    device.launch(grid<A, kTile>(tiles), log_product_kernel<A, kTile>, t);
  });
  return {output, norm};
}

template <typename A>
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& a, const Tensor& b,
    const Tensor& log_prior, const Tensor& norm, const Tensor& output, bool with_context) {
  const Device device(a);
  const Logits<A> logits(a, b, log_prior);
  const int64_t samples = logits.samples, strata = logits.strata, classes = logits.classes;
  const ScalarType type = a.scalar_type();
  Tensor grad_norm = new_empty(a, {samples, strata}, type), grad_feature = new_empty(a, {samples, classes}, type);
  Tensor grad_context = with_context ? new_empty(a, {strata, classes}, type) : new_empty(a, {0}, type);
  const Exponents<A> p = logits.p(), q = logits.q(), w = logits.w(norm), g = logits.g(output, grad_output);

  ScaledSums<A> of_norm = {true};
  of_norm.sums[0] = {{{{g, false}, {q, false}, classes}}, 1, w, static_cast<A*>(grad_norm.data_ptr()), -1};
  if (logits.own()) {
    of_norm.of_rows[0] = logits.of_a(), of_norm.of_rows[1] = logits.of_w(output), of_norm.of_columns = logits.of_b();
  } else {
    logits.find(device, {{logits.of_a(), logits.of_w(output), logits.of_b()}});
  }
  with_tile<A>(device, {{samples, strata}}, [&](auto tile) {
    constexpr int kTile = decltype(tile)::value;
    of_norm.first = Tiling<A, kTile>::count(samples) * Tiling<A, kTile>::count(strata);
    device.launch(grid<A, kTile>(of_norm.first), scaled_sum_kernel<A, kTile>, of_norm);
  });

  ScaledSums<A> of_logits = {false};
  const Exponents<A> h = logits.h(norm, grad_norm);
  of_logits.sums[0] = {
      {{{h, false}, {q, true}, strata}}, 1, p, static_cast<A*>(grad_feature.data_ptr()), 1, Matrix<A>(grad_output)};
  std::vector<std::pair<int64_t, int64_t>> results = {{samples, classes}};
  if (with_context) {
    of_logits.sums[1] = {{{{w, true}, {g, true}, samples}, {{h, true}, {p, true}, samples}}, 2, q,
        static_cast<A*>(grad_context.data_ptr())};
    results.push_back({strata, classes});
  }
  with_tile<A>(device, results, [&](auto tile) {
    using T = Tiling<A, decltype(tile)::value>;
    of_logits.first = T::count(samples) * T::count(classes);
    const int64_t tiles = of_logits.first + (with_context ? T::count(strata) * T::count(classes) : 0);
    device.launch(grid<A, decltype(tile)::value>(tiles), scaled_sum_kernel<A, decltype(tile)::value>, of_logits);
  });
  return {grad_feature, grad_context};
}

std::tuple<Tensor, Tensor> backdoor(
    const Tensor& feature_logits, const Tensor& context_logits, const Tensor& log_prior) {
  const ScalarType type = feature_logits.scalar_type();
  if (type == ScalarType::Double) return forward<double>(feature_logits, context_logits, log_prior);
  STD_TORCH_CHECK(type == ScalarType::Float, "feature_logits must be float32 or float64");
  return forward<float>(feature_logits, context_logits, log_prior);
}

std::tuple<Tensor, Tensor> backdoor_backward(const Tensor& grad_output, const Tensor& feature_logits,
    const Tensor& context_logits, const Tensor& log_prior, const Tensor& norm, const Tensor& output,
    bool with_context) {
  const ScalarType type = feature_logits.scalar_type();
  if (type == ScalarType::Double) {
    return backward<double>(grad_output, feature_logits, context_logits, log_prior, norm, output, with_context);
  }
  STD_TORCH_CHECK(type == ScalarType::Float, "feature_logits must be float32 or float64");
  return backward<float>(grad_output, feature_logits, context_logits, log_prior, norm, output, with_context);
}

}  // namespace
}  // namespace debiaskd

DEBIASKD_CUDA_LIBRARY(m) {
  m.impl("backdoor", TORCH_BOX(&debiaskd::backdoor));
  m.impl("backdoor_backward", TORCH_BOX(&debiaskd::backdoor_backward));
}
