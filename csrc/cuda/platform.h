// CUDA, or its emulation on the CPU for tests (SPO_CUDA_EMULATOR: tests/cuda/cuda_emulator.h): the launch, and the
// few instructions that have no portable spelling. Everything else in this folder is the same source for both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if defined(SPO_CUDA_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

#define SPO_DEVICE __device__ __forceinline__

namespace spo::cuda {

// kernel<<<grid, block, 0, stream>>>(args...), with the error of the launch itself.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned grid, unsigned block, cudaStream_t stream, const Args&... args) {
#if defined(SPO_CUDA_EMULATOR)
  (void)stream;
  emulator::launch(kernel, grid, block, args...);
  return cudaSuccess;
#else
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
#endif
}

// 2^x with an error of at most 2 ulp, subnormal results flushed to 0: one instruction. The emulator is off by 1 ulp
// either way, but for whole x. With 2 ulp every float32 case stays within its budget too.
SPO_DEVICE float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(SPO_CUDA_EMULATOR)
  const float exact = exp2f(x), y = x == floorf(x) ? exact : emulator::off_by(exact, 1);
  return y < 1.17549435e-38f ? 0.f : y;  // NaN stays
#else
  return x;  // nvcc compiles this for the host as well, where nothing calls it
#endif
}

// The larger one, NaN if either is.
SPO_DEVICE float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// Two operations in one instruction where the hardware has it (sm_100 and later): half the issue slots.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define SPO_PACKED_FLOAT 1
#else
#define SPO_PACKED_FLOAT 0
#endif

// Where a polynomial takes a share of the exponentials: where memory outruns the special function unit, which is also
// where packed operations make a polynomial cheap. The emulator's builds test both.
#if !defined(SPO_POLYNOMIAL_EXP)
#define SPO_POLYNOMIAL_EXP SPO_PACKED_FLOAT
#endif

SPO_DEVICE float2 add2(float2 a, float2 b) {
#if SPO_PACKED_FLOAT
  return __fadd2_rn(a, b);
#else
  return {a.x + b.x, a.y + b.y};
#endif
}
SPO_DEVICE float2 mul2(float2 a, float2 b) {
#if SPO_PACKED_FLOAT
  return __fmul2_rn(a, b);
#else
  return {a.x * b.x, a.y * b.y};
#endif
}
SPO_DEVICE float2 fma2(float2 a, float2 b, float2 c) {
#if SPO_PACKED_FLOAT
  return __ffma2_rn(a, b, c);
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

}  // namespace spo::cuda
