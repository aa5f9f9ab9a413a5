// Samples [N, ...] with any strides, cut into tiles that a team of threads holds in registers between reading and
// writing.
#pragma once

#include <type_traits>
#include <vector>

#include "common/sample_axes.h"
#include "cuda/vector.cuh"

namespace debiaskd {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 16;   // elements of a tile that each thread holds
constexpr int kStrided = 0;  // in place of the elements an access, where they do not follow each other
constexpr int kAxes = 10;    // axes within a sample that do not merge; with more, inputs are copied

struct Axes {
  int count;
  Axis axis[kAxes];
};

// Teacher and gradient are those of the student everywhere. `flat`: elements follow each other without a gap in all
// three.
template <typename T>
struct Samples {
  const T *student, *teacher;
  T* gradient;
  int64_t student_step, teacher_step, gradient_step;  // from one sample to the next
  int64_t count, elements, tiles;                     // elements and tiles of one sample
  Axes axes;
};

struct Offsets {
  int64_t student, teacher, gradient;
};

// Called, not inlined: a 64-bit division is a hundred instructions, and a thread's sixteen elements would repeat them.
__device__ __noinline__ Offsets offsets_of(const Axes& axes, int64_t element) {
  Offsets at = {0, 0, 0};
  for (int i = axes.count - 1; i > 0; --i) {
    const Axis& axis = axes.axis[i];
    const int64_t index = element % axis.size;
    element /= axis.size;
    at.student += index * axis.student;
    at.teacher += index * axis.teacher;
    at.gradient += index * axis.gradient;
  }
  const Axis& first = axes.axis[0];
  return {at.student + element * first.student, at.teacher + element * first.teacher,
      at.gradient + element * first.gradient};
}

// Reads a team's tile, WIDTH elements at a time or, if that is kStrided, each where its axes put it. What lies behind
// the sample's end is 0 in both.
template <typename T, int TEAM, int WIDTH, typename A>
__device__ __forceinline__ void read_tile(
    const Samples<T>& in, int64_t sample, int64_t begin, int lane, A (&s)[kItems], A (&t)[kItems]) {
  const T* student = in.student + sample * in.student_step;
  const T* teacher = in.teacher + sample * in.teacher_step;
  constexpr int kWidth = WIDTH == kStrided ? 1 : WIDTH;
#pragma unroll
  for (int i = 0; i < kItems; i += kWidth) {
    const int64_t element = begin + (i / kWidth * TEAM + lane) * kWidth;
    Pack<T, kWidth> sp = {}, tp = {};
    if (element < in.elements) {
      if constexpr (WIDTH == kStrided) {
        const Offsets at = offsets_of(in.axes, element);
        sp.value[0] = student[at.student], tp.value[0] = teacher[at.teacher];
      } else {
        sp = load_pack<kWidth>(student + element), tp = load_pack<kWidth>(teacher + element);
      }
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      s[i + j] = static_cast<A>(sp.value[j]), t[i + j] = static_cast<A>(tp.value[j]);
    }
  }
}

template <typename T, int TEAM, int WIDTH, typename A>
__device__ __forceinline__ void write_tile(
    const Samples<T>& in, int64_t sample, int64_t begin, int lane, const A (&values)[kItems]) {
  T* gradient = in.gradient + sample * in.gradient_step;
  constexpr int kWidth = WIDTH == kStrided ? 1 : WIDTH;
#pragma unroll
  for (int i = 0; i < kItems; i += kWidth) {
    const int64_t element = begin + (i / kWidth * TEAM + lane) * kWidth;
    if (element >= in.elements) continue;
    Pack<T, kWidth> pack;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) pack.value[j] = static_cast<T>(values[i + j]);
    if constexpr (WIDTH == kStrided) {
      gradient[offsets_of(in.axes, element).gradient] = pack.value[0];
    } else {
      store_pack(pack, gradient + element);
    }
  }
}

// ---- what the launches of a pass are told ----

template <typename T>
Samples<T> describe(const Tensor& student, const Tensor& teacher, const Tensor* gradient) {
  Samples<T> in = {};
  in.student = static_cast<const T*>(student.data_ptr());
  in.teacher = static_cast<const T*>(teacher.data_ptr());
  in.count = student.size(0);
  in.elements = 1;
  for (int64_t i = 1; i < student.dim(); ++i) in.elements *= student.size(i);
  in.student_step = student.stride(0);
  in.teacher_step = teacher.stride(0);
  if (gradient) {
    in.gradient = static_cast<T*>(gradient->data_ptr());
    in.gradient_step = gradient->stride(0);
  }
  const std::vector<Axis> axes = sample_axes(student, teacher, gradient);
  in.axes.count = static_cast<int>(axes.size());
  std::copy(axes.begin(), axes.end(), in.axes.axis);
  return in;
}

// Elements an access: 16 bytes of them, 1, or kStrided.
template <typename T>
int access_width(const Samples<T>& in) {
  const Axis& axis = in.axes.axis[0];
  if (in.axes.count > 1 || axis.student != 1 || axis.teacher != 1 || (in.gradient && axis.gradient != 1))
    return kStrided;
  const auto fits = [](int64_t n) { return n % kWidest<T> == 0; };
  const bool wide = fits(in.elements) && fits(in.student_step) && fits(in.teacher_step) && fits(in.gradient_step) &&
                    is_aligned(in.student) && is_aligned(in.teacher) && is_aligned(in.gradient);
  return wide ? kWidest<T> : 1;
}

// Sets how many tiles the samples have, and calls function(team size, access width) with constants that fit them.
template <typename T, typename Function>
void with_tiles(Samples<T>& in, Function&& function) {
  const bool small = in.elements <= 32 * kItems;
  const int64_t tile = (small ? 32 : kThreads) * kItems;
  in.tiles = (in.elements + tile - 1) / tile;
  const auto with_team = [&](auto team) {
    const int width = access_width(in);
    if (width == kStrided) return function(team, std::integral_constant<int, kStrided>{});
    if (width == 1) return function(team, std::integral_constant<int, 1>{});
    function(team, std::integral_constant<int, kWidest<T>>{});
  };
  if (small) return with_team(std::integral_constant<int, 32>{});
  with_team(std::integral_constant<int, kThreads>{});
}

}  // namespace
}  // namespace debiaskd
