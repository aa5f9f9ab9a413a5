// Weighted feature matching on the CPU: loss and gradient in one pass over student and teacher.
//
// Bytes: reads the student and the teacher once and writes the gradient once, 3 passes; with normalize=true the teacher
// is read once more, for its norm. Work is cut into blocks of about kBlock elements within a sample; each block
// leaves one partial sum, and partial sums are added in their order: the number of threads changes no bit.

#include <algorithm>
#include <cmath>

#include "common/stable.h"
#include "cpu/half.h"
#include "cpu/lanes.h"
#include "cpu/sample_blocks.h"
#include "cpu/sample_weights.h"
#include "cpu/vectorize.h"
#include "cpu/x86.h"

namespace debiaskd {
namespace {

// ---- inner loops: a row of elements ----

template <typename T, typename A>
DEBIASKD_INLINE double match_body(const T* s, const T* t, T* g, int64_t n, A scale) {
  const auto square = [=](int64_t i) __attribute__((always_inline)) {
    const A d = load(s[i]) - load(t[i]);
    return d * d;
  };
  if (!g) return sum_in_lanes<A>(n, square);
  return sum_in_lanes<A>(n, [=](int64_t i) __attribute__((always_inline)) {
    const A d = load(s[i]) - load(t[i]);
    store(scale * d, g + i);
    return d * d;
  });
}

template <typename T, typename A>
DEBIASKD_INLINE double norm_body(const T* t, int64_t n) {
  return sum_in_lanes<A>(n, [=](int64_t i) __attribute__((always_inline)) { return load(t[i]) * load(t[i]); });
}

template <typename T, typename A>
DEBIASKD_INLINE void scale_body(T* g, int64_t n, A scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) store(load(g[i]) * scale, g + i);
}

#define DEBIASKD_ROWS(T, A)                                                                   \
  DEBIASKD_CLONES double match_row(const T* s, const T* t, T* g, int64_t n, A scale) {        \
    return match_body<T, A>(s, t, g, n, scale);                                               \
  }                                                                                           \
  DEBIASKD_CLONES double norm_row(const T* t, int64_t n, A) { return norm_body<T, A>(t, n); } \
  DEBIASKD_CLONES void scale_row(T* g, int64_t n, A scale) { scale_body<T, A>(g, n, scale); }
DEBIASKD_ROWS(float, float)
DEBIASKD_ROWS(double, double)
DEBIASKD_ROWS(BFloat16, float)
DEBIASKD_ROWS(Half, float)

// As match_row, the gradient streamed.
#if defined(DEBIASKD_AVX2)
DEBIASKD_AVX2 double match_streamed(const float* s, const float* t, float* g, int64_t n, float scale) {
  const int64_t head = std::min(floats_to_alignment(g), n);
  double total = match_row(s, t, g, head, scale);
  const __m256 factor = _mm256_set1_ps(scale);
  int64_t i = head;
  while (i + 8 <= n) {
    const int64_t end = std::min(n - 7, i + 4 * kRun);
    __m256 sum = _mm256_setzero_ps();
    for (; i < end; i += 8) {
      const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(s + i), _mm256_loadu_ps(t + i));
      sum = _mm256_fmadd_ps(d, d, sum);
      _mm256_stream_ps(g + i, _mm256_mul_ps(d, factor));
    }
    for (int lane = 0; lane < 8; ++lane) total += sum[lane];
  }
  _mm_sfence();
  return total + match_row(s + i, t + i, g + i, n - i, scale);
}
#endif

template <typename T, typename A>
double match_streamed(const T* s, const T* t, T* g, int64_t n, A scale) {
  return match_row(s, t, g, n, scale);
}

// ---- what each sample counts ----

// Factor of each sample's squared distance in the loss. Where nothing has weight the mean is 0, and so is a sample
// whose teacher is zero everywhere when distances are relative to it.
template <typename T>
std::vector<double> sample_factors(
    const Samples& samples, const T* teacher, const std::optional<Tensor>& weight, bool normalize, int64_t reduction) {
  std::vector<double> factors = read_weights(weight, samples.count);
  double total = 1.0;
  if (reduction == kMean) {
    total = 0.0;
    for (double w : factors) total += w;
  }
  std::vector<double> scale(samples.count, static_cast<double>(samples.elements));
  if (normalize) {
    scale = sum_per_sample(samples,
        [&](int64_t, int64_t at, int64_t n) { return norm_row(teacher + at, n, typename accumulator<T>::type{}); });
  }
  for (int64_t i = 0; i < samples.count; ++i) {
    const double divisor = scale[i] * total;
    factors[i] = divisor > 0 ? factors[i] / divisor : 0.0;
  }
  return factors;
}

