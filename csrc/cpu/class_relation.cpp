// Relations inside of classes on the CPU: cosines between the samples of one class, student against teacher.
//
// Bytes: the student and the teacher are read once for the Gram matrices, the student once more for the gradient, which
// is written once. Only rows of one class meet each other: sum n_k² numbers a side, and as many products of rows.
// Samples are sorted by class here, on the host; every product is summed in an order that depends on shapes and labels
// alone.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/stable.h"
#include "cpu/class_relation_loops.h"

namespace debiaskd {
namespace {

constexpr int64_t kStrip = 16;      // rows of a class that one task has in hand
constexpr int64_t kOthers = 32;     // rows that it meets them with, at a time
constexpr int64_t kPiece = 512;     // of a row: a strip and its others, cut so, stay in the second-level cache
constexpr int64_t kTask = 1 << 15;  // multiplications, about, that are worth a task of their own
constexpr double kSmallest =
    1e-12;  // a row's norm, below which it has no direction: torch.nn.functional.normalize's eps

// ---- which rows meet ----

struct Group {
  int64_t first, size;  // in Classes::order
  int64_t gram;         // where its size x size matrix begins
};

struct Strip {
  int64_t group, begin, end;  // rows, counted inside of the group
};

struct Classes {
  std::vector<int64_t> order;  // samples, sorted by label
  std::vector<Group> groups;   // of two samples or more
  std::vector<Strip> strips;
  int64_t numbers = 0;  // in all matrices together
};

Classes sort_by_class(const Tensor& labels) {
  const int64_t samples = labels.size(0), step = labels.stride(0);
  const auto* label = static_cast<const int64_t*>(labels.data_ptr());
  Classes classes;
  classes.order.resize(samples);
  std::iota(classes.order.begin(), classes.order.end(), 0);
  std::stable_sort(classes.order.begin(), classes.order.end(),
      [&](int64_t a, int64_t b) { return label[a * step] < label[b * step]; });
  for (int64_t i = 0, next; i < samples; i = next) {
    for (next = i + 1; next < samples && label[classes.order[next] * step] == label[classes.order[i] * step];) ++next;
    if (next - i < 2) continue;
    const int64_t size = next - i, count = (size + kStrip - 1) / kStrip;
    for (int64_t s = 0; s < count; ++s) {
      // Later strips have more rows before them. From both ends in turn, every stretch of the list is as much work.
      const int64_t begin = (s % 2 ? count - 1 - s / 2 : s / 2) * kStrip;
      classes.strips.push_back({static_cast<int64_t>(classes.groups.size()), begin, std::min(size, begin + kStrip)});
    }
    classes.groups.push_back({i, size, classes.numbers});
    classes.numbers += size * size;
  }
  return classes;
}

// ---- rows ----

// Pieces of rows in the accumulator's type: where they lie if they can be read there, else in a buffer.
template <typename T>
class Rows {
 public:
  using A = typename accumulator<T>::type;

  Rows(const Tensor& x, const Classes& classes)
      : data_(static_cast<const T*>(x.data_ptr())),
        row_step_(x.stride(0)),
        step_(x.stride(1)),
        order_(classes.order.data()),
        width_(x.size(1)) {}

  int64_t width() const { return width_; }

  const A* piece(int64_t sorted, int64_t begin, int64_t n, A* buffer) const {
    const T* in = data_ + order_[sorted] * row_step_ + begin * step_;
    if (step_ == 1) {
      if constexpr (std::is_same_v<T, A>) {
        return in;
      } else {
        widen(in, buffer, n);
      }
    } else {
      for (int64_t i = 0; i < n; ++i) buffer[i] = load(in[i * step_]);
    }
    return buffer;
  }

