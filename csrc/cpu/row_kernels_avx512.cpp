#define SPO_SIMD_LEVEL avx512
#define SPO_SIMD_AVX512
#include "row_kernels_impl.h"
