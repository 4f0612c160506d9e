#include "simd_level.h"

#include <atomic>

namespace spo::cpu {
namespace {

SimdLevel best_level() {
  for (int level = 0; level < kSimdLevels; ++level)
    if (simd_level_supported(static_cast<SimdLevel>(level))) return static_cast<SimdLevel>(level);
  return SimdLevel::portable;
}

std::atomic<SimdLevel>& current() {
  static std::atomic<SimdLevel> level{best_level()};
  return level;
}

std::atomic<std::int64_t> executed[kSimdLevels];

}  // namespace

bool simd_level_supported(SimdLevel level) {
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the wide registers.
  if (level == SimdLevel::avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (level == SimdLevel::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return level == SimdLevel::portable;
}

SimdLevel simd_level() { return current().load(std::memory_order_relaxed); }
void set_simd_level(SimdLevel level) { current().store(level, std::memory_order_relaxed); }

void count_rows(SimdLevel level, std::int64_t rows) {
  executed[static_cast<int>(level)].fetch_add(rows, std::memory_order_relaxed);
}
std::int64_t rows_executed(SimdLevel level) { return executed[static_cast<int>(level)].load(); }
void reset_rows_executed() {
  for (auto& counter : executed) counter.store(0);
}

}  // namespace spo::cpu