 private:
  const T* data_;
  int64_t row_step_, step_;
  const int64_t* order_;
  int64_t width_;
};

template <typename Body>
void for_strips(const Classes& classes, int64_t width, Body&& body) {
  const int64_t strips = classes.strips.size();
  const int64_t work = strips ? classes.numbers * std::max<int64_t>(1, width) / strips : 1;
  torch::stable::parallel_for(0, strips, std::max<int64_t>(1, kTask / std::max<int64_t>(1, work)), body);
}

// ---- Gram matrices ----

// Products of the rows of each class, in the lower triangles.
template <typename T>
std::vector<double> gram(const Tensor& x, const Classes& classes) {
  using A = typename accumulator<T>::type;
  const Rows<T> rows(x, classes);
  std::vector<double> products(classes.numbers, 0.0);
  for_strips(classes, rows.width(), [&](int64_t first, int64_t last) {
    std::vector<A> buffer((kStrip + kOthers) * kPiece);
    const A *mine[kStrip + 3], *others[kOthers + 1];
    A block[8];
    for (int64_t s = first; s < last; ++s) {
      const Strip& strip = classes.strips[s];
      const Group& group = classes.groups[strip.group];
      for (int64_t from = 0; from < strip.end; from += kOthers) {
        const int64_t to = std::min(from + kOthers, strip.end);
        for (int64_t begin = 0; begin < rows.width(); begin += kPiece) {
          const int64_t n = std::min(kPiece, rows.width() - begin);
          // Blocks reach beyond the end: their last rows are then one row several times, and not looked at.
          for (int64_t i = strip.begin; i < strip.end; ++i) {
            mine[i - strip.begin] = rows.piece(group.first + i, begin, n, buffer.data() + (i - strip.begin) * kPiece);
          }
          for (int64_t i = 0; i < 3; ++i) mine[strip.end - strip.begin + i] = mine[strip.end - strip.begin - 1];
          for (int64_t j = from; j < to; ++j) {
            others[j - from] = rows.piece(group.first + j, begin, n, buffer.data() + (kStrip + j - from) * kPiece);
          }
          others[to - from] = others[to - from - 1];
          for (int64_t i = strip.begin; i < strip.end; i += 4) {
            for (int64_t j = from; j < std::min(to, i + 4); j += 2) {
              dots(mine + (i - strip.begin), others + (j - from), n, block);
              for (int64_t r = 0; r < std::min<int64_t>(4, strip.end - i); ++r) {
                for (int64_t c = 0; c < std::min<int64_t>(2, to - j); ++c) {
                  products[group.gram + (i + r) * group.size + j + c] += block[2 * r + c];
                }
              }
            }
          }
        }
      }
    }
  });
  return products;
}

// 1 / norm of each row, in sorted order; 0 for a row without direction.
std::vector<double> scales(const std::vector<double>& products, const Classes& classes) {
  std::vector<double> scale(classes.order.size(), 0.0);
  for (const Group& group : classes.groups) {
    for (int64_t i = 0; i < group.size; ++i) {
      const double norm = std::sqrt(products[group.gram + i * (group.size + 1)]);
      scale[group.first + i] = norm < kSmallest ? 0.0 : 1 / norm;
    }
  }
  return scale;
}

// ---- from Gram matrices to loss and gradient ----

struct Relations {
  std::vector<double> products, scale;