// Squared distances; where `gradient` is given, also gradient = 2 * factor * (student - teacher).
template <typename T>
std::vector<double> match_pass(
    const Samples& samples, const T* student, const T* teacher, T* gradient, const std::vector<double>& factors) {
  using A = typename accumulator<T>::type;
  const bool stream = gradient && streams(samples.count * samples.elements * static_cast<int64_t>(sizeof(T)));
  return sum_per_sample(samples, [&](int64_t sample, int64_t at, int64_t n) {
    const A scale = static_cast<A>(2 * factors[sample]);
    T* out = gradient ? gradient + at : nullptr;
    return stream ? match_streamed(student + at, teacher + at, out, n, scale)
                  : match_row(student + at, teacher + at, out, n, scale);
  });
}

// ---- the ops ----

std::tuple<Tensor, Tensor> feature_match(const Tensor& student, const Tensor& teacher,
    const std::optional<Tensor>& weight, bool normalize, int64_t reduction, bool with_gradient) {
  const ScalarType type = student.scalar_type();
  Tensor gradient = with_gradient ? torch::stable::empty_like(student) : new_empty(student, {0}, type);
  const Samples samples(student, teacher);
  std::vector<int64_t> loss_shape;
  if (reduction == kNone) loss_shape.push_back(samples.count);
  Tensor loss = new_empty(student, loss_shape, accumulator_type(type));

  dispatch_floating(type, "student", [&](auto zero) {
    using T = decltype(zero);
    const T* s = static_cast<const T*>(student.data_ptr());
    const T* t = static_cast<const T*>(teacher.data_ptr());
    T* g = with_gradient ? static_cast<T*>(gradient.data_ptr()) : nullptr;
    const auto factors = sample_factors(samples, t, weight, normalize, reduction);
    const auto distances = match_pass(samples, s, t, g, factors);
    auto* out = static_cast<typename accumulator<T>::type*>(loss.data_ptr());
    double sum = 0.0;
    for (int64_t i = 0; i < samples.count; ++i) {
      const double value = factors[i] * distances[i];
      if (reduction == kNone) out[i] = value;
      sum += value;
    }
    if (reduction != kNone) out[0] = sum;
  });
  return {loss, gradient};
}

Tensor feature_match_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
    const std::optional<Tensor>& weight, bool normalize, int64_t reduction) {
  Tensor gradient = torch::stable::empty_like(student);
  const Samples samples(student, teacher);
  dispatch_floating(student.scalar_type(), "student", [&](auto zero) {
    using T = decltype(zero);
    const T* s = static_cast<const T*>(student.data_ptr());
    const T* t = static_cast<const T*>(teacher.data_ptr());
    auto factors = sample_factors(samples, t, weight, normalize, reduction);
    const auto upstream = read_vector(grad_output);
    for (size_t i = 0; i < factors.size(); ++i) factors[i] *= upstream[reduction == kNone ? i : 0];
    match_pass(samples, s, t, static_cast<T*>(gradient.data_ptr()), factors);
  });
  return gradient;
}

void feature_match_scale_(Tensor gradient, const Tensor& grad_output) {
  const auto upstream = read_vector(grad_output);
  const bool scalar = grad_output.dim() == 0;
  if (std::all_of(upstream.begin(), upstream.end(), [](double g) { return g == 1.0; })) return;
  const Samples samples(gradient, gradient);
  dispatch_floating(gradient.scalar_type(), "gradient", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    T* data = static_cast<T*>(gradient.data_ptr());
    sum_per_sample(samples, [&](int64_t sample, int64_t at, int64_t n) {
      const double scale = upstream[scalar ? 0 : sample];
      if (scale != 1.0) scale_row(data + at, n, static_cast<A>(scale));
      return 0.0;
    });
  });
}

}  // namespace
}  // namespace debiaskd

STABLE_TORCH_LIBRARY_IMPL(debiaskd, CPU, m) {
  m.impl("feature_match", TORCH_BOX(&debiaskd::feature_match));
  m.impl("feature_match_backward", TORCH_BOX(&debiaskd::feature_match_backward));
  m.impl("feature_match_scale_", TORCH_BOX(&debiaskd::feature_match_scale_));
}
