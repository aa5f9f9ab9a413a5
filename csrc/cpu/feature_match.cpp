// Weighted feature matching on the CPU: loss and gradient in one pass over student and teacher.
//
// Bytes: reads the student and the teacher once and writes the gradient once, 3 passes; with normalize=true the teacher
// is read once more, for its norm. Work is cut into blocks of about kBlock elements within a sample; each block
// leaves one partial sum, and partial sums are added in their order: the number of threads changes no bit.

#include <algorithm>
#include <cmath>

#include "common/stable.h"
#include "cpu/vectorize.h"

namespace debiaskd {
namespace {

constexpr int64_t kBlock = 16384;

// ---- inner loops: one row of elements, evenly spaced ------------------------------------------------------------------

template <typename T, typename A>
DEBIASKD_INLINE A match_body(const T* s, const T* t, T* g, int64_t n, A scale) {
  A sum = 0;
  if (g) {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const A d = static_cast<A>(s[i]) - static_cast<A>(t[i]);
      sum += d * d;
      g[i] = static_cast<T>(scale * d);
    }
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const A d = static_cast<A>(s[i]) - static_cast<A>(t[i]);
      sum += d * d;
    }
  }
  return sum;
}

template <typename T, typename A>
DEBIASKD_INLINE A norm_body(const T* t, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<A>(t[i]) * static_cast<A>(t[i]);
  return sum;
}

template <typename T, typename A>
DEBIASKD_INLINE void scale_body(T* g, int64_t n, A scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = static_cast<T>(static_cast<A>(g[i]) * scale);
}

#define DEBIASKD_ROWS(T, A)                                                                    \
  DEBIASKD_CLONES A match_row(const T* s, const T* t, T* g, int64_t n, A scale) {              \
    return match_body<T, A>(s, t, g, n, scale);                                                \
  }                                                                                            \
  DEBIASKD_CLONES A norm_row(const T* t, int64_t n, A) { return norm_body<T, A>(t, n); }       \
  DEBIASKD_CLONES void scale_row(T* g, int64_t n, A scale) { scale_body<T, A>(g, n, scale); }
DEBIASKD_ROWS(float, float)
DEBIASKD_ROWS(double, double)
DEBIASKD_ROWS(BFloat16, float)
DEBIASKD_ROWS(Half, float)

// Elements that do not lie side by side: rare, correct, without a copy.
template <typename T, typename A>
A match_strided(const T* s, const T* t, T* g, int64_t n, int64_t ss, int64_t ts, int64_t gs, A scale) {
  A sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const A d = static_cast<A>(s[i * ss]) - static_cast<A>(t[i * ts]);
    sum += d * d;
    if (g) g[i * gs] = static_cast<T>(scale * d);
  }
  return sum;
}

template <typename T, typename A>
A norm_strided(const T* t, int64_t n, int64_t ts) {
  A sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<A>(t[i * ts]) * static_cast<A>(t[i * ts]);
  return sum;
}

// ---- layout: a sample of both tensors as rows of evenly spaced elements --------------------------------------------

struct Axis {
  int64_t size, student, teacher, gradient;
};

struct Layout {
  int64_t samples, elements;                      // elements: in one sample
  int64_t student_step, teacher_step, gradient_step;  // from one sample to the next
  std::vector<Axis> outer;                        // slowest first
  Axis inner;
  int64_t rows, segments, length;  // a sample has rows * segments pieces, each of `length` elements or fewer
  int64_t blocks, pieces_per_block;

  bool contiguous() const { return inner.student == 1 && inner.teacher == 1 && inner.gradient == 1; }
};

