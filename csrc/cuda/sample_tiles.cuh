// Samples cut into tiles that a team of threads holds in registers between reading and writing.
#pragma once

#include <type_traits>

#include "common/samples.h"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

constexpr int kMatchThreads = 256;
constexpr int kItems = 16;  // elements of a tile that each thread holds

template <typename T>
struct Samples {
  const T *student, *teacher;
  T* gradient;
  int64_t count, elements, tiles;  // elements and tiles of one sample
};

// Reads a team's tile, WIDTH elements at a time. What lies behind the sample's end is 0 in both.
template <typename T, int TEAM, int WIDTH, typename A>
__device__ __forceinline__ void read_tile(
    const Samples<T>& in, int64_t sample, int64_t begin, int lane, A (&s)[kItems], A (&t)[kItems]) {
  const int64_t first = sample * in.elements;
#pragma unroll
  for (int i = 0; i < kItems; i += WIDTH) {
    const int64_t element = begin + (i / WIDTH * TEAM + lane) * WIDTH;
    Pack<T, WIDTH> sp = {}, tp = {};
    if (element < in.elements) {
      sp = load_pack<WIDTH>(in.student + first + element), tp = load_pack<WIDTH>(in.teacher + first + element);
    }
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      s[i + j] = static_cast<A>(sp.value[j]), t[i + j] = static_cast<A>(tp.value[j]);
    }
  }
}

template <typename T, int TEAM, int WIDTH, typename A>
__device__ __forceinline__ void write_tile(
    const Samples<T>& in, int64_t sample, int64_t begin, int lane, const A (&values)[kItems]) {
  T* gradient = in.gradient + sample * in.elements;
#pragma unroll
  for (int i = 0; i < kItems; i += WIDTH) {
    const int64_t element = begin + (i / WIDTH * TEAM + lane) * WIDTH;
    if (element >= in.elements) continue;
    Pack<T, WIDTH> pack;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) pack.value[j] = static_cast<T>(values[i + j]);
    store_pack(pack, gradient + element);
  }
}

// ---- what the launches of a pass are told ----

template <typename T>
Samples<T> describe(const Tensor& student, const Tensor& teacher, const Tensor* gradient) {
  return {static_cast<const T*>(student.data_ptr()), static_cast<const T*>(teacher.data_ptr()),
      gradient ? static_cast<T*>(gradient->data_ptr()) : nullptr, student.size(0),
      elements_of_samples(student, teacher), 0};
}

// Sets how many tiles the samples have, and calls function(team size, elements an access) with constants that fit them.
template <typename T, typename Function>
void with_tiles(Samples<T>& in, Function&& function) {
  const bool small = in.elements <= 32 * kItems;
  const int64_t tile = (small ? 32 : kMatchThreads) * kItems;
  in.tiles = (in.elements + tile - 1) / tile;
  const bool wide =
      in.elements % kWidest<T> == 0 && is_aligned(in.student) && is_aligned(in.teacher) && is_aligned(in.gradient);
  const auto with_team = [&](auto team) {
    if (wide) return function(team, std::integral_constant<int, kWidest<T>>{});
    function(team, std::integral_constant<int, 1>{});
  };
  if (small) return with_team(std::integral_constant<int, 32>{});
  with_team(std::integral_constant<int, kMatchThreads>{});
}

}  // namespace
}  // namespace debiaskd
