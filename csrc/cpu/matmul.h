// PyTorch's own matrix product, into memory that is there already.
#pragma once

#include <array>

#include "common/stable.h"

namespace debiaskd {

// out = left @ right, both 2-d; views (a transpose) are read as they are. The out variant on purpose: autocast, which
// may be on around an op, leaves it alone, and these products need their float32.
inline void matmul_into(Tensor& out, const Tensor& left, const Tensor& right) {
  std::array<StableIValue, 3> stack{
      torch::stable::detail::from(left), torch::stable::detail::from(right), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the handle that was returned is ours to release
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

}  // namespace debiaskd
