// The ops on a GPU: launches on a stream, without waiting for them. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../op_args.h"

namespace spo::cuda {

// How many bytes of scratch memory token_stats_fwd needs: for the partial sums of rows that are split. Rows are not
// split where `deterministic` asks for results that do not depend on the number of rows.
std::int64_t workspace_bytes(const Rows& z, bool with_kl, std::int64_t N, std::int64_t V, int multiprocessors,
                             bool deterministic);

struct LaunchContext {
  cudaStream_t stream;
  int multiprocessors;
  bool deterministic = true;
  void* workspace = nullptr;  // may be null where 0 bytes are needed
};

cudaError_t launch_token_stats_fwd(const TokenStatsFwdArgs& args, const LaunchContext& context);
cudaError_t launch_token_stats_bwd(const TokenStatsBwdArgs& args, const LaunchContext& context);
// Whether kl_loss_fwd holds rows like these in the shared memory of clusters: it then needs no second launch for them,
// few or many. dz counts as any other rows.
bool kl_loss_in_clusters(const KlLossFwdArgs& args);
// loss (acc, one element) = the sum of weighted_kl. Results of a row never depend on the number of rows.
cudaError_t launch_kl_loss_fwd(const KlLossFwdArgs& args, void* loss, const LaunchContext& context);
// rows [N, V] *= *scale (acc); nothing is written where scale is 1.
cudaError_t launch_scale(const Rows& rows, std::int64_t N, std::int64_t V, const void* scale,
                         const LaunchContext& context);

}  // namespace spo::cuda
