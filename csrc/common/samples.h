// Batches [N, ...] that lie in memory sample after sample, without gaps and in one order.
#pragma once

#include "common/stable.h"

namespace debiaskd {

// Elements of one sample. debiaskd/ops/feature_match.py copies whatever lies otherwise.
inline int64_t elements_of_samples(const Tensor& student, const Tensor& teacher) {
  int64_t elements = 1, last = 0;
  bool same = true;
  for (int64_t i = 0; i < student.dim(); ++i) {
    if (i > 0) elements *= student.size(i);
    if (student.size(i) == 1) continue;
    last += (student.size(i) - 1) * student.stride(i);
    same = same && student.stride(i) == teacher.stride(i);
  }
  const bool in_turn = student.size(0) == 1 || student.stride(0) == elements;
  STD_TORCH_CHECK(student.numel() == 0 || (same && in_turn && last == student.numel() - 1),
      "student and teacher must be dense, in the same order, sample after sample");
  return elements;
}

}  // namespace debiaskd
