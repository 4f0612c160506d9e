// What memory gives to the simplest loops: the limit that the benchmarks compare the kernels with.
#pragma once

#include <cstdint>

namespace spo::probe {

// Seconds to read n floats once with `threads` threads: the fastest of several loops, which differ in their number of
// streams and in the distance of prefetching.
double seconds_to_read(const float* data, std::int64_t n, int threads);

// Seconds to read n floats and write them back changed, likewise.
double seconds_to_update(float* data, std::int64_t n, int threads);

}  // namespace spo::probe
