// Exact backdoor adjustment on the GPU: two log-matrix-products forward, their adjoints backward.
//
// With A [N,K] the feature's logits, B [Z,K] the contexts' and L [N,Z] the log prior (derived in ops/backdoor.py):
//
//   S_nz = log sum_k exp(A_nk + B_zk)    V = L - S    T_nk = log sum_z exp(V_nz + B_zk)    output = A + T
//
// As on the CPU, Q_zk = exp(B_zk - d_k - b_z) has 1 as the largest entry of every row and column, where d are the
// maxima of classes and b those of strata after them. P_nk = exp(A_nk + d_k - a_n) and W_nz = exp(V_nz + b_z - w_n)
// have 1 as the largest entry of every row, and
//
//   S = log P Q' + a + b    T = log W Q + w + d
//
// A sum below kSmallest is added up again term by term (common/log_range.h). Backward, with G = g exp(w + d - T) and
// H = h exp(a + b - S), which are g and h over those sums,
//
//   h = -W . (G Q')    dA = g + P . (H Q)    dB = Q . (W' G + H' P)
//
// where G and H are 0 for sums that were too small; what those would have divided is added term by term.
//
// Flops: 2 products of N Z K multiplications forward and 4 backward, in float32 or float64. Bytes: a few passes over
// [N,K], [N,Z] and [Z,K]. Launches: 10 forward and 18 backward. Inputs that are
// not contiguous are copied.

#include "cuda/backdoor_kernels.cuh"

namespace debiaskd {
namespace {

template <typename A>
A* data(const Tensor& tensor) {
  return static_cast<A*>(tensor.data_ptr());
}

template <typename A>
Matrix<A> matrix(const Tensor& tensor) {
  return {data<std::remove_const_t<A>>(tensor), tensor.stride(0), tensor.stride(1)};
}

Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

Tensor difference(const Tensor& left, const Tensor& right) {
  return torch::stable::contiguous(torch::stable::subtract(left, right));
}

// Exponentials of logs, padded, and the shifts that they were scaled by.
struct Scaled {
  Tensor logs, shift, exponentials;
};

// A call's launches, in the order of the formulas above.
template <typename A>
class Backdoor {
 public:
  Backdoor(const Tensor& feature_logits, const Tensor& context_logits) : device_(feature_logits) {
    const Tensor b = torch::stable::contiguous(context_logits);
    classes = {torch::stable::contiguous(transposed(b)), new_empty(b, {b.size(1)}, b.scalar_type()), {}};
    device_.launch(Grid{b.size(1), kBackdoorThreads}, scale_rows_kernel<A>, data<const A>(classes.logs),
        static_cast<const A*>(nullptr), A(0), b.size(1), b.size(0), data<A>(classes.shift), static_cast<A*>(nullptr));
    q = scale_rows(b, classes, -1);
    p = scale_rows(torch::stable::contiguous(feature_logits), classes, 1);
  }

  Scaled scale_rows(const Tensor& logs, const Scaled& other, int sign) const {
    const int64_t rows = logs.size(0), length = logs.size(1);
    const Scaled scaled = {logs, new_empty(logs, {rows}, logs.scalar_type()), padded_like(logs)};
    device_.launch(Grid{padded(rows), kBackdoorThreads}, scale_rows_kernel<A>, data<const A>(logs),
        data<const A>(other.shift), A(sign), rows, length, data<A>(scaled.shift), data<A>(scaled.exponentials));
    return scaled;
  }

  Tensor divide(const Tensor& factor, const Tensor& logs, const Scaled& rows, const Scaled& columns, int* far) const {
    const Tensor quotient = padded_like(logs);
    device_.launch(Grid{padded(logs.size(0)), kBackdoorThreads}, divide_kernel<A>, data<const A>(factor),
        data<const A>(logs), data<const A>(rows.shift), data<const A>(columns.shift), logs.size(0), logs.size(1),
        data<A>(quotient), far);
    return quotient;
  }

  // x y' or, ACROSS, with either of them transposed; `terms` of them.
  template <bool X_ACROSS, bool Y_ACROSS>
  void multiply(const Tensor& x, const Tensor& y, int64_t terms, const Tensor& out, bool add = false) const {
    const int64_t height = out.size(0), width = out.size(1);
    const Product<A> job = {
        data<const A>(x), data<const A>(y), x.size(1), y.size(1), padded(terms), data<A>(out), height, width, add};
    const int64_t tiles = padded(height) / kProductTile * (padded(width) / kProductTile);
    constexpr int64_t kShared = sizeof(ProductTerms<A>);
    device_.launch(Grid{tiles, kBackdoorThreads, kShared}, product_kernel<A, X_ACROSS, Y_ACROSS>, job);
  }

