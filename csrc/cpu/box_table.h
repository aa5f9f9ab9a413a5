// The boxes of a batch as they come from Python: packed, image after image, with a mask for each image or none at all.
#pragma once

#include <cstdint>
#include <optional>

#include "common/stable.h"
#include "cpu/coverage.h"

namespace debiaskd {
namespace {

struct BoxTable {
  BoxTable(const Tensor& coords, const Tensor& offsets, const Tensor& annotated, const std::optional<Tensor>& mask)
      : coords_(torch::stable::contiguous(coords)),
        offsets_(torch::stable::contiguous(offsets)),
        annotated_(torch::stable::contiguous(annotated)) {
    if (mask) mask_ = torch::stable::contiguous(*mask);
  }

  bool annotated(int64_t image) const { return static_cast<const bool*>(annotated_.data_ptr())[image]; }
  int64_t images() const { return annotated_.numel(); }
  int64_t annotated_images() const {
    int64_t count = 0;
    for (int64_t i = 0; i < images(); ++i) count += annotated(i);
    return count;
  }
  void start(Coverage& coverage, int64_t image) const {
    const int64_t* offset = static_cast<const int64_t*>(offsets_.data_ptr()) + image;
    const int32_t* boxes = static_cast<const int32_t*>(coords_.data_ptr()) + 4 * offset[0];
    coverage.start(boxes, offset[1] - offset[0], mask_ ? mask_of(image) : nullptr);
  }

 private:
  const int32_t* mask_of(int64_t image) const {
    return static_cast<const int32_t*>(mask_->data_ptr()) + image * mask_->size(1) * mask_->size(2);
  }

  Tensor coords_, offsets_, annotated_;
  std::optional<Tensor> mask_;
};

}  // namespace
}  // namespace debiaskd