Layout make_layout(const Tensor& student, const Tensor& teacher, const Tensor* gradient) {
  Layout layout{};
  layout.samples = student.size(0);
  layout.student_step = student.stride(0);
  layout.teacher_step = teacher.stride(0);
  layout.gradient_step = gradient ? gradient->stride(0) : 0;
  layout.elements = 1;
  std::vector<Axis> axes;
  for (int64_t i = 1; i < student.dim(); ++i) {
    layout.elements *= student.size(i);
    if (student.size(i) == 1) continue;
    axes.push_back(
        {student.size(i), student.stride(i), teacher.stride(i), gradient ? gradient->stride(i) : student.stride(i)});
  }
  // In the student's own memory order, neighbouring axes merge wherever all three tensors run on without a gap.
  std::stable_sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.student > b.student; });
  std::vector<Axis> merged;
  for (const Axis& axis : axes) {
    if (!merged.empty()) {
      Axis& last = merged.back();
      if (last.student == axis.student * axis.size && last.teacher == axis.teacher * axis.size &&
          last.gradient == axis.gradient * axis.size) {
        last = {last.size * axis.size, axis.student, axis.teacher, axis.gradient};
        continue;
      }
    }
    merged.push_back(axis);
  }
  if (merged.empty()) merged.push_back({1, 1, 1, 1});
  layout.inner = merged.back();
  merged.pop_back();
  layout.outer = merged;
  layout.rows = 1;
  for (const Axis& axis : layout.outer) layout.rows *= axis.size;
  layout.length = std::min(layout.inner.size, kBlock);
  layout.segments = layout.length ? (layout.inner.size + layout.length - 1) / layout.length : 0;
  layout.pieces_per_block = layout.length ? std::max<int64_t>(1, kBlock / layout.length) : 1;
  const int64_t pieces = layout.rows * layout.segments;
  layout.blocks = (pieces + layout.pieces_per_block - 1) / layout.pieces_per_block;
  return layout;
}

// Calls piece(student offset, teacher offset, gradient offset, count) for each piece of one block of one sample.
template <typename Piece>
void for_each_piece(const Layout& layout, int64_t sample, int64_t block, Piece&& piece) {
  const int64_t first = block * layout.pieces_per_block;
  const int64_t last = std::min(first + layout.pieces_per_block, layout.rows * layout.segments);
  for (int64_t p = first; p < last; ++p) {
    int64_t s = sample * layout.student_step, t = sample * layout.teacher_step, g = sample * layout.gradient_step;
    int64_t row = p / layout.segments;
    const int64_t start = (p % layout.segments) * layout.length;
    for (auto axis = layout.outer.rbegin(); axis != layout.outer.rend(); ++axis) {
      const int64_t i = row % axis->size;
      row /= axis->size;
      s += i * axis->student;
      t += i * axis->teacher;
      g += i * axis->gradient;
    }
    const Axis& inner = layout.inner;
    piece(s + start * inner.student, t + start * inner.teacher, g + start * inner.gradient,
          std::min(layout.length, inner.size - start));
  }
}

// Runs block_sum(sample, block) for every block in parallel; returns the sums added up for each sample, in order.
template <typename BlockSum>
std::vector<double> sum_per_sample(const Layout& layout, BlockSum&& block_sum) {
  const int64_t tasks = layout.samples * layout.blocks;
  std::vector<double> partial(tasks);
  const int64_t grain = std::max<int64_t>(1, 2 * kBlock / std::max<int64_t>(1, std::min(layout.elements, kBlock)));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) partial[i] = block_sum(i / layout.blocks, i % layout.blocks);
  });
  std::vector<double> sums(layout.samples, 0.0);
  for (int64_t i = 0; i < tasks; ++i) sums[i / layout.blocks] += partial[i];
  return sums;
}

// ---- what each sample counts --------------------------------------------------------------------------------------------

std::vector<double> read_weights(const std::optional<Tensor>& weight, int64_t samples) {
  std::vector<double> values(samples, 1.0);
  if (!weight) return values;
  const int64_t stride = weight->stride(0);
  dispatch_floating(weight->scalar_type(), "weight", [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(weight->data_ptr());
    for (int64_t i = 0; i < samples; ++i) values[i] = static_cast<double>(data[i * stride]);
  });
  return values;
}

