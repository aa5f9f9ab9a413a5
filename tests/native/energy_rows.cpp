// The loops of csrc/cpu/energy_rows.h for one row, each by its own name: a processor chooses but one of them.

#include "cpu/energy_rows.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace {

using debiaskd::EnergyLanes;

// The sums of the pixels that a loop takes, all and those covered, and their bits.
std::tuple<double, double, std::vector<int32_t>> add(
    const std::string& loop, const std::vector<float>& a, const std::vector<int32_t>& covered) {
  const int64_t n = static_cast<int64_t>(a.size());
  std::vector<int32_t> words((n + 31) / 32, -1);
  if (loop == "plain") {
    debiaskd::MapSums sums;
    debiaskd::PlainEnergySums<float> plain;
    plain.add(a.data(), covered.data(), n, words.data());
    plain.finish(sums);
    return {sums.all, sums.inside, words};
  }
  double all = 0, inside = 0;
#if defined(DEBIASKD_AVX2)
  EnergyLanes lanes{};
  const auto by = loop == "by_8" ? debiaskd::add_by_8 : debiaskd::add_by_16;
  const int64_t done = by(a.data(), covered.data(), n, lanes, words.data());
  if (done != n / 32 * 32) throw std::runtime_error("not all whole words were taken");
  for (int lane = 0; lane < 32; ++lane) all += lanes.all[lane], inside += lanes.inside[lane];
#endif
  return {all, inside, words};
}

// Writes a row that starts `shift` floats behind a multiple of 64 bytes.
std::vector<float> unpack(const std::vector<int32_t>& words, const std::vector<float>& value, int64_t shift) {
  const int64_t n = static_cast<int64_t>(value.size());
  alignas(64) static float memory[4096];
  debiaskd::unpack<float, float>(true, words.data(), value.data(), memory + shift, n);
  return {memory + shift, memory + shift + n};
}

std::vector<std::string> loops() {
  std::vector<std::string> names;
  if (debiaskd::has_avx2()) names.push_back("by_8");
  if (debiaskd::has_avx512()) names.push_back("by_16");
  return names;
}

}  // namespace

PYBIND11_MODULE(energy_rows, m) {
  m.def("loops", loops);
  m.def("add", add);
  m.def("unpack", unpack);
}
