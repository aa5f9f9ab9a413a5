// The mathematics that CPU and GPU share (csrc/common), one element at a time, for Python to try.

#include <pybind11/pybind11.h>

#include <tuple>

#include "common/bilinear.h"
#include "common/localization.h"

namespace {

using debiaskd::MapLoss;

std::tuple<int64_t, int64_t, double> bilinear_tap(int64_t output, int64_t output_size, int64_t input_size) {
  const debiaskd::Tap tap = debiaskd::bilinear_tap(output, output_size, input_size);
  return {tap.low, tap.high, tap.weight};
}

std::tuple<double, double, double> map_loss(int64_t kind, double all, double inside, double area, double pixels) {
  const MapLoss of = debiaskd::map_loss(kind, {all, inside, area}, pixels);
  return {of.loss, of.inside, of.outside};
}

}  // namespace

PYBIND11_MODULE(common, m) {
  m.def("bilinear_tap", bilinear_tap);
  m.def("map_loss", map_loss);
  m.def("pixel_gradient", debiaskd::pixel_gradient<double>);
  m.def("pixel_gradient_float", debiaskd::pixel_gradient<float>);
}
