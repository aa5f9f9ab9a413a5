// Which pixels of a row lie inside of at least one box or of the mask, kept up to date while the rows go by.
//
// A count for each column changes only in rows where a box starts or ends, so that the cost of the boxes does not
// depend on the size of the map, and the cost of a row does not depend on the number of boxes. A mask has a bit for
// each pixel, 32 rows of a column in a word, and is joined to the boxes in each row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/vectorize.h"

namespace debiaskd {

// Columns come in groups of one cache line, so that no loop here has a remainder and no vector lies across two lines.
constexpr int32_t kColumns = 16;

struct alignas(64) ColumnGroup {
  int32_t column[kColumns];
};

namespace {

// One box more or less over the columns [x0, x1).
DEBIASKD_CLONES void add_range(int32_t* counts, int32_t* covered, int32_t x0, int32_t x1, int32_t value) {
  for (int32_t group = x0 / kColumns * kColumns; group < x1; group += kColumns) {
    const int32_t begin = x0 - group, end = x1 - group;
#pragma omp simd
    for (int32_t i = 0; i < kColumns; ++i) {
      counts[group + i] += i >= begin && i < end ? value : 0;
      covered[group + i] = counts[group + i] > 0;
    }
  }
}

// The bit of one row of a mask, joined to what the boxes cover.
DEBIASKD_CLONES void join_mask(const int32_t* counts, const int32_t* words, int32_t bit, int32_t* covered, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) covered[i] = (counts[i] > 0) | (static_cast<uint32_t>(words[i]) >> bit & 1u);
}

DEBIASKD_CLONES int64_t count_covered(const int32_t* covered, int64_t n) {
  int32_t area = 0;
#pragma omp simd reduction(+ : area)
  for (int64_t i = 0; i < n; ++i) area += covered[i];
  return area;
}

}  // namespace

struct Columns {
  int64_t begin, end;
  bool any() const { return begin < end; }
};

class Coverage {
 public:
  // Of a map of `width` columns and `height` rows. Keeps its memory from image to image.
  Coverage(int64_t height, int64_t width)
      : height_(height),
        width_(width),
        first_(height),
        counts_((width + kColumns - 1) / kColumns),
        covered_(counts_.size()) {}

  // Begins a map with `count` boxes, packed as (x0, y0, x1, y1), and a mask's words, null where there is no mask.
  void start(const int32_t* boxes, int64_t count, const int32_t* mask) {
    mask_ = mask;
    std::fill(first_.begin(), first_.end(), -1);
    std::fill(counts_.begin(), counts_.end(), ColumnGroup{});
    std::fill(covered_.begin(), covered_.end(), ColumnGroup{});
    events_.clear();
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* box = boxes + 4 * i;
      const int64_t x0 = std::max<int64_t>(box[0], 0), x1 = std::min<int64_t>(box[2], width_);
      const int64_t y0 = std::max<int64_t>(box[1], 0), y1 = std::min<int64_t>(box[3], height_);
      if (x0 >= x1 || y0 >= y1) continue;
      push(y0, x0, x1, 1);
      if (y1 < height_) push(y1, x0, x1, -1);
    }
  }

  // Goes on to row y (rows come in order, none left out); returns the columns that may have changed.
  Columns enter(int64_t y) {
    Columns changed{width_, 0};
    for (int32_t e = first_[y]; e >= 0; e = events_[e].next) {
      const Event& event = events_[e];
      changed = {std::min<int64_t>(changed.begin, event.x0), std::max<int64_t>(changed.end, event.x1)};
      add_range(counts_.data()->column, covered_.data()->column, event.x0, event.x1, event.value);
    }
    if (!mask_) return changed;
    join_mask(
        counts_.data()->column, mask_ + y / 32 * width_, static_cast<int32_t>(y % 32), covered_.data()->column, width_);
    return {0, width_};
  }

  const int32_t* covered() const { return covered_.data()->column; }               // 0 or 1 for each column
  int64_t area() const { return count_covered(covered_.data()->column, width_); }  // pixels covered in this row

 private:
  struct Event {
    int32_t x0, x1, value, next;
  };

  void push(int64_t y, int64_t x0, int64_t x1, int32_t value) {
    events_.push_back({static_cast<int32_t>(x0), static_cast<int32_t>(x1), value, first_[y]});
    first_[y] = static_cast<int32_t>(events_.size()) - 1;
  }

  int64_t height_, width_;
  const int32_t* mask_ = nullptr;
  std::vector<int32_t> first_;  // first event of each row, -1 for none
  std::vector<Event> events_;
  std::vector<ColumnGroup> counts_, covered_;
};

}  // namespace debiaskd
