// The SIMD level in use: the best that the CPU has, unless a caller lowers it. Each level counts the rows that it runs.
#pragma once

#include <array>
#include <cstdint>

#include "export.h"

namespace spo::cpu {

enum class SimdLevel { avx512, avx2, portable };  // best first
inline constexpr std::array<const char*, 3> kSimdLevelNames{"avx512", "avx2", "portable"};
inline constexpr int kSimdLevels = 3;

SPO_EXPORT bool simd_level_supported(SimdLevel level);
SPO_EXPORT SimdLevel simd_level();
SPO_EXPORT void set_simd_level(SimdLevel level);  // must be supported

void count_rows(SimdLevel level, std::int64_t rows);  // a backward and a scale count parts of rows
SPO_EXPORT std::int64_t rows_executed(SimdLevel level);
SPO_EXPORT void reset_rows_executed();

}  // namespace spo::cpu
