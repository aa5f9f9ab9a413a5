// How what a map marks overlaps with the boxes, on the CPU: intersections and unions, counted in pixels, at several
// thresholds.
//
// Bytes: the map is read from memory once. A first pass finds its smallest and its largest value, from which follows
// what a pixel must exceed; a second one counts, row by row at every threshold, while the map still lies in the cache.
// No map is normalised, and an upsampled one is never stored: both passes blend its rows from the small map.
// Images run in parallel, one thread each.

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "cpu/box_overlap_loops.h"
#include "cpu/box_table.h"
#include "cpu/coverage.h"
#include "cpu/map_rows.h"

namespace debiaskd {
namespace {

// Which pixels of a row lie in a box, and which count at all.
class Judgement {
 public:
  Judgement(const BoxTable& boxes, const BoxTable* ignore, int64_t height, int64_t width)
      : boxes_(boxes), ignore_(ignore), width_(width), coverage_(height, width), judged_(width, 1) {
    if (ignore) ignored_.emplace(height, width);
  }

  void start(int64_t image) {
    boxes_.start(coverage_, image);
    area_ = 0;
    if (!ignore_) return;
    ignoring_ = ignore_->annotated(image);  // else nothing is known about where its areas are
    if (ignoring_) ignore_->start(*ignored_, image);
    std::fill(judged_.begin(), judged_.end(), 1);
  }

  // Rows come in order, none left out.
  void enter(int64_t y) {
    bool changed = coverage_.enter(y).any();
    if (changed) area_ = coverage_.area();
    if (!ignoring_) return;
    changed |= ignored_->enter(y).any();
    if (changed) judge_row(coverage_.covered(), ignored_->covered(), judged_.data(), width_);
  }

  const int32_t* judged() const { return judged_.data(); }
  const int32_t* covered() const { return coverage_.covered(); }
  int64_t area() const { return area_; }  // pixels in a box in this row

 private:
  const BoxTable& boxes_;
  const BoxTable* ignore_;
  int64_t width_, area_ = 0;
  bool ignoring_ = false;
  Coverage coverage_;
  std::optional<Coverage> ignored_;
  std::vector<int32_t> judged_;
};

template <typename T, typename A>
Range<A> range_of(const Shape& shape, Rows<T>& rows, Judgement& judgement) {
  Range<A> range;
  for (int64_t y = 0; y < shape.height; ++y) {
    judgement.enter(y);
    range_row(rows.row(y), judgement.judged(), shape.width, range);
  }
  if (shape.upsampled() && rows.constant()) range.smallest = range.largest;
  return range;
}

// Intersections and unions at each limit.
template <typename T, typename A>
void count(const Shape& shape, Rows<T>& rows, Judgement& judgement, const std::vector<A>& limits, int64_t* intersection,
    int64_t* joined) {
  for (int64_t y = 0; y < shape.height; ++y) {
    judgement.enter(y);
    const A* row = rows.row(y);
    for (size_t t = 0; t < limits.size(); ++t) {
      const RowCounts found = count_row(row, judgement.judged(), judgement.covered(), limits[t], shape.width);
      intersection[t] += found.both;
      joined[t] += found.above + judgement.area() - found.both;
    }
  }
}

std::tuple<Tensor, Tensor, Tensor> box_overlap(const Tensor& attribution, const Tensor& coords, const Tensor& offsets,
    const Tensor& annotated, const std::optional<Tensor>& mask, const std::optional<Tensor>& ignore_coords,
    const std::optional<Tensor>& ignore_offsets, const std::optional<Tensor>& ignore_annotated,
    const std::optional<Tensor>& ignore_mask, std::vector<double> thresholds, int64_t height, int64_t width) {
  const Shape shape{attribution.size(0), attribution.size(1), attribution.size(2), height, width};
  const BoxTable boxes(coords, offsets, annotated, mask);
  std::optional<BoxTable> ignore;
  if (ignore_coords) ignore.emplace(*ignore_coords, *ignore_offsets, *ignore_annotated, ignore_mask);
  const int64_t columns = static_cast<int64_t>(thresholds.size());
  Tensor intersection = new_empty(attribution, {shape.images, columns}, ScalarType::Long);
  Tensor joined = new_empty(attribution, {shape.images, columns}, ScalarType::Long);
  Tensor defined = new_empty(attribution, {shape.images}, ScalarType::Bool);

  dispatch_floating(attribution.scalar_type(), "attribution", [&](auto zero) {
    using T = decltype(zero);
    using A = typename accumulator<T>::type;
    int64_t* both = static_cast<int64_t*>(intersection.data_ptr());
    int64_t* either = static_cast<int64_t*>(joined.data_ptr());
    bool* known = static_cast<bool*>(defined.data_ptr());
    std::fill_n(both, shape.images * columns, 0);
    std::fill_n(either, shape.images * columns, 0);
    torch::stable::parallel_for(0, shape.images, 1, [&](int64_t begin, int64_t end) {
      Rows<T> rows(shape, attribution);
      Judgement judgement(boxes, ignore ? &*ignore : nullptr, height, width);
      std::vector<A> limits(columns);
      for (int64_t i = begin; i < end; ++i) {
        known[i] = boxes.annotated(i);
        if (!known[i]) continue;
        rows.start(i);
        judgement.start(i);
        const Range<A> range = range_of<T, A>(shape, rows, judgement);
        known[i] = range.finite();
        if (!known[i]) continue;
        for (int64_t t = 0; t < columns; ++t) limits[t] = limit_of<A>(range, static_cast<A>(thresholds[t]));
        judgement.start(i);
        count<T, A>(shape, rows, judgement, limits, both + i * columns, either + i * columns);
      }
    });
  });
  return {intersection, joined, defined};
}

}  // namespace
}  // namespace debiaskd

STABLE_TORCH_LIBRARY_IMPL(debiaskd, CPU, m) { m.impl("box_overlap", TORCH_BOX(&debiaskd::box_overlap)); }
