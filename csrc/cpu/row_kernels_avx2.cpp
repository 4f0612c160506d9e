#define SPO_SIMD_LEVEL avx2
#define SPO_SIMD_AVX2
#include "row_kernels_impl.h"
