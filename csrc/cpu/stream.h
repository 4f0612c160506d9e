// Bandwidth probes: what memory gives to the simplest loops, as the yardstick of the benchmarks.
#pragma once

#include <cstdint>

#include "export.h"

namespace spo::cpu {

// Seconds of one pass over n floats by `threads` threads; the best of several loops (streams, prefetch distance).
SPO_EXPORT double stream_read(const float* data, std::int64_t n, int threads);
SPO_EXPORT double stream_inplace(float* data, std::int64_t n, int threads);

}  // namespace spo::cpu
