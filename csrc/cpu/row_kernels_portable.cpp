#define SPO_SIMD_LEVEL portable
#define SPO_SIMD_PORTABLE
#include "row_kernels_impl.h"
