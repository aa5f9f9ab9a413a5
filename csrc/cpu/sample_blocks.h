// Samples cut into blocks that threads share.
#pragma once

#include <algorithm>
#include <vector>

#include "common/samples.h"

namespace debiaskd {
namespace {

constexpr int64_t kBlock = 16384;  // elements: they fit into the first-level caches

struct Samples {
  int64_t count, elements;  // elements: in one sample

  Samples(const Tensor& student, const Tensor& teacher)
      : count(student.size(0)), elements(elements_of_samples(student, teacher)) {}
};

// Runs block_sum(sample, offset, count) for every block in parallel; returns each sample's sums added up, in order.
template <typename BlockSum>
std::vector<double> sum_per_sample(const Samples& samples, BlockSum&& block_sum) {
  const int64_t blocks = (samples.elements + kBlock - 1) / kBlock, tasks = samples.count * blocks;
  std::vector<double> partial(tasks);
  const int64_t grain = std::max<int64_t>(1, 2 * kBlock / std::max<int64_t>(1, std::min(samples.elements, kBlock)));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, start = i % blocks * kBlock;
      const int64_t count = std::min(kBlock, samples.elements - start);
      partial[i] = block_sum(sample, sample * samples.elements + start, count);
    }
  });
  std::vector<double> sums(samples.count, 0.0);
  for (int64_t i = 0; i < tasks; ++i) sums[i / blocks] += partial[i];
  return sums;
}

}  // namespace
}  // namespace debiaskd
