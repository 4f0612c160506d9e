// The ops on a GPU: launches on a stream, without waiting for them. Free of torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../op_args.h"

namespace spo::cuda {

// How many bytes of scratch memory token_stats_fwd needs: for the partial sums of rows that are split. Rows are not
// split where `deterministic` asks for results that do not depend on the number of rows.
std::int64_t workspace_bytes(const Rows& z, bool with_kl, std::int64_t N, std::int64_t V, int multiprocessors,
                             bool deterministic);

struct Launch {
  cudaStream_t stream;
  int multiprocessors;
  bool deterministic = true;
  void* workspace = nullptr;  // may be null where 0 bytes are needed
};

cudaError_t token_stats_fwd(const TokenStatsFwd& args, const Launch& launch);
cudaError_t token_stats_bwd(const TokenStatsBwd& args, const Launch& launch);
// Whether kl_loss_fwd holds rows like these in the shared memory of clusters: it then needs no second launch for them,
// few or many. dz counts as any other rows.
bool kl_loss_in_clusters(const KlLossFwd& args);
// loss (acc, one element) = the sum of weighted_kl. Results of a row never depend on the number of rows.
cudaError_t kl_loss_fwd(const KlLossFwd& args, void* loss, const Launch& launch);
// rows [N, V] *= *factor (acc); nothing is written where the factor is 1.
cudaError_t scale(const Rows& rows, std::int64_t N, std::int64_t V, const void* factor, const Launch& launch);

}  // namespace spo::cuda
