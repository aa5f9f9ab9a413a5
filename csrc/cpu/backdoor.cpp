// Exact backdoor adjustment on the CPU: two log-matrix-products forward, their adjoints backward.
//
// With A [N,K] the feature's logits, B [Z,K] the contexts' and L [N,Z] the log prior (derived in ops/backdoor.py):
//
//   S_nz = log sum_k exp(A_nk + B_zk)    V = L - S    T_nk = log sum_z exp(V_nz + B_zk)    output = A + T
//
// Both products share one scaled copy of the contexts, Q_zk = exp(B_zk - d_k - b_z): subtracting each class's maximum
// d_k first and each stratum's maximum b_z then leaves 1 as the largest entry of every row and of every column.
// P_nk = exp(A_nk + d_k - a_n) and W_nz = exp(V_nz + b_z - w_n) meet it in P Q' and W Q, with 1 as the largest entry of
// every row. Products are PyTorch's own matrix products; here are the exponentials around them, and what log_product.h
// says of sums that come out too small.
//
// Flops: 2 products of N*Z*K forward, 4 backward. Bytes: a few passes over [N,K], [N,Z] and [Z,K]; nothing larger.

#include <atomic>

#include "common/stable.h"
#include "cpu/log_product.h"
#include "cpu/matmul.h"

namespace debiaskd {
namespace {

constexpr int64_t kElementsPerTask = 16384;

template <typename Row>
void for_rows(int64_t rows, int64_t length, Row&& row) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(i);
  });
}

template <typename A>
A* data(const Tensor& tensor) {
  return static_cast<A*>(tensor.data_ptr());
}

// exponentials = exp(values + offset - shift), 1 at the largest of each row.
template <typename A>
struct Scaled {
  Tensor exponentials;
  std::vector<A> shift;
};

template <typename A>
Scaled<A> scale_rows(const Tensor& values, const std::vector<A>& offset) {
  const int64_t rows = values.size(0), n = values.size(1);
  Scaled<A> scaled{torch::stable::empty_like(values), std::vector<A>(rows)};
  for_rows(rows, n, [&](int64_t i) {
    const A* x = data<A>(values) + i * n;
    scaled.shift[i] = as_shift(largest(x, offset.data(), n));
    exp_row(x, offset.data(), scaled.shift[i], data<A>(scaled.exponentials) + i * n, n);
  });
  return scaled;
}

// The contexts' logits B, scaled by classes and by strata.
template <typename A>
struct Contexts {
  explicit Contexts(const Tensor& logits) : classes(logits.size(1), std::numeric_limits<A>::lowest()) {
    const int64_t strata = logits.size(0), n = logits.size(1);
    for_rows((n + kTermsAtOnce - 1) / kTermsAtOnce, strata * kTermsAtOnce, [&](int64_t block) {
      const int64_t k = block * kTermsAtOnce, count = std::min(kTermsAtOnce, n - k);
      for (int64_t z = 0; z < strata; ++z) max_into(data<A>(logits) + z * n + k, classes.data() + k, count);
    });
    std::vector<A> minus(n);
    for (int64_t k = 0; k < n; ++k) minus[k] = -classes[k];
    scaled = scale_rows(logits, minus);
  }

  const Tensor& exponentials() const { return scaled.exponentials; }
  const std::vector<A>& strata() const { return scaled.shift; }

  std::vector<A> classes;
  Scaled<A> scaled;
};

// Rows of a log-matrix-product, x_i or y_j, and the shifts that they were scaled by.
template <typename A>
struct Side {
  const Tensor& values;
  const std::vector<A>& shift;
};

// right.values, made contiguous where a sum asks for it: most often none does.
template <typename A>
struct Lazy {
  const A* rows(const Tensor& values) {
    if (!contiguous) contiguous = torch::stable::contiguous(values);
    return data<A>(*contiguous);
  }
  std::optional<Tensor> contiguous;
};

template <typename A>
bool any_small(const Tensor& sums) {
  const int64_t n = sums.size(1);
  std::atomic<bool> found{false};
  for_rows(sums.size(0), n, [&](int64_t i) {
    if (smallest(data<A>(sums) + i * n, n) < kSmallest<A>) found.store(true, std::memory_order_relaxed);
  });
  return found.load();
}

