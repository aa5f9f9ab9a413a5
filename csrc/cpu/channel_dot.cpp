// Attribution from a gradient and a feature map, on the CPU: a dot product over channels at every position.
//
// Bytes: reads each input once; the output is a C-th of them. Where channels lie side by side (channels_last) every
// position is one contiguous dot product; otherwise the rows of all channels are added up, each along its own line.
// Rows that are not contiguous either way are gathered into a small buffer, one at a time, and never copied as a whole.
// Sums run in the accumulator's type over at most kRun terms and in double beyond. How the work is cut depends on
// shapes alone: the number of threads changes no bit.

#include <algorithm>
#include <vector>

#include "common/stable.h"
#include "cpu/channel_dot_loops.h"
#include "cpu/channel_layout.h"

namespace debiaskd {
namespace {

constexpr int64_t kRun = 64;        // channels whose products are added up before a double takes the sum
constexpr int64_t kLine = 2048;     // positions that one task sums up at a time: its sums stay in the first-level cache
constexpr int64_t kTask = 1 << 16;  // elements, about, that are worth a task of their own
constexpr int64_t kTasks = 16;      // from here on, channels need not be cut for want of tasks

// Calls body(begin, end) over tasks of about `elements` each, in parallel.
template <typename Body>
void in_parallel(int64_t tasks, int64_t elements, Body&& body) {
  const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, tasks, grain, body);
}

// ---- the dot product ----

// Channels side by side: each position by itself.
template <typename T, typename A>
void dot_along_channels(const Tensor& gradient, const Tensor& feature, A* out) {
  const bool constant = is_constant(gradient);
  const bool one_line = is_one_line(feature) && (constant || is_one_line(gradient));
  const Shape shape = make_shape(feature, one_line);
  const View<T> a = make_view<T>(feature, one_line), g = constant ? a : make_view<T>(gradient, one_line);
  const int64_t positions = shape.lines * shape.length;
  in_parallel(shape.samples * positions, shape.channels, [&](int64_t begin, int64_t end) {
    std::vector<A> weight(constant ? shape.channels : 0);
    int64_t gathered = -1;
    for (int64_t i = begin, count; i < end; i += count) {
      const int64_t n = i / positions, l = i % positions / shape.length, p = i % shape.length;
      count = std::min(end - i, shape.length - p);
      if (constant && n != gathered) gather(gradient, gathered = n, weight.data());
      if (constant) {
        dots(weight.data(), 0, a.at(n, 0, l, p), a.position, count, shape.channels, out + i);
      } else {
        dots(g.at(n, 0, l, p), g.position, a.at(n, 0, l, p), a.position, count, shape.channels, out + i);
      }
    }
  });
}

// Channels apart: sums for a stretch of positions, to which every channel's row is added.
template <typename T, typename A>
class ChannelSums {
 public:
  ChannelSums(const Tensor& gradient, const Tensor& feature)
      : gradient_(gradient),
        constant_(is_constant(gradient)),
        one_line_(is_one_line(feature) && (constant_ || is_one_line(gradient))),
        shape_(make_shape(feature, one_line_)),
        a_(make_view<T>(feature, one_line_)),
        g_(constant_ ? a_ : make_view<T>(gradient, one_line_)) {}

  void run(A* out) const {
    const int64_t stretch = std::min(shape_.length, kLine), stretches = (shape_.length + stretch - 1) / stretch;
    const int64_t places = shape_.samples * shape_.lines * stretches;
    // A few large maps are cut along their channels, too.
    const int64_t wanted = std::min((kTasks + places - 1) / places, shape_.channels * stretch / kTask + 1);
    const int64_t step = std::max<int64_t>(1, (shape_.channels + wanted - 1) / wanted);
    const int64_t chunks = std::max<int64_t>(1, (shape_.channels + step - 1) / step);
    std::vector<double> totals(chunks > 1 ? places * chunks * stretch : 0);
    in_parallel(places * chunks, step * stretch, [&](int64_t begin, int64_t end) {
      std::vector<A> sum(stretch), gathered(2 * stretch);
      std::vector<double> own(chunks > 1 ? 0 : stretch);
      for (int64_t task = begin; task < end; ++task) {
        const Place place = at(task / chunks, stretches, stretch);
        double* total = chunks > 1 ? totals.data() + task * stretch : own.data();
        std::fill(total, total + place.count, 0.0);
        const int64_t first = task % chunks * step;
        add(place, first, std::min(step, shape_.channels - first), sum.data(), gathered.data(), total);
        if (chunks == 1) std::copy(total, total + place.count, out + place.out);
      }
    });
    for (int64_t i = 0; chunks > 1 && i < places; ++i) {
      const Place place = at(i, stretches, stretch);
      for (int64_t p = 0; p < place.count; ++p) {
        double total = 0;
        for (int64_t k = 0; k < chunks; ++k) total += totals[(i * chunks + k) * stretch + p];
        out[place.out + p] = static_cast<A>(total);
      }
    }
  }

 private:
  struct Place {
    int64_t sample, line, position, count, out;
  };

  Place at(int64_t i, int64_t stretches, int64_t stretch) const {
    const int64_t line = i / stretches, position = i % stretches * stretch;
    return {line / shape_.lines, line % shape_.lines, position, std::min(stretch, shape_.length - position),
        line * shape_.length + position};
  }

