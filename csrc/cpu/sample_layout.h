// Tensors [N, ...] with any strides as rows of evenly spaced elements, cut into blocks that threads share.
#pragma once

#include <algorithm>
#include <vector>

#include "common/sample_axes.h"
#include "common/stable.h"

namespace debiaskd {
namespace {

constexpr int64_t kBlock = 16384;  // elements, about: a block's rows fit into the first-level caches

struct Layout {
  int64_t samples, elements;                          // elements: in one sample
  int64_t student_step, teacher_step, gradient_step;  // from one sample to the next
  std::vector<Axis> outer;                            // slowest first
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
  for (int64_t i = 1; i < student.dim(); ++i) layout.elements *= student.size(i);
  std::vector<Axis> axes = sample_axes(student, teacher, gradient);
  layout.inner = axes.back();
  axes.pop_back();
  layout.outer = axes;
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

}  // namespace
}  // namespace debiaskd
