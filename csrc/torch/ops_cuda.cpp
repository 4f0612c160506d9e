// The ops on CUDA tensors: checks, outputs, streams. spo_kernels/backends/cuda.py has the schemas, csrc/cuda the
// kernels. This file uses torch's stable ABI alone. Nothing here waits for the device.
//
// With SPO_CUDA_EMULATOR the same ops run on CPU tensors, in a namespace of their own, for tests.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../cuda/row_ops.h"
#include "tensor_args.h"

// torch's stable ABI gives the current stream from 2.13 on. Before that, a shim function of CUDA builds gives it.
// Headers before 2.13 do not define TORCH_VERSION_2_13_0. #if takes an undefined name as 0, so `defined` comes first.
#if !defined(TORCH_VERSION_2_13_0) || TORCH_FEATURE_VERSION < TORCH_VERSION_2_13_0
#define SPO_STREAM_FROM_SHIM
#endif

#if !defined(SPO_CUDA_EMULATOR) && defined(SPO_STREAM_FROM_SHIM)
// Every CUDA build of torch has this function, and no other build has it. It is weak, so that the library also loads
// into a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace spo {
namespace {

// Makes a tensor's device current. context holds the device's current stream and its number of multiprocessors.
class OnDevice {
#if defined(SPO_CUDA_EMULATOR)
 public:
  cuda::LaunchContext context{.stream = nullptr, .multiprocessors = 16};
  explicit OnDevice(const Tensor&) {}
#else
  torch::stable::accelerator::DeviceGuard guard_;

