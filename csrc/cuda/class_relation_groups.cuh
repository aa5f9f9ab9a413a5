// Which samples are of one class: found where the labels lie, since nobody may wait for them on the host.
//
// Samples take places in an order sorted by label, those of one label in the order in which they came. Every block of a
// small batch looks through all labels for itself, and so there is no launch for it; larger batches have one before.
#pragma once

#include "cuda/reduce.cuh"

namespace debiaskd {
namespace {

constexpr int kOwnLabels = 512;  // with so many samples, or fewer, every block looks for itself
constexpr int kBand = 32;        // members of a class that are never parted by the end of a stretch
constexpr int kGroupThreads = 256;
constexpr int kGroupRows = 8;  // samples that a block of group_kernel finds the places of, reading labels once

struct Labels {
  const int64_t* data;
  int64_t step;
  int samples;

  // Past the end, the last one.
  __device__ int64_t operator[](int i) const { return data[(i < samples ? i : samples - 1) * step]; }
};

// A class: where its members begin in sorted order, and how many they are.
struct Group {
  int first, size;
};

// What is known of the classes once it has been found, by place in sorted order.
struct Classes {
  int* order;     // the samples
  Group* groups;  // the class of each
  int* counts;    // `parts` numbers, whose sum is the number of classes with two members or more
  int parts;
  unsigned* finished;  // for the last block of the last launch; 0 until then
};

// A member of a class.
struct Member {
  Group group;
  int rank;            // among them
  const int* members;  // the samples, by rank
};

// Relations are kept for so many places at a time. Whole bands belong to the stretch that their first member lies in,
// so that `rows` places and a band less one are kept; all of them, if it is the only one.
struct Stretch {
  int begin, rows;
  bool only;
};

// Ranks of a class that lie in a stretch.
struct Share {
  int begin, end;

  __device__ bool has(int rank) const { return begin <= rank && rank < end; }
};

__device__ __forceinline__ Share share_of(const Group& group, const Stretch& stretch) {
  const auto bands_before = [&](int place) {
    return place > group.first ? (place - group.first + kBand - 1) / kBand : 0;
  };
  const int begin = bands_before(stretch.begin), end = bands_before(stretch.begin + stretch.rows);
  return {begin * kBand, end * kBand < group.size ? end * kBand : group.size};
}

// ---- small batches: each block for itself ----

// The place of a sample, and its class's members in shared memory. All threads of the block must take part.
template <int THREADS>
__device__ Member find_member(const Labels& labels, int sample) {
  constexpr int kWarps = THREADS / 32, kWords = kOwnLabels / 32;
  __shared__ unsigned same[kWords], below[kWords];
  __shared__ int members[kOwnLabels];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, words = (labels.samples + 31) / 32;
  const int64_t own = labels[sample];
  for (int word = warp; word < words; word += kWarps) {
    const int i = word * 32 + lane;
    const int64_t label = labels[i];
    const unsigned is_same = __ballot_sync(kFullWarp, i < labels.samples && label == own);
    const unsigned is_below = __ballot_sync(kFullWarp, i < labels.samples && label < own);
    if (lane == 0) same[word] = is_same, below[word] = is_below;
  }
  __syncthreads();
  Member found = {{0, 0}, 0, members};
  for (int word = 0; word < words; ++word) {
    const int rank = found.group.size + __popc(same[word] & ((1u << lane) - 1));
    if (word % kWarps == warp && same[word] >> lane & 1) members[rank] = word * 32 + lane;
    if (word == sample / 32) found.rank = found.group.size + __popc(same[word] & ((1u << sample % 32) - 1));
    found.group.size += __popc(same[word]);
    found.group.first += __popc(below[word]);
  }
  __syncthreads();
  return found;
}

// Leaves for later launches what one block has found; to be called for every sample, by one thread.
__device__ __forceinline__ void remember(const Classes& classes, const Member& found, int sample) {
  const int place = found.group.first + found.rank;
  classes.order[place] = sample;
  classes.groups[place] = found.group;
  classes.counts[sample] = found.rank == 0 && found.group.size > 1;
  if (sample == 0) *classes.finished = 0;
}

// ---- large batches: a launch before ----

// A thread compares the labels that it reads with those of all samples of its block, of which there are so many that
// comparing takes longer than reading.
__global__ void __launch_bounds__(kGroupThreads, 2) group_kernel(Labels labels, Classes classes) {
  __shared__ int counts[kGroupThreads / 32][3 * kGroupRows];
  __shared__ int starts[kGroupRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, begin = blockIdx.x * kGroupRows;
  int64_t own[kGroupRows];
  int found[3 * kGroupRows] = {};  // labels below, the same before, the same
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) own[r] = labels[begin + r];
#pragma unroll 1
  for (int i = threadIdx.x; i < labels.samples; i += kGroupThreads) {
    const int64_t label = labels[i];
#pragma unroll
    for (int r = 0; r < kGroupRows; ++r) {
      found[3 * r] += label < own[r];
      found[3 * r + 1] += label == own[r] && i < begin + r;
      found[3 * r + 2] += label == own[r];
    }
  }
#pragma unroll
  for (int i = 0; i < 3 * kGroupRows; ++i) {
    const int sum = warp_sum(found[i]);
    if (lane == 0) counts[warp][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kGroupRows) {
    int sums[3] = {};
    for (int w = 0; w < kGroupThreads / 32; ++w) {
      for (int i = 0; i < 3; ++i) sums[i] += counts[w][3 * threadIdx.x + i];
    }
    const int sample = begin + threadIdx.x, place = sums[0] + sums[1];
    const bool there = sample < labels.samples;
    if (there) {
      classes.order[place] = sample;
      classes.groups[place] = {sums[0], sums[2]};
    }
    starts[threadIdx.x] = there && sums[1] == 0 && sums[2] > 1;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  int sum = 0;
  for (int r = 0; r < kGroupRows; ++r) sum += starts[r];
  classes.counts[blockIdx.x] = sum;
  if (blockIdx.x == 0) *classes.finished = 0;
}

}  // namespace
}  // namespace debiaskd
