// Launches of the ops on a stream, without waiting for their results. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../op_args.h"

namespace spo::cuda {

// Bytes of scratch memory that launch_token_stats_fwd needs for the sums of rows that are split. With `deterministic`,
// results do not depend on the number of rows: no row is split.
std::int64_t workspace_bytes(const Rows& z, bool with_kl, std::int64_t N, std::int64_t V, int multiprocessors,
                             bool deterministic);

struct LaunchContext {
  cudaStream_t stream;
  int multiprocessors;
  bool deterministic = true;
  void* workspace = nullptr;  // may be null if workspace_bytes() is 0
};

cudaError_t launch_token_stats_fwd(const TokenStatsFwdArgs& args, const LaunchContext& context);
cudaError_t launch_token_stats_bwd(const TokenStatsBwdArgs& args, const LaunchContext& context);
cudaError_t launch_mixture_kl(const MixtureKlArgs& args, const LaunchContext& context);
// Whether launch_kl_loss_fwd runs in clusters for z, r and dz laid out like these. Clusters keep the GPU busy even with
// few rows.
bool kl_loss_in_clusters(const KlLossFwdArgs& args);
// loss (acc, one element) = the sum of weighted_kl. A row's results never depend on the number of rows.
cudaError_t launch_kl_loss_fwd(const KlLossFwdArgs& args, void* loss, const LaunchContext& context);
// rows [N, V] *= *scale (acc); nothing is written where scale is 1.
cudaError_t launch_scale(const Rows& rows, std::int64_t N, std::int64_t V, const void* scale,
                         const LaunchContext& context);

}  // namespace spo::cuda
