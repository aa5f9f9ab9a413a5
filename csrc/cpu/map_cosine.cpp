// Cosines of attribution maps on the CPU: loss and gradient in one pass over student and teacher.
//
// Bytes: each map is read once and the gradient is written once. Maps of one size are read again for the gradient while
// they are in the cache. A smaller map is never interpolated to the larger one's size: see cpu/resized_map.h. Samples
// run in parallel, one thread each: the number of threads changes no bit.

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "common/stable.h"
#include "cpu/map_cosine_loops.h"
#include "cpu/resized_map.h"
#include "cpu/sample_weights.h"

namespace debiaskd {
namespace {

constexpr int64_t kTask = 1 << 14;  // pixels, about, that are worth a task of their own

struct MapShapes {
  int64_t samples, channels, student_height, student_width, teacher_height, teacher_width;

  MapShapes(const Tensor& student, const Tensor& teacher)
      : samples(student.size(0)),
        channels(student.size(1)),
        student_height(student.size(2)),
        student_width(student.size(3)),
        teacher_height(teacher.size(2)),
        teacher_width(teacher.size(3)) {
    const bool smaller = student_height <= teacher_height && student_width <= teacher_width;
    const bool larger = student_height >= teacher_height && student_width >= teacher_width;
    STD_TORCH_CHECK(smaller || larger, "one of the maps must be the larger one along both axes");
    STD_TORCH_CHECK(student.is_contiguous() && teacher.is_contiguous(), "student and teacher must be contiguous");
  }

  int64_t student() const { return channels * student_height * student_width; }
  int64_t teacher() const { return channels * teacher_height * teacher_width; }
  bool same() const { return student_height == teacher_height && student_width == teacher_width; }
  bool smaller() const { return student_height <= teacher_height && student_width <= teacher_width; }
};

// The loss of one sample, and its gradient as `by_teacher` times the teacher's map plus `by_student` times the
// student's, both where they meet.
template <typename A>
struct MapCosine {
  double loss;
  A by_teacher, by_student;

  MapCosine(const MapProducts& products, double factor) {
    constexpr double kTiny = std::numeric_limits<A>::min();
    if (products.student < kTiny || products.teacher < kTiny) {  // a map of zeros; NaN in the other one shows
      loss = factor * (1 - 0 * products.dot);
      by_teacher = by_student = static_cast<A>(0 * products.dot);
      return;
    }
    const double norms = std::sqrt(products.student) * std::sqrt(products.teacher), cosine = products.dot / norms;
    loss = factor * (1 - cosine);
    by_teacher = static_cast<A>(-factor / norms);
    by_student = static_cast<A>(factor * cosine / products.student);
  }
};

// Losses [N] of samples times their factors; where `gradient` is given, also its derivative times `upstream`.
template <typename T>
std::vector<double> cosine_pass(
    const MapShapes& shapes, const T* student, const T* teacher, T* gradient, const std::vector<double>& factors) {
  using A = typename accumulator<T>::type;
  std::vector<double> losses(shapes.samples);
  const int64_t pixels = std::max<int64_t>(1, std::max(shapes.student(), shapes.teacher()));
  torch::stable::parallel_for(0, shapes.samples, std::max<int64_t>(1, kTask / pixels), [&](int64_t begin, int64_t end) {
    std::optional<ResizedMap<T>> resized;
    if (!shapes.same()) {
      const int64_t height = std::min(shapes.student_height, shapes.teacher_height);
      const int64_t width = std::min(shapes.student_width, shapes.teacher_width);
      resized.emplace(shapes.channels, height, width, std::max(shapes.student_height, shapes.teacher_height),
          std::max(shapes.student_width, shapes.teacher_width));
    }
    for (int64_t i = begin; i < end; ++i) {
      const T *s = student + i * shapes.student(), *t = teacher + i * shapes.teacher();
      T* out = gradient ? gradient + i * shapes.student() : nullptr;
      MapProducts products;
      if (shapes.same()) {
        products = products_row(s, t, shapes.student(), A{});
      } else if (shapes.smaller()) {
        products = resized->multiply(s, t);
      } else {
        products = resized->multiply(t, s);
        std::swap(products.student, products.teacher);
      }
      const MapCosine<A> cosine(products, factors[i]);
      losses[i] = cosine.loss;
      if (!out) continue;
      if (shapes.same()) {
        combine_row(t, cosine.by_teacher, s, cosine.by_student, out, shapes.student());
      } else if (shapes.smaller()) {
        resized->small_gradient(cosine.by_teacher, cosine.by_student, out);
      } else {
        resized->large_gradient(cosine.by_student, cosine.by_teacher, s, out);
      }
    }
  });
  return losses;
}

// What each sample's loss counts. Where nothing has weight the mean is 0.
std::vector<double> loss_factors(const std::optional<Tensor>& weight, int64_t samples, int64_t reduction) {
  std::vector<double> factors = read_weights(weight, samples);
  if (reduction != kMean) return factors;
  double total = 0.0;
  for (double w : factors) total += w;
  for (double& w : factors) w = total > 0 ? w / total : 0.0;
  return factors;
}

// ---- the ops ----

std::tuple<Tensor, Tensor> map_cosine(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& weight,
    int64_t reduction, bool with_gradient) {
  const ScalarType type = student.scalar_type();
  const MapShapes shapes(student, teacher);
  Tensor gradient = with_gradient ? torch::stable::empty_like(student) : new_empty(student, {0}, type);
  std::vector<int64_t> loss_shape;
  if (reduction == kNone) loss_shape.push_back(shapes.samples);
  Tensor loss = new_empty(student, loss_shape, accumulator_type(type));

  dispatch_floating(type, "student", [&](auto zero) {
    using T = decltype(zero);
    T* g = with_gradient ? static_cast<T*>(gradient.data_ptr()) : nullptr;
    const auto losses = cosine_pass(shapes, static_cast<const T*>(student.data_ptr()),
        static_cast<const T*>(teacher.data_ptr()), g, loss_factors(weight, shapes.samples, reduction));
    auto* out = static_cast<typename accumulator<T>::type*>(loss.data_ptr());
    double sum = 0.0;
    for (int64_t i = 0; i < shapes.samples; ++i) {
      if (reduction == kNone) out[i] = losses[i];
      sum += losses[i];
    }
    if (reduction != kNone) out[0] = sum;
  });
  return {loss, gradient};
}

Tensor map_cosine_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
    const std::optional<Tensor>& weight, int64_t reduction) {
  const MapShapes shapes(student, teacher);
  Tensor gradient = torch::stable::empty_like(student);
  dispatch_floating(student.scalar_type(), "student", [&](auto zero) {
    using T = decltype(zero);
    auto factors = loss_factors(weight, shapes.samples, reduction);
    const auto upstream = read_vector(grad_output);
    for (size_t i = 0; i < factors.size(); ++i) factors[i] *= upstream[reduction == kNone ? i : 0];
    cosine_pass(shapes, static_cast<const T*>(student.data_ptr()), static_cast<const T*>(teacher.data_ptr()),
        static_cast<T*>(gradient.data_ptr()), factors);
  });
  return gradient;
}

}  // namespace
}  // namespace debiaskd

STABLE_TORCH_LIBRARY_IMPL(debiaskd, CPU, m) {
  m.impl("map_cosine", TORCH_BOX(&debiaskd::map_cosine));
  m.impl("map_cosine_backward", TORCH_BOX(&debiaskd::map_cosine_backward));
}
