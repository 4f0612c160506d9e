// CUDA, or its emulation on the CPU for tests (SPO_CUDA_EMULATOR, tests/cuda/cuda_emulator.h): launches, and the few
// instructions without a portable spelling. All other source in this folder is the same for both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if defined(SPO_CUDA_EMULATOR)
#include "cuda_emulator.h"
#else
#include <cuda_runtime.h>
#endif

#include "launch_config.h"

#define SPO_DEVICE __device__ __forceinline__

namespace spo::cuda {

// kernel<<<grid, block, 0, stream>>>(args...); returns the error of the launch.
template <class... Params, class... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), unsigned grid, unsigned block, cudaStream_t stream,
                          const Args&... args) {
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

// launch_kernel in clusters of config.blocks blocks.
template <class... Params, class... Args>
cudaError_t launch_cluster_kernel(void (*kernel)(Params...), unsigned clusters, const ClusterConfig& config,
                                  cudaStream_t stream, const Args&... args) {
  const auto blocks = static_cast<unsigned>(config.blocks), threads = static_cast<unsigned>(config.threads);
#if defined(SPO_CUDA_EMULATOR)
  (void)stream;
  emulator::launch_clusters(kernel, clusters, blocks, threads, config.shared_bytes, args...);
  return cudaSuccess;
#else
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = clusters * blocks;
  launch.blockDim = threads;
  launch.dynamicSmemBytes = static_cast<std::size_t>(config.shared_bytes);
  launch.stream = stream;
  launch.attrs = &size;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kernel, static_cast<Params>(args)...);
#endif
}

// What the device offers to clusters: nothing before sm_90. sm_12x has clusters, but too little shared memory for rows.
inline cudaError_t shared_memory(int device, SharedMemory& memory) {
#if defined(SPO_CUDA_EMULATOR)
  (void)device;
  memory = emulator::capability == 90 ? SharedMemory{232448} : SharedMemory{};  // an H100's
  return cudaSuccess;
#else
  memory = {};
  int major = 0, block = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess && (major == 9 || major == 10)) memory = {block};
  return error;
#endif
}

// Lets a kernel use all shared memory of the current device. resident: how many of its clusters run at once, 0 if the
// kernel was not compiled for a device with clusters.
template <class... Params>
cudaError_t prepare_clusters(void (*kernel)(Params...), const ClusterConfig& config, const SharedMemory& memory,
                             int& resident) {
#if defined(SPO_CUDA_EMULATOR)
  (void)kernel, (void)config, (void)memory;
  resident = 3;
  return cudaSuccess;
#else
  resident = 0;
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess || attributes.ptxVersion < 90) return error;  // compiled from compute_80's PTX
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory.block));
  if (error == cudaSuccess)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {static_cast<unsigned>(config.blocks), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(config.blocks);
  launch.blockDim = static_cast<unsigned>(config.threads);
  launch.dynamicSmemBytes = static_cast<std::size_t>(config.shared_bytes);
  launch.attrs = &size;
  launch.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&resident, kernel, &launch);
#endif
}

// 2^x in one instruction: its error is at most 2 ulp, and subnormal results become 0. The emulator's result is off by
// up to 1 ulp unless x is whole. (With 2 ulp all float32 tests stay within their error budgets, too.)
SPO_DEVICE float exp2_approx(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#elif defined(SPO_CUDA_EMULATOR)
  const float exact = exp2f(x), y = x == floorf(x) ? exact : emulator::off_by(exact, 1);
  return y < 1.17549435e-38f ? 0.f : y;  // NaN stays
#else
  return x;  // nvcc compiles this for the host, where nothing calls it
#endif
}

// The larger one; NaN if either is NaN.
SPO_DEVICE float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}

// sm_100 and later have two float operations in one instruction, which halves the issue slots.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define SPO_PACKED_FLOAT 1
#else
#define SPO_PACKED_FLOAT 0
#endif

// Where memory outruns the special function unit, a polynomial computes some of the exponentials. This is so on the
// devices with packed operations, which make a polynomial cheap. The tests build the emulator with it and without it.
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