// From the product of the scaled sides to out_ij = log sum_l exp(x_il + y_jl), in place.
template <typename A>
void take_logs(const Tensor& sums, const Side<A>& left, const Side<A>& right) {
  const int64_t n = sums.size(1), length = left.values.size(1);
  const A* x = data<A>(left.values);
  Lazy<A> lazy;
  const A* y = any_small<A>(sums) ? lazy.rows(right.values) : nullptr;
  for_rows(sums.size(0), n, [&](int64_t i) {
    A* row = data<A>(sums) + i * n;
    std::vector<int64_t> small;
    if (y && smallest(row, n) < kSmallest<A>) {
      for (int64_t j = 0; j < n; ++j) {
        if (row[j] < kSmallest<A>) small.push_back(j);
      }
    }
    log_row(row, right.shift.data(), left.shift[i], n);
    for (int64_t j : small) row[j] = log_sum_row(x + i * length, y + j * length, length);
  });
}

// factor / sums of the scaled product, from their logarithms; 0 for sums too small. Sets `far` where there are any.
template <typename A>
Tensor divide(const Tensor& factor, const Tensor& logs, const Side<A>& left, const Side<A>& right, bool& far) {
  const int64_t n = logs.size(1);
  Tensor quotient = torch::stable::empty_like(logs);
  std::atomic<bool> found{false};
  for_rows(logs.size(0), n, [&](int64_t i) {
    const A *f = data<A>(factor) + i * n, *sum = data<A>(logs) + i * n;
    if (divide_row(f, sum, right.shift.data(), left.shift[i], data<A>(quotient) + i * n, n)) {
      found.store(true, std::memory_order_relaxed);
    }
  });
  far = found.load();
  return quotient;
}

// What `divide` left out, for the rows of x: target_i += sign * sum_j factor_ij exp(x_i + y_j - logs_ij). With
// `swapped` for the rows of y, and logs and factor as they lie, [j, i] for it. One thread a row: no order depends on
// threads.
template <typename A>
void add_far(const Tensor& target, A sign, const Tensor& factor, const Tensor& logs, const Side<A>& left,
    const Side<A>& right, bool swapped) {
  const int64_t rows = left.values.size(0), others = right.values.size(0), length = left.values.size(1);
  const int64_t row_step = swapped ? 1 : others, other_step = swapped ? rows : 1;
  const Tensor x = torch::stable::contiguous(left.values), y = torch::stable::contiguous(right.values);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < others; ++j) {
        const int64_t at = i * row_step + j * other_step;
        const A log_sum = data<A>(logs)[at];
        const A scale = sign * data<A>(factor)[at];
        if (!((right.shift[j] + left.shift[i]) - log_sum > kFarthest<A>) || scale == A(0)) continue;
        add_exp_row(
            data<A>(x) + i * length, data<A>(y) + j * length, log_sum, scale, data<A>(target) + i * length, length);
      }
    }
  });
}

// target = plus + sign * target * factor
template <typename A>
void scale_by(const Tensor& target, A sign, const Tensor& factor, const Tensor* plus) {
  const int64_t n = target.size(1);
  for_rows(target.size(0), n, [&](int64_t i) {
    A* t = data<A>(target) + i * n;
    const A* f = data<A>(factor) + i * n;
    const A* p = plus ? data<A>(*plus) + i * n : nullptr;
    for (int64_t j = 0; j < n; ++j) t[j] = sign * t[j] * f[j];
    for (int64_t j = 0; p && j < n; ++j) t[j] += p[j];
  });
}

// ---- the ops ----

template <typename A>
std::tuple<Tensor, Tensor> forward(const Tensor& a, const Tensor& b, const Tensor& log_prior) {
  const int64_t samples = a.size(0), strata = b.size(0), n = a.size(1);
  const Contexts<A> contexts(b);
  const Scaled<A> feature = scale_rows(a, contexts.classes);
  Tensor norm = new_empty(a, {samples, strata}, a.scalar_type());
  matmul_into(norm, feature.exponentials, transposed(contexts.exponentials()));
  take_logs<A>(norm, {a, feature.shift}, {b, contexts.strata()});

  const Tensor evidence = torch::stable::contiguous(torch::stable::subtract(log_prior, norm));
  const Scaled<A> posterior = scale_rows(evidence, contexts.strata());
  Tensor output = new_empty(a, {samples, n}, a.scalar_type());
  matmul_into(output, posterior.exponentials, contexts.exponentials());
  take_logs<A>(output, {evidence, posterior.shift}, {transposed(b), contexts.classes});
  for_rows(samples, n, [&](int64_t i) {
    A* target = data<A>(output) + i * n;
    const A* of_feature = data<A>(a) + i * n;
    for (int64_t k = 0; k < n; ++k) target[k] += of_feature[k];
  });
  return {output, norm};
}

