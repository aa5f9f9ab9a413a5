// What the rows of a class weigh in each other's gradients, and what their relations add to the loss.
#pragma once

#include "cuda/class_relation_groups.cuh"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

constexpr int kCombineThreads = 256;
constexpr int kRows = kCombineThreads / 32;  // of a tile
constexpr int kMates = 128;                  // rows of the class that weights are in shared memory for, at a time

// Numbers of a type that is known only when the kernel runs: a teacher may have a dtype of its own.
struct Reals {
  const void* data;
  bool wide;

  template <typename A>
  __device__ __forceinline__ A at(int64_t i) const {
    if (wide) return static_cast<A>(static_cast<const double*>(data)[i]);
    return static_cast<A>(static_cast<const float*>(data)[i]);
  }
};

template <typename T>
struct Combination {
  using A = typename accumulator<T>::type;

  const T* student;
  int64_t row_step, step, width;
  const A *products, *inverse;  // as in Side
  Reals teacher_products, teacher_inverse;
  A* gradient;      // [N, width]; null: not asked for
  double* partial;  // [N]: what the block of each place has of the loss
  A* loss;          // where the last block is to add that up; null: more launches follow
};

// A class as seen from one of its blocks.
struct Circle {
  Group group;
  const int* members;
  int64_t products;  // where those of its first member begin, or would
  int samples;
  double weight;  // of a squared difference in the loss
};

template <typename A>
struct Weights {
  static constexpr int kStride = kRows + kWidest<A>;  // 8 would put every fourth row into the same banks

  alignas(16) A of[kMates * kStride];  // some rows of the class, in each row of the tile
  int sample[kMates];
  A scale[kRows], shift[kRows];  // gradient = scale * (weights times rows - shift * own row)
};

template <typename A>
struct Relation {
  A cosine, difference;
};

template <typename A>
struct Row {
  int rank;
  bool there;
  A inverse, teacher_inverse;
};

template <typename T, typename A = typename accumulator<T>::type>
__device__ __forceinline__ Row<A> row_of_warp(const Combination<T>& in, const Circle& circle, int tile) {
  const int rank = tile + threadIdx.x / 32, place = circle.group.first + rank;
  if (rank >= circle.group.size) return {rank, false, 0, 0};
  return {rank, true, in.inverse[place], in.teacher_inverse.template at<A>(place)};
}

// With itself, a row has a cosine of 1, or of 0 where it has no direction; NaN stays.
template <typename A>
__device__ __forceinline__ A own_cosine(A inverse) {
  return inverse > 0 ? A(1) : inverse;
}

template <typename T, typename A>
__device__ __forceinline__ Relation<A> relate(
    const Combination<T>& in, const Circle& circle, const Row<A>& row, int mate, A inverse) {
  const int64_t at = circle.products + static_cast<int64_t>(row.rank) * circle.samples + mate;
  A student = in.products[at] * row.inverse * inverse;
  A teacher = in.teacher_products.template at<A>(at) * row.teacher_inverse *
              in.teacher_inverse.template at<A>(circle.group.first + mate);
  if (mate == row.rank) student = own_cosine(row.inverse), teacher = own_cosine(row.teacher_inverse);
  return {student, student - teacher};
}

// Sets scale and shift of the tile's rows; returns what this lane has of their loss.
template <typename T, typename A>
__device__ double measure(const Combination<T>& in, const Circle& circle, int tile, Weights<A>& weights) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Row<A> row = row_of_warp(in, circle, tile);
  double loss = 0;
  A own = 0;
  for (int mate = lane; row.there && mate < circle.group.size; mate += 32) {
    const Relation<A> relation = relate(in, circle, row, mate, in.inverse[circle.group.first + mate]);
    loss += static_cast<double>(relation.difference) * relation.difference;
    if (mate != row.rank) own += relation.difference * relation.cosine;
  }
  own = warp_sum(own);
  if (lane == 0) {
    weights.scale[warp] = static_cast<A>(4 * circle.weight) * row.inverse;
    weights.shift[warp] = own * row.inverse;
  }
  return loss * circle.weight;
}

// Weights of the rows from rank `begin` on. Until the next barrier nobody may read them.
template <typename T, typename A>
__device__ void weigh(const Combination<T>& in, const Circle& circle, int tile, int begin, Weights<A>& weights) {
  const Row<A> row = row_of_warp(in, circle, tile);
  for (int i = threadIdx.x % 32; i < kMates && begin + i < circle.group.size; i += 32) {
    const int mate = begin + i;
    A weight = 0;
    if (row.there && mate != row.rank) {
      const A inverse = in.inverse[circle.group.first + mate];
      weight = relate(in, circle, row, mate, inverse).difference * inverse;
    }
    weights.of[i * Weights<A>::kStride + threadIdx.x / 32] = weight;
  }
  const int i = threadIdx.x;
  if (i < kMates && begin + i < circle.group.size) weights.sample[i] = circle.members[begin + i];
}

}  // namespace
}  // namespace debiaskd
