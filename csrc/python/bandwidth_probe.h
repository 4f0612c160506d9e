// Measures the memory bandwidth of the simplest loops. The benchmarks compare the kernels with this limit.
#pragma once

#include <cstdint>

namespace spo::probe {

// Seconds to read n floats once with `threads` threads: the fastest of four loops, with one or four streams, with or
// without prefetch.
double seconds_to_read(const float* data, std::int64_t n, int threads);

// Seconds to read n floats and write them back changed, with `threads` threads: the faster of two loops, with or
// without prefetch.
double seconds_to_update(float* data, std::int64_t n, int threads);

}  // namespace spo::probe