// Whether this architecture compiles code with clusters. shared_memory() says which devices run it.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1100)
#define SPO_CLUSTERS 0
#else
#define SPO_CLUSTERS 1
#endif
#if defined(__CUDA_ARCH__) && SPO_CLUSTERS
#define SPO_CLUSTER_PTX 1
#else
#define SPO_CLUSTER_PTX 0
#endif

// The block's dynamic shared memory.
SPO_DEVICE char* dynamic_shared() {
#if defined(SPO_CUDA_EMULATOR)
  return emulator::dynamic_shared();
#else
  extern __shared__ __align__(128) char spo_dynamic_shared[];
  return spo_dynamic_shared;
#endif
}

#if SPO_CLUSTER_PTX
SPO_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
// The address in block `block` of the cluster that corresponds to `own` in this block.
SPO_DEVICE std::uint32_t address_in_block(const void* own, std::uint32_t block) {
  std::uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(own)), "r"(block));
  return there;
}
#endif

// A barrier in shared memory. Its phase ends when one thread has called mbarrier_expect and all bytes that this call
// announced have arrived. Bytes may arrive before they are announced.
SPO_DEVICE void mbarrier_init(std::uint64_t* barrier) {
#if SPO_CLUSTER_PTX
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
#elif defined(SPO_CUDA_EMULATOR)
  emulator::mbarrier_init(barrier);
#endif
}

// Makes the thread's new barriers visible to the copies that it starts next.
SPO_DEVICE void mbarrier_init_fence() {
#if SPO_CLUSTER_PTX
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Arrives at the barrier, and announces bytes for it to wait for.
SPO_DEVICE void mbarrier_expect(std::uint64_t* barrier, std::uint32_t bytes) {
#if SPO_CLUSTER_PTX
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#elif defined(SPO_CUDA_EMULATOR)
  emulator::mbarrier_expect(barrier, bytes);
#endif
}

// Waits until the barrier's phase of this parity has ended. The first phase has parity 0, the second 1, the third 0.
// from_cluster: the bytes come from other blocks of the cluster.
template <bool from_cluster = false>
SPO_DEVICE void mbarrier_wait(std::uint64_t* barrier, std::uint32_t parity) {
#if SPO_CLUSTER_PTX
  std::uint32_t done;
  do {
    if constexpr (from_cluster)
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
    else
      asm volatile(
          "{\n.reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n}"
          : "=r"(done)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
  } while (!done);
#elif defined(SPO_CUDA_EMULATOR)
  emulator::mbarrier_wait(barrier, parity);
#endif
}

// Starts a copy to the block's shared memory. Both addresses and the size are multiples of 16 bytes. A thread may read
// the bytes after a wait for the barrier.
SPO_DEVICE void copy_bulk(void* shared, const void* global, std::uint32_t bytes, std::uint64_t* barrier) {
#if SPO_CLUSTER_PTX
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#elif defined(SPO_CUDA_EMULATOR)
  emulator::copy_bulk(shared, global, bytes, barrier);
#endif
}

// Waits for all threads of the cluster and for their stores. It is slow, because it waits for stores in global memory
// too.
SPO_DEVICE void cluster_sync() {
#if SPO_CLUSTER_PTX
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#elif defined(SPO_CUDA_EMULATOR)
  emulator::cluster_sync();
#endif
}

// Stores values in the shared memory of a block of the cluster, at the place that `own` has in the calling block. That
// block may read them after a wait for its barrier, which counts their bytes.
SPO_DEVICE void store_async(float4* own, std::uint32_t block, const float4& x, std::uint64_t* barrier) {
#if SPO_CLUSTER_PTX
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in_block(own, block)),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(address_in_block(barrier, block))
               : "memory");
#elif defined(SPO_CUDA_EMULATOR)
  emulator::store_async(own, block, x, barrier);
#endif
}
SPO_DEVICE void store_async(float* own, std::uint32_t block, float x, std::uint64_t* barrier) {
#if SPO_CLUSTER_PTX
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(address_in_block(own, block)),
      "f"(x), "r"(address_in_block(barrier, block))
      : "memory");
#elif defined(SPO_CUDA_EMULATOR)
  emulator::store_async(own, block, x, barrier);
#endif
}

}  // namespace spo::cuda