  double cosine(const Group& group, int64_t i, int64_t j) const {
    const double both = scale[group.first + i] * scale[group.first + j];
    if (i == j) return both > 0 ? 1.0 : both;  // NaN stays
    return products[group.gram + std::max(i, j) * group.size + std::min(i, j)] * both;
  }
};

// Row i of the class: its part of the loss; where `factor` is given, what its gradient takes of each of the rows.
double row_of_class(
    const Relations& student, const Relations& teacher, const Group& group, double weight, int64_t i, double* factor) {
  double loss = 0, own = 0;
  for (int64_t j = 0; j < group.size; ++j) {
    const double cosine = student.cosine(group, i, j), difference = cosine - teacher.cosine(group, i, j);
    loss += difference * difference;
    if (!factor || j == i) continue;
    factor[j] = 4 * weight * difference * student.scale[group.first + i] * student.scale[group.first + j];
    own += difference * cosine;
  }
  if (factor) factor[i] = -4 * weight * own * student.scale[group.first + i] * student.scale[group.first + i];
  return weight * loss;
}

// The gradient of a strip's rows: each a combination of all rows of the class.
template <typename T, typename A>
void combine_strip(const Rows<T>& rows, const Classes& classes, const Strip& strip, const std::vector<double>& factors,
    std::vector<A>& buffer, A* gradient) {
  const Group& group = classes.groups[strip.group];
  const int64_t width = rows.width();
  A factor[16], *out[4];
  const A* x[4];
  for (int64_t begin = 0; begin < width; begin += kPiece) {
    const int64_t n = std::min(kPiece, width - begin);
    for (int64_t j = 0; j < group.size; j += 4) {
      for (int64_t c = 0; c < 4; ++c) {
        const int64_t row = std::min(j + c, group.size - 1);
        x[c] = rows.piece(group.first + row, begin, n, buffer.data() + c * kPiece);
      }
      for (int64_t i = strip.begin; i < strip.end; i += 4) {
        const int64_t count = std::min<int64_t>(4, strip.end - i);
        for (int64_t r = 0; r < count; ++r) {
          out[r] = gradient + classes.order[group.first + i + r] * width + begin;
          if (j == 0) std::fill(out[r], out[r] + n, A(0));
          for (int64_t c = 0; c < 4; ++c) {
            const int64_t at = (i + r - strip.begin) * group.size + j + c;
            factor[4 * r + c] = j + c < group.size ? static_cast<A>(factors[at]) : A(0);
          }
        }
        combine(out, count, factor, x, n);
      }
    }
  }
}

template <typename T>
double loss_and_gradient(const Tensor& student, const Relations& own, const Relations& teacher, const Classes& classes,
    typename accumulator<T>::type* gradient) {
  using A = typename accumulator<T>::type;
  const Rows<T> rows(student, classes);
  std::vector<double> parts(classes.strips.size(), 0.0);
  for_strips(classes, gradient ? rows.width() : 1, [&](int64_t first, int64_t last) {
    std::vector<A> buffer(4 * kPiece);
    std::vector<double> factors;
    for (int64_t s = first; s < last; ++s) {
      const Strip& strip = classes.strips[s];
      const Group& group = classes.groups[strip.group];
      const double weight = 1.0 / (static_cast<double>(group.size) * group.size * classes.groups.size());
      factors.resize(kStrip * group.size);
      for (int64_t i = strip.begin; i < strip.end; ++i) {
        double* factor = gradient ? factors.data() + (i - strip.begin) * group.size : nullptr;
        parts[s] += row_of_class(own, teacher, group, weight, i, factor);
      }
      if (gradient) combine_strip<T, A>(rows, classes, strip, factors, buffer, gradient);
    }
  });
  return std::accumulate(parts.begin(), parts.end(), 0.0);
}

Relations relate(const Tensor& x, const char* name, const Classes& classes) {
  Relations relations;
  relations.products =
      dispatch_floating(x.scalar_type(), name, [&](auto zero) { return gram<decltype(zero)>(x, classes); });
  relations.scale = scales(relations.products, classes);
  return relations;
}

std::tuple<Tensor, Tensor> class_relation(
    const Tensor& student, const Tensor& teacher, const Tensor& labels, bool with_gradient) {
  const ScalarType type = accumulator_type(student.scalar_type());
  const int64_t samples = student.size(0), width = student.size(1);
  Tensor loss = new_empty(student, {}, type);
  Tensor gradient = new_empty(student, {with_gradient ? samples : 0, width}, type);
  const Classes classes = sort_by_class(labels);
  const Relations own = relate(student, "student", classes), other = relate(teacher, "teacher", classes);
  dispatch_floating(student.scalar_type(), "student", [&](auto zero) {
    using A = typename accumulator<decltype(zero)>::type;
    A* data = with_gradient ? static_cast<A*>(gradient.data_ptr()) : nullptr;
    if (data) {
      // Rows that no class of two or more has: between its groups, in sorted order.
      int64_t i = 0;
      for (size_t g = 0; g <= classes.groups.size(); ++g) {
        const int64_t next = g < classes.groups.size() ? classes.groups[g].first : samples;
        for (; i < next; ++i) std::fill_n(data + classes.order[i] * width, width, A(0));
        if (g < classes.groups.size()) i += classes.groups[g].size;
      }
    }
    *static_cast<A*>(loss.data_ptr()) =
        static_cast<A>(loss_and_gradient<decltype(zero)>(student, own, other, classes, data));
  });
  return {loss, gradient};
}

}  // namespace
}  // namespace debiaskd

STABLE_TORCH_LIBRARY_IMPL(debiaskd, CPU, m) { m.impl("class_relation", TORCH_BOX(&debiaskd::class_relation)); }