std::vector<double> read_vector(const Tensor& tensor) {
  std::vector<double> values(tensor.numel());
  const int64_t stride = tensor.dim() ? tensor.stride(0) : 1;
  dispatch_floating(tensor.scalar_type(), "grad_output", [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(tensor.data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(data[i * stride]);
  });
  return values;
}

// Factor of each sample's squared distance in the loss. Where nothing has weight the mean is 0, and so is a sample
// whose teacher is zero everywhere when distances are relative to it.
template <typename T>
std::vector<double> sample_factors(
    const Layout& layout, const T* teacher, const std::optional<Tensor>& weight, bool normalize, int64_t reduction) {
  using A = typename accumulator<T>::type;
  std::vector<double> factors = read_weights(weight, layout.samples);
  double total = 1.0;
  if (reduction == kMean) {
    total = 0.0;
    for (double w : factors) total += w;
  }
  std::vector<double> scale(layout.samples, static_cast<double>(layout.elements));
  if (normalize) {
    scale = sum_per_sample(layout, [&](int64_t sample, int64_t block) {
      double sum = 0.0;
      for_each_piece(layout, sample, block, [&](int64_t, int64_t t, int64_t, int64_t n) {
        sum += layout.contiguous() ? norm_row(teacher + t, n, A{})
                                   : norm_strided<T, A>(teacher + t, n, layout.inner.teacher);
      });
      return sum;
    });
  }
  for (int64_t i = 0; i < layout.samples; ++i) {
    const double divisor = scale[i] * total;
    factors[i] = divisor > 0 ? factors[i] / divisor : 0.0;
  }
  return factors;
}

// Squared distances; where `gradient` is given, also gradient = 2 * factor * (student - teacher).
template <typename T>
std::vector<double> match_pass(
    const Layout& layout, const T* student, const T* teacher, T* gradient, const std::vector<double>& factors) {
  using A = typename accumulator<T>::type;
  return sum_per_sample(layout, [&](int64_t sample, int64_t block) {
    const A scale = static_cast<A>(2 * factors[sample]);
    double sum = 0.0;
    for_each_piece(layout, sample, block, [&](int64_t s, int64_t t, int64_t g, int64_t n) {
      T* out = gradient ? gradient + g : nullptr;
      sum += layout.contiguous() ? match_row(student + s, teacher + t, out, n, scale)
                                 : match_strided<T, A>(student + s, teacher + t, out, n, layout.inner.student,
                                                       layout.inner.teacher, layout.inner.gradient, scale);
    });
    return sum;
  });
}

// ---- the ops ---------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> feature_match(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight, bool normalize,
    int64_t reduction, bool with_gradient) {
  const ScalarType type = student.scalar_type();
  Tensor gradient = with_gradient ? torch::stable::empty_like(student) : new_empty(student, {0}, type);
  const Layout layout = make_layout(student, teacher, with_gradient ? &gradient : nullptr);
  std::vector<int64_t> loss_shape;
  if (reduction == kNone) loss_shape.push_back(layout.samples);
  Tensor loss = new_empty(student, loss_shape, accumulator_type(type));

  dispatch_floating(type, "student", [&](auto zero) {
    using T = decltype(zero);
    const T* s = static_cast<const T*>(student.data_ptr());
    const T* t = static_cast<const T*>(teacher.data_ptr());
    T* g = with_gradient ? static_cast<T*>(gradient.data_ptr()) : nullptr;
    const auto factors = sample_factors(layout, t, weight, normalize, reduction);
    const auto distances = match_pass(layout, s, t, g, factors);
    auto* out = static_cast<typename accumulator<T>::type*>(loss.data_ptr());
    double sum = 0.0;
    for (int64_t i = 0; i < layout.samples; ++i) {
      const double value = factors[i] * distances[i];
      if (reduction == kNone) out[i] = value;
      sum += value;
    }
    if (reduction != kNone) out[0] = sum;
  });
  return {loss, gradient};
}

Tensor feature_match_backward(
    const Tensor& grad_output, const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
    bool normalize, int64_t reduction) {
  Tensor gradient = torch::stable::empty_like(student);
  const Layout layout = make_layout(student, teacher, &gradient);
  dispatch_floating(student.scalar_type(), "student", [&](auto zero) {
    using T = decltype(zero);
    const T* s = static_cast<const T*>(student.data_ptr());
    const T* t = static_cast<const T*>(teacher.data_ptr());
    auto factors = sample_factors(layout, t, weight, normalize, reduction);
    const auto upstream = read_vector(grad_output);
    for (size_t i = 0; i < factors.size(); ++i) factors[i] *= upstream[reduction == kNone ? i : 0];
    match_pass(layout, s, t, static_cast<T*>(gradient.data_ptr()), factors);
  });
  return gradient;
}

void feature_match_scale_(Tensor gradient, const Tensor& grad_output) {
  const auto upstream = read_vector(grad_output);
  const bool scalar = grad_output.dim() == 0;
  if (std::all_of(upstream.begin(), upstream.end(), [](double g) { return g == 1.0; })) return;
  const Layout layout = make_layout(gradient, gradient, &gradient);
  dispatch_floating(gradient.scalar_type(), "gradient", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    T* data = static_cast<T*>(gradient.data_ptr());
    sum_per_sample(layout, [&](int64_t sample, int64_t block) {
      const double scale = upstream[scalar ? 0 : sample];
      if (scale == 1.0) return 0.0;
      for_each_piece(layout, sample, block, [&](int64_t, int64_t, int64_t g, int64_t n) {
        scale_row(data + g, n, static_cast<A>(scale));
      });
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
