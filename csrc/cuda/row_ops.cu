#include "row_ops.h"
#include "row_ops_impl.cuh"

namespace spo::cuda {

extern template struct TypedOps<float>;
extern template struct TypedOps<bf16>;
extern template struct TypedOps<f16>;
extern template struct TypedOps<double>;

namespace {

// Calls f.template operator()<TypedOps<T>>() for logits of type z.
template <class F>
auto with_type(DType z, F f) {
  switch (z) {
    case DType::bf16: return f.template operator()<TypedOps<bf16>>();
    case DType::f16: return f.template operator()<TypedOps<f16>>();
    case DType::f64: return f.template operator()<TypedOps<double>>();
    default: return f.template operator()<TypedOps<float>>();
  }
}

}  // namespace

std::int64_t workspace_bytes(const Rows& z, bool with_kl, std::int64_t N, std::int64_t V, int multiprocessors,
                             bool deterministic) {
  return with_type(z.dtype,
                   [&]<class Ops>() { return Ops::workspace_bytes(with_kl, N, V, multiprocessors, deterministic); });
}

cudaError_t launch_token_stats_fwd(const TokenStatsFwdArgs& args, const LaunchContext& context) {
  if (args.N == 0) return cudaSuccess;
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::launch_token_stats_fwd(args, context); });
}

cudaError_t launch_token_stats_bwd(const TokenStatsBwdArgs& args, const LaunchContext& context) {
  if (args.N == 0) return cudaSuccess;
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::launch_token_stats_bwd(args, context); });
}

cudaError_t launch_mixture_kl(const MixtureKlArgs& args, const LaunchContext& context) {
  if (args.N == 0) return cudaSuccess;
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::launch_mixture_kl(args, context); });
}

bool kl_loss_in_clusters(const KlLossFwdArgs& args) {
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::kl_loss_in_clusters(args); });
}

cudaError_t launch_kl_loss_fwd(const KlLossFwdArgs& args, void* loss, const LaunchContext& context) {
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::launch_kl_loss_fwd(args, loss, context); });
}

cudaError_t launch_scale(const Rows& rows, std::int64_t N, std::int64_t V, const void* scale,
                         const LaunchContext& context) {
  if (N == 0) return cudaSuccess;
  return with_type(rows.dtype, [&]<class Ops>() { return Ops::launch_scale(rows, N, V, scale, context); });
}

}  // namespace spo::cuda
