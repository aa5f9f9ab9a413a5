// Every op's schema, in this file alone. It is a library of its own, so that the CPU and the CUDA library can each be
// missing. What the arguments mean is said where users meet them, in debiaskd/ops/<op>.py.

#include "common/stable.h"

STABLE_TORCH_LIBRARY(debiaskd, m) {
  m.def(
      "feature_match(Tensor student, Tensor teacher, Tensor? weight, bool normalize, int reduction, "
      "bool with_gradient) -> (Tensor loss, Tensor gradient)");
  m.def(
      "feature_match_backward(Tensor grad_output, Tensor student, Tensor teacher, Tensor? weight, bool normalize, "
      "int reduction) -> Tensor");
  m.def("feature_match_scale_(Tensor(a!) gradient, Tensor grad_output) -> ()");

  m.def(
      "localization(Tensor attribution, Tensor coords, Tensor offsets, Tensor annotated, int kind, int height, "
      "int width, int reduction, bool with_state) -> (Tensor loss, Tensor coefficients, Tensor positive)");
  m.def(
      "localization_backward(Tensor grad_output, Tensor? attribution, Tensor coords, Tensor offsets, "
      "Tensor annotated, Tensor coefficients, Tensor positive, int kind, int height, int width, int map_height, "
      "int map_width, ScalarType dtype) -> Tensor");
}