  void add(const Place& place, int64_t first, int64_t channels, A* sum, A* gathered, double* total) const {
    const auto [n, l, p, count, unused] = place;
    std::vector<A> weight(constant_ ? shape_.channels : 0);
    if (constant_) gather(gradient_, n, weight.data());
    std::fill(sum, sum + count, A(0));
    for (int64_t c = first; c < first + channels; c += kRun) {
      const int64_t rows = std::min(kRun, first + channels - c);
      const T *a = a_.at(n, c, l, p), *g = g_.at(n, c, l, p);
      if (a_.position == 1 && constant_) {
        add_weighted(weight.data() + c, a, a_.channel, rows, sum, count);
      } else if (a_.position == 1 && g_.position == 1) {
        add_products(g, g_.channel, a, a_.channel, rows, sum, count);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          gather(a + r * a_.channel, a_.position, gathered, count);
          if (constant_) {
            add_weighted(weight.data() + c + r, gathered, 0, 1, sum, count);
          } else {
            gather(g + r * g_.channel, g_.position, gathered + count, count);
            add_products(gathered + count, 0, gathered, 0, 1, sum, count);
          }
        }
      }
      flush(sum, total, count);
    }
  }

  const Tensor& gradient_;
  bool constant_, one_line_;
  Shape shape_;
  View<T> a_, g_;
};

Tensor channel_dot(const Tensor& gradient, const Tensor& feature) {
  const ScalarType type = feature.scalar_type();
  Tensor out = new_empty(feature, {feature.size(0), feature.size(2), feature.size(3)}, accumulator_type(type));
  if (out.numel() == 0) return out;
  const bool side_by_side = has_adjacent_channels(feature);
  dispatch_floating(type, "feature", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    A* data = static_cast<A*>(out.data_ptr());
    if (side_by_side && (is_constant(gradient) || gradient.stride(1) == 1)) {
      dot_along_channels<T, A>(gradient, feature, data);
    } else {
      ChannelSums<T, A>(gradient, feature).run(data);
    }
  });
  return out;
}

// ---- the product: a map times each channel ----

// values: [N,C,H,W], or [N,C] for the same value at every position. The output is contiguous.
template <typename T, typename A>
void scale_rows(const A* map, const Tensor& values, int64_t positions, T* out) {
  const bool constant = is_constant(values), one_line = constant || is_one_line(values);
  const int64_t channels = values.size(1), lines = one_line ? 1 : values.size(2), length = positions / lines;
  const View<T> x = constant ? View<T>{} : make_view<T>(values, one_line);
  in_parallel(values.size(0) * channels, positions, [&](int64_t begin, int64_t end) {
    std::vector<A> wide(std::max(channels, length));
    int64_t gathered = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / channels, c = i % channels;
      if (constant && n != gathered) gather(values, gathered = n, wide.data());
      for (int64_t l = 0; l < lines; ++l) {
        const A* m = map + n * positions + l * length;
        T* row = out + i * positions + l * length;
        if (constant) {
          multiply(wide[c], m, row, length);
        } else if (x.position == 1) {
          multiply(m, x.at(n, c, l, 0), row, length);
        } else {
          gather(x.at(n, c, l, 0), x.position, wide.data(), length);
          multiply(m, wide.data(), row, length);
        }
      }
    }
  });
}

// The output is channels_last.
template <typename T, typename A>
void scale_channels(const A* map, const Tensor& values, int64_t positions, int64_t width, T* out) {
  const bool constant = is_constant(values);
  const int64_t channels = values.size(1);
  const View<T> x = constant ? View<T>{} : make_view<T>(values, false);
  in_parallel(values.size(0) * positions, channels, [&](int64_t begin, int64_t end) {
    std::vector<A> wide(channels);
    int64_t gathered = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / positions, p = i % positions;
      if (constant && n != gathered) gather(values, gathered = n, wide.data());
      if (constant) {
        multiply(map[i], wide.data(), out + i * channels, channels);
      } else if (x.channel == 1) {
        multiply(map[i], x.at(n, 0, p / width, p % width), out + i * channels, channels);
      } else {
        gather(x.at(n, 0, p / width, p % width), x.channel, wide.data(), channels);
        multiply(map[i], wide.data(), out + i * channels, channels);
      }
    }
  });
}

Tensor channel_scale(const Tensor& map, const Tensor& values, bool channels_last, ScalarType type) {
  const int64_t samples = values.size(0), channels = values.size(1), height = map.size(1), width = map.size(2);
  Tensor out = channels_last ? new_empty(values, {samples, height, width, channels}, type)
                             : new_empty(values, {samples, channels, height, width}, type);
  if (out.numel() > 0) {
    dispatch_floating(type, "dtype", [&](auto zero) {
      using T = decltype(zero);
      const auto* m = static_cast<const typename accumulator<T>::type*>(map.data_ptr());
      T* data = static_cast<T*>(out.data_ptr());
      if (channels_last) {
        scale_channels(m, values, height * width, width, data);
      } else {
        scale_rows(m, values, height * width, data);
      }
    });
  }
  return channels_last ? torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3) : out;
}

}  // namespace
}  // namespace debiaskd

STABLE_TORCH_LIBRARY_IMPL(debiaskd, CPU, m) {
  m.impl("channel_dot", TORCH_BOX(&debiaskd::channel_dot));
  m.impl("channel_scale", TORCH_BOX(&debiaskd::channel_scale));
}