  void take_logs(const Tensor& sums, const Scaled& rows, const Scaled& columns, const Tensor* base) const {
    device_.launch(Grid{sums.size(0), kBackdoorThreads}, log_sums_kernel<A>, data<A>(sums), data<const A>(rows.shift),
        data<const A>(columns.shift), base ? data<const A>(*base) : nullptr, sums.size(1), data<const A>(rows.logs),
        data<const A>(columns.logs), rows.logs.size(1));
  }

  // out, a product with `factor` over sums of rows' and columns' terms, becomes the gradient of the rows' logits.
  void finish(const Tensor& out, int sign, const Tensor* base, bool scaled, const int* far, const Tensor& factor,
      const Tensor& logs, const Scaled& rows, const Scaled& columns) const {
    const Gradient<A> job = {matrix<A>(out), out.size(1), scaled ? data<const A>(rows.exponentials) : nullptr, A(sign),
        base ? data<const A>(*base) : nullptr, far, matrix<const A>(factor), matrix<const A>(logs),
        matrix<const A>(rows.logs), matrix<const A>(columns.logs), data<const A>(rows.shift),
        data<const A>(columns.shift), logs.size(1)};
    device_.launch(Grid{out.size(0), kBackdoorThreads}, gradient_kernel<A>, job);
  }

  Scaled classes, p, q;  // classes: B' and d

 private:
  static Tensor padded_like(const Tensor& x) {
    return new_empty(x, {padded(x.size(0)), padded(x.size(1))}, x.scalar_type());
  }

  Device device_;
};

template <typename A>
std::tuple<Tensor, Tensor> forward(const Tensor& feature_logits, const Tensor& b, const Tensor& log_prior) {
  const Backdoor<A> op(feature_logits, b);
  const Tensor& a = op.p.logs;
  const int64_t samples = a.size(0), classes = a.size(1), strata = b.size(0);
  const Tensor norm = new_empty(a, {samples, strata}, a.scalar_type());
  const Tensor output = new_empty(a, {samples, classes}, a.scalar_type());
  op.template multiply<false, false>(op.p.exponentials, op.q.exponentials, classes, norm);
  op.take_logs(norm, op.p, op.q, nullptr);
  const Scaled w = op.scale_rows(difference(log_prior, norm), op.q, 1);
  op.template multiply<false, true>(w.exponentials, op.q.exponentials, strata, output);
  op.take_logs(output, w, op.classes, &a);
  return {output, norm};
}

template <typename A>
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& feature_logits, const Tensor& b,
    const Tensor& log_prior, const Tensor& norm, const Tensor& output, bool with_context) {
  const Backdoor<A> op(feature_logits, b);
  const Scaled &p = op.p, &q = op.q, w = op.scale_rows(difference(log_prior, norm), q, 1);
  const int64_t samples = p.logs.size(0), classes = p.logs.size(1), strata = b.size(0);
  const ScalarType type = b.scalar_type();
  const Tensor g = torch::stable::contiguous(grad_output), t = difference(output, p.logs);
  const Tensor flags = torch::stable::new_zeros(b, {2}, ScalarType::Int);
  int *const far_classes = data<int>(flags), *const far_strata = far_classes + 1;

  const Tensor by_class = op.divide(g, t, w, op.classes, far_classes);  // G
  const Tensor grad_norm = new_empty(b, {samples, strata}, type);       // -h
  op.template multiply<false, false>(by_class, q.exponentials, classes, grad_norm);
  op.finish(grad_norm, -1, nullptr, true, far_classes, g, t, w, op.classes);

  const Tensor by_stratum = op.divide(grad_norm, norm, p, q, far_strata);  // -H
  const Tensor grad_feature = new_empty(b, {samples, classes}, type);
  op.template multiply<false, true>(by_stratum, q.exponentials, strata, grad_feature);
  op.finish(grad_feature, 1, &g, true, far_strata, grad_norm, norm, p, q);
  if (!with_context) return {grad_feature, new_empty(b, {0}, type)};

  const Tensor grad_context = new_empty(b, {strata, classes}, type);
  op.template multiply<true, true>(w.exponentials, by_class, samples, grad_context);
  op.template multiply<true, true>(by_stratum, p.exponentials, samples, grad_context, true);
  op.finish(grad_context, 1, nullptr, true, far_strata, transposed(grad_norm), transposed(norm), q, p);
  op.finish(transposed(grad_context), 1, nullptr, false, far_classes, transposed(g), transposed(t), op.classes, w);
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
