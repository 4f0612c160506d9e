// Launches for policy logits of one type T. Each type has a source file that instantiates TypedOps, so that the types
// compile in parallel.
#pragma once

#include "kl_loss_cluster.cuh"
#include "row_kernels.cuh"
#include "row_ops.h"

namespace spo::cuda {

template <class T>
struct TypedOps {
  static std::int64_t workspace_bytes(bool with_kl, std::int64_t N, std::int64_t V, int multiprocessors,
                                      bool deterministic);
  static cudaError_t launch_token_stats_fwd(const TokenStatsFwdArgs& a, const LaunchContext& context);
  static cudaError_t launch_token_stats_bwd(const TokenStatsBwdArgs& a, const LaunchContext& context);
  static cudaError_t launch_mixture_kl(const MixtureKlArgs& a, const LaunchContext& context);
  static bool kl_loss_in_clusters(const KlLossFwdArgs& a);
  static cudaError_t launch_kl_loss_fwd(const KlLossFwdArgs& a, void* loss, const LaunchContext& context);
  static cudaError_t launch_scale(const Rows& rows, std::int64_t N, std::int64_t V, const void* scale,
                                  const LaunchContext& context);
};

// Calls f.template operator()<R>(), where R is T for a reference of the policy's type and AnyType for another. A
// reference of double logits is double.
template <class T, class F>
cudaError_t with_ref_type(DType r, F f) {
  constexpr DType own = std::is_same_v<T, double> ? DType::f64
                        : std::is_same_v<T, bf16> ? DType::bf16
                        : std::is_same_v<T, f16>  ? DType::f16
                                                  : DType::f32;
  if constexpr (std::is_same_v<T, double>) {
    return f.template operator()<double>();
  } else {
    return r == own ? f.template operator()<T>() : f.template operator()<AnyType>();
  }
}

// Calls f.template operator()<T, R>() with the types of the logits, Transformed if one of them has a transform. A
// transformed reference has AnyType even where its type is the policy's: that halves the kernels with transforms.
template <class T, class F>
cudaError_t with_types(DType r, const Transform& of_z, const Transform& of_r, F f) {
  if (of_z.a || of_r.a) {
    using Ref = std::conditional_t<std::is_same_v<T, double>, double, AnyType>;
    return f.template operator()<Transformed<T>, Transformed<Ref>>();
  }
  return with_ref_type<T>(r, [&]<class R>() { return f.template operator()<T, R>(); });
}

// with_types for the kernels of divergences other than the KL. Only logits of one type without a transform have a
// kernel of their own: fewer kernels compile in less time.
template <class T, class F>
cudaError_t with_few_types(DType r, const Transform& of_z, const Transform& of_r, F f) {
  using Ref = std::conditional_t<std::is_same_v<T, double>, double, AnyType>;
  if (of_z.a || of_r.a) return f.template operator()<Transformed<T>, Transformed<Ref>>();
  return with_ref_type<T>(r, [&]<class R>() {
    if constexpr (std::is_same_v<R, T>)
      return f.template operator()<T, T>();
    else
      return f.template operator()<Transformed<T>, Transformed<R>>();
  });
}

// Calls f.template operator()<T>() with the type of the policy's logits.
template <class T, class F>
cudaError_t with_policy_type(const Transform& of_z, F f) {
  return of_z.a ? f.template operator()<Transformed<T>>() : f.template operator()<T>();
}

// Calls f.template operator()<threads>() with the threads of a row as a constant.
template <class F>
cudaError_t with_threads(int threads_per_row, F f) {
  return threads_per_row == kWarp ? f.template operator()<kWarp>() : f.template operator()<kThreads>();
}

inline cudaError_t grid_of(std::int64_t blocks, unsigned& grid) {
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  grid = static_cast<unsigned>(blocks);
  return cudaSuccess;
}

inline std::int64_t blocks_of_threads(std::int64_t n) { return (n + kThreads - 1) / kThreads; }

template <class T>
std::int64_t TypedOps<T>::workspace_bytes(bool with_kl, std::int64_t N, std::int64_t V, int multiprocessors,
                                          bool deterministic) {
  const ReduceConfig config = reduce_config(N, V, multiprocessors, deterministic);
  if (config.splits == 1) return 0;
  return N * config.splits * static_cast<std::int64_t>(with_kl ? sizeof(KlSum<Acc<T>>) : sizeof(ExpSum<Acc<T>>));
}

template <class T>
cudaError_t TypedOps<T>::launch_token_stats_fwd(const TokenStatsFwdArgs& a, const LaunchContext& context) {
  const ReduceConfig config = reduce_config(a.N, a.V, context.multiprocessors, context.deterministic);
  unsigned grid;
  if (const cudaError_t error = grid_of(config.blocks, grid)) return error;
  const auto run = [&]<class Z, class R, bool with_kl>() {
    const cudaError_t error = with_threads(config.threads_per_row, [&]<int threads>() {
      return launch_kernel(token_stats_fwd_kernel<Z, R, with_kl, threads>, grid, kThreads, context.stream, a,
                           config.splits, config.split_elements, context.workspace);
    });
    if (error != cudaSuccess || config.splits == 1) return error;
    return launch_kernel(merge_splits_kernel<Z, with_kl>, static_cast<unsigned>(blocks_of_threads(a.N)), kThreads,
                         context.stream, a, config.splits, static_cast<const void*>(context.workspace));
  };
  if (!a.r.data) return with_policy_type<T>(a.of_z, [&]<class Z>() { return run.template operator()<Z, Z, false>(); });
  return with_types<T>(a.r.dtype, a.of_z, a.of_r,
                       [&]<class Z, class R>() { return run.template operator()<Z, R, true>(); });
}

template <class T>
cudaError_t TypedOps<T>::launch_token_stats_bwd(const TokenStatsBwdArgs& a, const LaunchContext& context) {
  const auto run = [&]<class Z, class R, int term>() {
    const ElementwiseConfig config = elementwise_config(a.N, a.V, kBatch<term != kNoReference, R> * kPacket<T>);
    unsigned grid;
    if (const cudaError_t error = grid_of(config.blocks, grid)) return error;
    return with_threads(config.threads_per_row, [&]<int threads>() {
      return launch_kernel(token_stats_bwd_kernel<Z, R, term, threads>, grid, kThreads, context.stream, a,
                           config.splits, config.split_elements);
    });
  };
  if (!a.r.data || !a.dkl)
    return with_policy_type<T>(a.of_z, [&]<class Z>() { return run.template operator()<Z, Z, kNoReference>(); });
  if (a.mixture == 0)
    return with_types<T>(a.r.dtype, a.of_z, a.of_r,
                         [&]<class Z, class R>() { return run.template operator()<Z, R, kOfKl>(); });
  return with_few_types<T>(a.r.dtype, a.of_z, a.of_r, [&]<class Z, class R>() {
    const ElementwiseConfig config = elementwise_config(a.N, a.V, kPacket<T>, false);
    unsigned grid;
    if (const cudaError_t error = grid_of(config.blocks, grid)) return error;
    return launch_kernel(token_stats_bwd_kernel<Z, R, kOfMixture, kThreads>, grid, kThreads, context.stream, a,
                         config.splits, config.split_elements);
  });
}

template <class T>
cudaError_t TypedOps<T>::launch_mixture_kl(const MixtureKlArgs& a, const LaunchContext& context) {
  unsigned grid;
  if (const cudaError_t error = grid_of(a.N, grid)) return error;
  return with_few_types<T>(a.r.dtype, a.of_z, a.of_r, [&]<class Z, class R>() {
    return launch_kernel(mixture_kl_kernel<Z, R>, grid, kThreads, context.stream, a);
  });
}

template <class T>
bool TypedOps<T>::kl_loss_in_clusters(const KlLossFwdArgs& a) {
  if constexpr (std::is_same_v<T, double>) {
    return false;
  } else {
    SharedMemory memory;
    return shared_memory_of_device(memory) == cudaSuccess && cluster_config_of(a, sizeof(T), memory).blocks > 0;
  }
}

template <class T>
cudaError_t TypedOps<T>::launch_kl_loss_fwd(const KlLossFwdArgs& a, void* loss, const LaunchContext& context) {
  const ReduceConfig config = reduce_config(a.N, a.V, context.multiprocessors, true);
  unsigned grid;
  if (const cudaError_t error = grid_of(config.blocks, grid)) return error;
  bool launched = a.N == 0;
  if constexpr (!std::is_same_v<T, double>) {
    if (!launched)
      if (const cudaError_t error = launch_kl_loss_cluster<T>(a, context.stream, launched)) return error;
  }
  if (!launched) {
    const cudaError_t error = with_types<T>(a.r.dtype, a.of_z, a.of_r, [&]<class Z, class R>() {
      return with_threads(config.threads_per_row, [&]<int threads>() {
        return launch_kernel(kl_loss_fwd_kernel<Z, R, threads>, grid, kThreads, context.stream, a);
      });
    });
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(sum_kernel<Acc<T>>, 1, kThreads, context.stream, static_cast<const double*>(a.weighted_kl), a.N,
                       static_cast<Acc<T>*>(loss));
}

template <class T>
cudaError_t TypedOps<T>::launch_scale(const Rows& rows, std::int64_t N, std::int64_t V, const void* scale,
                                      const LaunchContext& context) {
  const ElementwiseConfig config = elementwise_config(N, V, kBatch<false, T> * kPacket<T>);
  unsigned grid;
  if (const cudaError_t error = grid_of(looping_blocks(config.blocks, context.multiprocessors), grid)) return error;
  return with_threads(config.threads_per_row, [&]<int threads>() {
    return launch_kernel(scale_kernel<T, threads>, grid, kThreads, context.stream, rows, N, V,
                         static_cast<const Acc<T>*>(scale), config.splits, config.split_elements);
  });
}

}  // namespace spo::cuda
