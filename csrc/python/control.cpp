// The control module, free of torch: build facts, the SIMD level in use, and the bandwidth probe of the benchmarks.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "../cpu/simd_level.h"
#include "bandwidth_probe.h"

namespace py = pybind11;
using spo::cpu::SimdLevel;

namespace {

std::vector<std::string> simd_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < spo::cpu::kSimdLevels; ++i)
    if (spo::cpu::simd_level_supported(static_cast<SimdLevel>(i))) names.emplace_back(spo::cpu::kSimdLevelNames[i]);
  return names;
}

void set_simd_level(const std::string& name) {
  for (int i = 0; i < spo::cpu::kSimdLevels; ++i)
    if (name == spo::cpu::kSimdLevelNames[i] && spo::cpu::simd_level_supported(static_cast<SimdLevel>(i)))
      return spo::cpu::set_simd_level(static_cast<SimdLevel>(i));
  std::string message = "SIMD level must be one that this CPU has (";
  for (const std::string& have : simd_levels()) message += have + " ";
  message.back() = ')';
  throw py::value_error(message + ", got '" + name + "'");
}

using FloatArray = py::array_t<float, py::array::c_style>;

double seconds_to_read(const FloatArray& array, int threads) {
  const float* data = array.data();
  const auto n = static_cast<std::int64_t>(array.size());
  const py::gil_scoped_release release;
  return spo::probe::seconds_to_read(data, n, threads);
}

double seconds_to_update(FloatArray array, int threads) {
  float* data = array.mutable_data();
  const auto n = static_cast<std::int64_t>(array.size());
  const py::gil_scoped_release release;
  return spo::probe::seconds_to_update(data, n, threads);
}

}  // namespace

PYBIND11_MODULE(_control, m) {
  m.doc() = "Build facts and run-time control of the compiled kernels.";
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{{"compiler", SPO_COMPILER},
                                                  {"torch", SPO_TORCH_VERSION},
                                                  {"torch_target", SPO_TORCH_TARGET},
                                                  {"cuda", SPO_CUDA_FACT}};
      },
      "Facts of the build. compiler; torch: the version whose headers were used; torch_target: the oldest version that "
      "the build runs with; cuda: compiler and architectures of the CUDA kernels.");
  m.def("simd_levels", &simd_levels, "SIMD levels that this CPU can run, best first.");
  m.def(
      "simd_level", [] { return spo::cpu::kSimdLevelNames[static_cast<int>(spo::cpu::simd_level())]; },
      "The SIMD level in use.");
  m.def("set_simd_level", &set_simd_level, py::arg("name"), "Use this SIMD level. ValueError if the CPU lacks it.");
  m.def(
      "rows_executed",
      [] {
        std::map<std::string, std::int64_t> rows;
        for (int i = 0; i < spo::cpu::kSimdLevels; ++i)
          rows[spo::cpu::kSimdLevelNames[i]] = spo::cpu::rows_executed(static_cast<SimdLevel>(i));
        return rows;
      },
      "Rows that each SIMD level has executed, counted where the kernels run. A backward and a scale count parts of "
      "rows.");
  m.def("reset_rows_executed", &spo::cpu::reset_rows_executed, "Set the counts of rows_executed to 0.");
  m.def("seconds_to_read", &seconds_to_read, py::arg("array"), py::arg("threads"),
        "Seconds to read a float32 array once: the fastest of four loops.");
  m.def("seconds_to_update", &seconds_to_update, py::arg("array").noconvert(), py::arg("threads"),
        "Seconds to read a float32 array and write it back once: the faster of two loops.");
}
