#include "row_ops.h"
#include "row_ops_impl.cuh"

namespace spo::cuda {

extern template struct TypedOps<float>;
extern template struct TypedOps<bf16>;
extern template struct TypedOps<f16>;
extern template struct TypedOps<double>;

namespace {

// f.template operator()<TypedOps<T>>() for logits of this type.
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

cudaError_t token_stats_fwd(const TokenStatsFwd& args, const Launch& launch) {
  if (args.N == 0) return cudaSuccess;
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::token_stats_fwd(args, launch); });
}

cudaError_t token_stats_bwd(const TokenStatsBwd& args, const Launch& launch) {
  if (args.N == 0) return cudaSuccess;
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::token_stats_bwd(args, launch); });
}

bool kl_loss_in_clusters(const KlLossFwd& args) {
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::kl_loss_in_clusters(args); });
}

cudaError_t kl_loss_fwd(const KlLossFwd& args, void* loss, const Launch& launch) {
  return with_type(args.z.dtype, [&]<class Ops>() { return Ops::kl_loss_fwd(args, loss, launch); });
}

cudaError_t scale(const Rows& rows, std::int64_t N, std::int64_t V, const void* factor, const Launch& launch) {
  if (N == 0) return cudaSuccess;
  return with_type(rows.dtype, [&]<class Ops>() { return Ops::scale(rows, N, V, factor, launch); });
}

}  // namespace spo::cuda
