// Checks that every launch in a large grid of shapes is legal and covers each element exactly once, and that clusters
// have the sizes that launch_config.h calls best. Prints "ok" and the number of launches.
#include "cuda/launch_config.h"

#include <cstdio>
#include <cstdlib>

using namespace spo::cuda;

namespace {

void require(bool holds, const char* what, std::int64_t N, std::int64_t V) {
  if (holds) return;
  std::printf("%s does not hold for N = %lld, V = %lld\n", what, static_cast<long long>(N), static_cast<long long>(V));
  std::exit(1);
}

// `splits` of `each` elements, of which the last may be shorter, cover the row exactly.
void require_partition(std::int64_t splits, std::int64_t each, std::int64_t N, std::int64_t V) {
  require(splits >= 1 && (splits - 1) * each < V && splits * each >= V, "a partition of the row", N, V);
}

void require_blocks(int threads_per_row, std::int64_t groups, std::int64_t blocks, std::int64_t N, std::int64_t V) {
  require(threads_per_row == kWarp || threads_per_row == kThreads, "one warp or one block a row", N, V);
  const std::int64_t in_block = kThreads / threads_per_row;
  require(blocks * in_block >= groups && (blocks - 1) * in_block < groups, "enough blocks and none idle", N, V);
}

constexpr SharedMemory kH100{232448}, kNone{0};  // bytes a block; a B200 has as many as an H100

void require_cluster(std::int64_t V, int element_bytes) {
  const ClusterConfig c = cluster_config(V, element_bytes, kH100);
  require(cluster_config(V, element_bytes, kNone).blocks == 0, "no clusters without shared memory for them", 0, V);
  if (c.blocks == 0) {
    const bool suits = V * element_bytes % 16 == 0 && V * element_bytes >= kClusterRowBytes;
    require(!suits || 2 * V * element_bytes > 8 * 229000, "a cluster for every long row that fits one", 0, V);
    return;
  }
  require(V * element_bytes % 16 == 0, "rows of whole vectors", 0, V);
  require(c.blocks <= kMaxCluster, "a size that every device takes", 0, V);
  require(c.threads == kThreads || c.threads == 2 * kThreads, "threads that are compiled", 0, V);
  require_partition(c.blocks, c.vectors, 0, V * element_bytes / 16);
  require(c.shared_bytes >= 32 * c.vectors && c.shared_bytes <= kH100.block, "a share that fits", 0, V);
  require(c.shared_bytes % 4 == 0, "aligned sums", 0, V);
}

void require_size(std::int64_t V, int element_bytes, int blocks, int threads) {
  const ClusterConfig c = cluster_config(V, element_bytes, kH100);
  require(c.blocks == blocks, "the cluster's size", blocks, V);
  require(c.threads == threads, "the threads", c.threads, V);
}

}  // namespace

int main() {
  long tried = 0;
  for (const int element_bytes : {2, 4})
    for (std::int64_t V = 1; V <= 1000000; V = V < 20 ? V + 1 : V % 16 ? V + 16 - V % 16 : V + V / 37 + 1)
      require_cluster(V, element_bytes);
  require_size(8192, 2, 1, 256);
  require_size(16384, 2, 1, 512);
  require_size(32000, 2, 1, 512);
  require_size(128256, 2, 3, 512);
  require_size(151936, 2, 3, 512);
  require_size(262144, 2, 8, 512);
  require_size(32000, 4, 2, 512);
  require_size(128256, 4, 8, 512);
  require(cluster_config(262144, 4, kH100).blocks == 0, "no cluster for more than it holds", 0, 262144);
  const std::int64_t rows[] = {1, 2, 3, 7, 8, 9, 31, 66, 131, 132, 133, 264, 1000, 4096, 65535, 65536, 70000, 1 << 20};
  for (const std::int64_t N : rows)
    for (std::int64_t V = 1; V <= 300000; V = V < 20 ? V + 1 : V + V / 7 + V % 3)
      for (const int multiprocessors : {1, 16, 108, 132, 148, 188})
        for (const bool deterministic : {false, true}) {
          const ReduceConfig r = reduce_config(N, V, multiprocessors, deterministic);
          require_partition(r.splits, r.split_elements, N, V);
          require_blocks(r.threads_per_row, N * r.splits, r.blocks, N, V);
          require(r.splits == 1 || r.split_elements % 16 == 0, "splits that start where vectors do", N, V);
          require(r.splits == 1 || (!deterministic && r.threads_per_row == kThreads), "only long rows split", N, V);
          require(r.splits == 1 || r.blocks <= 4 * multiprocessors + N, "no more blocks than wanted", N, V);
          require(!deterministic || r.split_elements == V, "a row's work independent of N", N, V);
          for (const int packet : {2, 4, 8}) {
            const ElementwiseConfig e = elementwise_config(N, V, 4 * packet);
            require_partition(e.splits, e.split_elements, N, V);
            require_blocks(e.threads_per_row, N * e.splits, e.blocks, N, V);
            require(e.splits == 1 || e.split_elements % packet == 0, "splits of whole packets", N, V);
            require(e.blocks <= kMaxGrid, "a legal grid", N, V);
            const std::int64_t looping = looping_blocks(e.blocks, multiprocessors);
            require(looping >= 1 && looping <= e.blocks && looping <= 64 * multiprocessors, "some blocks", N, V);
          }
          require(r.blocks <= kMaxGrid, "a legal grid", N, V);
          ++tried;
        }
  std::printf("ok %ld\n", tried);
}