 public:
  cuda::LaunchContext context{};
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    const int32_t device = t.get_device_index();
#if defined(SPO_STREAM_FROM_SHIM)
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "spo_kernels: this torch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
#else
    void* stream = torch::stable::accelerator::getCurrentStream(device).nativeHandle();
#endif
    context.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaDeviceGetAttribute(&context.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    STD_TORCH_CHECK(error == cudaSuccess, "spo_kernels: ", cudaGetErrorString(error));
  }
#endif
};

void check(cudaError_t error, const char* op) {
#if defined(SPO_CUDA_EMULATOR)
  STD_TORCH_CHECK(error == cudaSuccess, "spo_kernels: ", op, " failed with CUDA error ", static_cast<int>(error));
#else
  STD_TORCH_CHECK(error == cudaSuccess, "spo_kernels: ", op, " failed: ", cudaGetErrorString(error));
#endif
}

// spo_kernels/backends/mixtures.py makes the other divergences of several ops.
void check_is_kl(double mixture) { STD_TORCH_CHECK(mixture == 0, "mixture must be 0 for this op, got ", mixture); }

// Whether kl_loss_fwd would leave most of the GPU idle on rows like these, while token_stats_fwd would split them.
bool kl_loss_splits_rows(const Tensor& logits, const Tensor& ref_logits, bool deterministic,
                         const std::optional<int64_t>& vocab_size, const OptionalTensor& transform,
                         const OptionalTensor& ref_transform, double mixture) {
  const OnDevice device(logits);
  const KlLossFwdCall call(logits, logits, ref_logits, std::nullopt, {vocab_size, transform, ref_transform, mixture});
  if (cuda::kl_loss_in_clusters(call.args)) return false;
  return cuda::workspace_bytes(call.args.z, true, call.args.N, call.args.V, device.context.multiprocessors,
                               deterministic) > 0;
}

std::tuple<Tensor, Tensor, Tensor> token_stats_fwd(const Tensor& logits, const OptionalTensor& labels,
                                                   const OptionalTensor& ref_logits, const OptionalTensor& mask,
                                                   int64_t ignore_index, bool deterministic,
                                                   const std::optional<int64_t>& vocab_size,
                                                   const OptionalTensor& transform, const OptionalTensor& ref_transform,
                                                   double mixture) {
  check_is_kl(mixture);
  OnDevice device(logits);
  TokenStatsFwdCall call(logits, labels, ref_logits, mask, ignore_index,
                         {vocab_size, transform, ref_transform, mixture});
  device.context.deterministic = deterministic;
  const int64_t bytes = cuda::workspace_bytes(call.args.z, call.args.r.data != nullptr, call.N, call.V,
                                              device.context.multiprocessors, deterministic);
  Tensor workspace = empty(logits, {bytes}, ScalarType::Byte);
  device.context.workspace = workspace.mutable_data_ptr();
  check(cuda::launch_token_stats_fwd(call.args, device.context), "token_stats_fwd");
  return {call.logps, call.kl, call.stats};
}

void token_stats_bwd(const Tensor& dlogits, const OptionalTensor& dlogps, const OptionalTensor& dkl,
                     const OptionalTensor& dlse, const Tensor& logits, const OptionalTensor& labels,
                     const OptionalTensor& ref_logits, const OptionalTensor& mask, const Tensor& kl,
                     const Tensor& stats, int64_t ignore_index, const std::optional<int64_t>& vocab_size,
                     const OptionalTensor& transform, const OptionalTensor& ref_transform, double mixture) {
  const OnDevice device(logits);
  const TokenStatsBwdCall call(dlogits, dlogps, dkl, dlse, logits, labels, ref_logits, mask, kl, stats, ignore_index,
                               {vocab_size, transform, ref_transform, mixture});
  check(cuda::launch_token_stats_bwd(call.args, device.context), "token_stats_bwd");
}

Tensor mixture_kl(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask, const Tensor& stats,
                  const std::optional<int64_t>& vocab_size, const OptionalTensor& transform,
                  const OptionalTensor& ref_transform, double mixture) {
  const OnDevice device(logits);
  const MixtureKlCall call(logits, ref_logits, mask, stats, {vocab_size, transform, ref_transform, mixture});
  check(cuda::launch_mixture_kl(call.args, device.context), "mixture_kl");
  return call.kls;
}

Tensor kl_loss_fwd(const Tensor& dlogits, const Tensor& logits, const Tensor& ref_logits,
                   const OptionalTensor& row_weight, const std::optional<int64_t>& vocab_size,
                   const OptionalTensor& transform, const OptionalTensor& ref_transform, double mixture) {
  check_is_kl(mixture);
  const OnDevice device(logits);
  KlLossFwdCall call(dlogits, logits, ref_logits, row_weight, {vocab_size, transform, ref_transform, mixture});
  Tensor weighted_kl = empty(logits, {call.args.N}, ScalarType::Double);
  call.args.weighted_kl = static_cast<double*>(weighted_kl.mutable_data_ptr());
  Tensor loss = empty(logits, {}, call.acc);
  check(cuda::launch_kl_loss_fwd(call.args, loss.mutable_data_ptr(), device.context), "kl_loss_fwd");
  return loss;
}

void scale_(const Tensor& tensor, const Tensor& scale) {
  const OnDevice device(tensor);
  const Rows rows = scale_rows(tensor, scale);
  check(cuda::launch_scale(rows, row_count(tensor), tensor.size(-1), scale.const_data_ptr(), device.context), "scale_");
}

}  // namespace
}  // namespace spo

#if defined(SPO_CUDA_EMULATOR)
STABLE_TORCH_LIBRARY_IMPL(spo_kernels_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(spo_kernels_cuda, CUDA, m) {
#endif
  m.impl("kl_loss_splits_rows", TORCH_BOX(&spo::kl_loss_splits_rows));
  m.impl("token_stats_fwd", TORCH_BOX(&spo::token_stats_fwd));
  m.impl("token_stats_bwd", TORCH_BOX(&spo::token_stats_bwd));
  m.impl("mixture_kl", TORCH_BOX(&spo::mixture_kl));
  m.impl("kl_loss_fwd", TORCH_BOX(&spo::kl_loss_fwd));
  m.impl("scale_", TORCH_BOX(&spo::scale_));
}
