// Every op's schema, in this file alone. It is a library of its own, so that the CPU and the CUDA library can each be
// missing. What the arguments mean is said where users meet them, in debiaskd/ops/<op>.py.

#include "common/stable.h"

#if !defined(DEBIASKD_NAMESPACE)
#define DEBIASKD_NAMESPACE debiaskd
#endif
#define DEBIASKD_SCHEMA(name, m) STABLE_TORCH_LIBRARY(name, m)  // in which `name` is no longer a macro

DEBIASKD_SCHEMA(DEBIASKD_NAMESPACE, m) {
  m.def(
      "feature_match(Tensor student, Tensor teacher, Tensor? weight, bool normalize, int reduction, "
      "bool with_gradient) -> (Tensor loss, Tensor gradient)");
  m.def(
      "feature_match_backward(Tensor grad_output, Tensor student, Tensor teacher, Tensor? weight, bool normalize, "
      "int reduction) -> Tensor");
  m.def("feature_match_scale_(Tensor(a!) gradient, Tensor grad_output) -> ()");

  m.def(
      "localization(Tensor attribution, Tensor coords, Tensor offsets, Tensor annotated, Tensor? mask, int kind, "
      "int height, int width, int reduction, bool with_state) -> (Tensor loss, Tensor coefficients, Tensor positive)");
  m.def(
      "localization_backward(Tensor grad_output, Tensor? attribution, Tensor coords, Tensor offsets, "
      "Tensor annotated, Tensor? mask, Tensor coefficients, Tensor positive, int kind, int height, int width, "
      "int map_height, int map_width, ScalarType dtype) -> Tensor");

  m.def(
      "box_overlap(Tensor attribution, Tensor coords, Tensor offsets, Tensor annotated, Tensor? mask, "
      "Tensor? ignore_coords, Tensor? ignore_offsets, Tensor? ignore_annotated, Tensor? ignore_mask, "
      "float[] thresholds, int height, int width) -> (Tensor intersection, Tensor union_, Tensor defined)");

  m.def(
      "map_cosine(Tensor student, Tensor teacher, Tensor? weight, int reduction, bool with_gradient) -> "
      "(Tensor loss, Tensor gradient)");
  m.def(
      "map_cosine_backward(Tensor grad_output, Tensor student, Tensor teacher, Tensor? weight, int reduction) -> "
      "Tensor");

  m.def("channel_dot(Tensor gradient, Tensor feature) -> Tensor");
  m.def("channel_scale(Tensor map, Tensor values, bool channels_last, ScalarType dtype) -> Tensor");

  m.def(
      "class_relation(Tensor student, Tensor teacher, Tensor labels, bool with_gradient) -> (Tensor loss, "
      "Tensor gradient)");

  m.def("backdoor(Tensor feature_logits, Tensor context_logits, Tensor log_prior) -> (Tensor output, Tensor norm)");
  m.def(
      "backdoor_backward(Tensor grad_output, Tensor feature_logits, Tensor context_logits, Tensor log_prior, "
      "Tensor norm, Tensor output, bool with_context) -> (Tensor grad_feature, Tensor grad_context)");
}
