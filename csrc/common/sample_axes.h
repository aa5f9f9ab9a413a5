// The axes of student, teacher and gradient [N, ...] within a sample, merged wherever all three run on without a gap.
#pragma once

#include <algorithm>
#include <vector>

#include "common/stable.h"

namespace debiaskd {

struct Axis {
  int64_t size, student, teacher, gradient;  // elements, and steps from one to the next
};

// In the student's own memory order, slowest first; never empty. Without a gradient its steps are the student's.
inline std::vector<Axis> sample_axes(const Tensor& student, const Tensor& teacher, const Tensor* gradient) {
  std::vector<Axis> axes;
  for (int64_t i = 1; i < student.dim(); ++i) {
    if (student.size(i) == 1) continue;
    axes.push_back(
        {student.size(i), student.stride(i), teacher.stride(i), gradient ? gradient->stride(i) : student.stride(i)});
  }
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
  return merged;
}

}  // namespace debiaskd