template <typename A>
std::tuple<Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& a, const Tensor& b,
    const Tensor& log_prior, const Tensor& norm, const Tensor& output, bool with_context) {
  const int64_t strata = b.size(0), n = b.size(1);
  const ScalarType type = a.scalar_type();
  const Contexts<A> contexts(b);
  const Scaled<A> feature = scale_rows(a, contexts.classes);
  const Tensor evidence = torch::stable::contiguous(torch::stable::subtract(log_prior, norm));
  const Scaled<A> posterior = scale_rows(evidence, contexts.strata());
  const Tensor class_norm = torch::stable::contiguous(torch::stable::subtract(output, a)), b_rows = transposed(b);
  const Side<A> feature_side{a, feature.shift}, context_side{b, contexts.strata()};
  const Side<A> evidence_side{evidence, posterior.shift}, class_side{b_rows, contexts.classes};
  bool far_classes = false, far_strata = false;

  // Of T: the gradient of S is minus that of V.
  const Tensor by_class = divide(grad_output, class_norm, evidence_side, class_side, far_classes);
  Tensor grad_norm = torch::stable::empty_like(norm);
  matmul_into(grad_norm, by_class, transposed(contexts.exponentials()));
  scale_by<A>(grad_norm, -1, posterior.exponentials, nullptr);
  if (far_classes) add_far<A>(grad_norm, -1, grad_output, class_norm, evidence_side, class_side, false);

  // Of S.
  const Tensor by_stratum = divide(grad_norm, norm, feature_side, context_side, far_strata);
  Tensor grad_feature = torch::stable::empty_like(a);
  matmul_into(grad_feature, by_stratum, contexts.exponentials());
  scale_by<A>(grad_feature, 1, feature.exponentials, &grad_output);
  if (far_strata) add_far<A>(grad_feature, 1, grad_norm, norm, feature_side, context_side, false);
  if (!with_context) return {grad_feature, new_empty(a, {0}, type)};

  Tensor grad_context = new_empty(a, {strata, n}, type), of_norm = new_empty(a, {strata, n}, type);
  matmul_into(grad_context, transposed(posterior.exponentials), by_class);
  matmul_into(of_norm, transposed(by_stratum), feature.exponentials);
  for_rows(strata, n, [&](int64_t z) {
    A* target = data<A>(grad_context) + z * n;
    const A *other = data<A>(of_norm) + z * n, *q = data<A>(contexts.exponentials()) + z * n;
    for (int64_t k = 0; k < n; ++k) target[k] = (target[k] + other[k]) * q[k];
  });
  if (far_strata) add_far<A>(grad_context, 1, grad_norm, norm, context_side, feature_side, true);
  if (far_classes) {
    Tensor by_rows = torch::stable::contiguous(transposed(grad_context));
    add_far<A>(by_rows, 1, grad_output, class_norm, class_side, evidence_side, true);
    torch::stable::copy_(grad_context, transposed(by_rows));
  }
  return {grad_feature, grad_context};
}

std::tuple<Tensor, Tensor> backdoor(
    const Tensor& feature_logits, const Tensor& context_logits, const Tensor& log_prior) {
  const Tensor a = torch::stable::contiguous(feature_logits), b = torch::stable::contiguous(context_logits);
  if (a.scalar_type() == ScalarType::Double) return forward<double>(a, b, log_prior);
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float, "feature_logits must be float32 or float64");
  return forward<float>(a, b, log_prior);
}

std::tuple<Tensor, Tensor> backdoor_backward(const Tensor& grad_output, const Tensor& feature_logits,
    const Tensor& context_logits, const Tensor& log_prior, const Tensor& norm, const Tensor& output,
    bool with_context) {
  const Tensor a = torch::stable::contiguous(feature_logits), b = torch::stable::contiguous(context_logits);
  const Tensor g = torch::stable::contiguous(grad_output);
  if (a.scalar_type() == ScalarType::Double) return backward<double>(g, a, b, log_prior, norm, output, with_context);
  STD_TORCH_CHECK(a.scalar_type() == ScalarType::Float, "feature_logits must be float32 or float64");
  return backward<float>(g, a, b, log_prior, norm, output, with_context);
}

}  // namespace
}  // namespace debiaskd

STABLE_TORCH_LIBRARY_IMPL(debiaskd, CPU, m) {
  m.impl("backdoor", TORCH_BOX(&debiaskd::backdoor));
  m.impl("backdoor_backward", TORCH_BOX(&debiaskd::backdoor_backward));
}
