// How many threads and blocks take how much of the rows. Plain arithmetic, so that tests try every shape without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace spo::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;                  // of every block, except in clusters
constexpr std::int64_t kMaxGrid = 0x7fffffff;  // blocks along x
constexpr std::int64_t kWarpRow = 2048;  // a row of at most so many elements belongs to one warp; a block has eight
constexpr std::int64_t kSplitElements = 1 << 13;  // a split has at least so many elements
constexpr int kMaxSplits = 64;

// A reduction over rows.
struct ReduceConfig {
  int threads_per_row;          // kWarp or kThreads
  unsigned splits;              // blocks for a row: 1 unless rows are too few to fill the GPU
  std::int64_t split_elements;  // elements of each split but the last; a multiple of 16 unless splits is 1
  std::int64_t blocks;
};

// deterministic: a row's result must not depend on the number of rows, so it is never split.
inline ReduceConfig reduce_config(std::int64_t N, std::int64_t V, int multiprocessors, bool deterministic) {
  if (V <= kWarpRow) {
    constexpr int kRows = kThreads / kWarp;
    return {kWarp, 1, V, (N + kRows - 1) / kRows};
  }
  const std::int64_t wanted = 4 * static_cast<std::int64_t>(multiprocessors);  // blocks that keep the memory busy
  std::int64_t splits = 1;
  if (!deterministic && N > 0 && 2 * N <= wanted)
    splits = std::min<std::int64_t>({wanted / N, V / kSplitElements, kMaxSplits});
  if (splits <= 1) return {kThreads, 1, V, N};
  const std::int64_t share = (V + splits - 1) / splits, elements = (share + 15) / 16 * 16;
  splits = (V + elements - 1) / elements;  // rounding up may have left the last one empty
  return {kThreads, static_cast<unsigned>(splits), elements, N * splits};
}

// Blocks of a launch in which each block takes one share of the work after another. They are few, so that a launch in
// which no block has work takes only microseconds. They are several times what the GPU holds, so that all
// multiprocessors end at about the same time.
inline std::int64_t looping_blocks(std::int64_t blocks, int multiprocessors) {
  constexpr std::int64_t kEach = 64;
  return std::min(blocks, kEach * std::max(multiprocessors, 1));
}

// An elementwise kernel over rows: threads_per_row threads take split_elements of one row.
struct ElementwiseConfig {
  int threads_per_row;
  unsigned splits;  // of a row
  std::int64_t split_elements;
  std::int64_t blocks;
};

// per_thread: elements that a thread takes if a block takes the row, a multiple of a packet. Without `warps` a block
// takes short rows too.
inline ElementwiseConfig elementwise_config(std::int64_t N, std::int64_t V, int per_thread, bool warps = true) {
  if (warps && V <= kWarpRow) {
    constexpr int kRows = kThreads / kWarp;
    return {kWarp, 1, V, (N + kRows - 1) / kRows};
  }
  const std::int64_t elements = std::int64_t{kThreads} * per_thread, splits = (V + elements - 1) / elements;
  return {kThreads, static_cast<unsigned>(splits), elements, N * splits};
}

// Bytes of shared memory that a device offers to a block of a cluster. 0: no kernel uses clusters on this device.
struct SharedMemory {
  std::int64_t block;
};

// A launch that holds a row of two tensors in the shared memory of a cluster.
struct ClusterConfig {
  int blocks;        // of a cluster; 0 if the kernel does not suit the row
  int threads;       // of a block: 256 or 512
  int vectors;       // 16-byte vectors of each tensor in a block; the last blocks of a row may hold fewer
  int shared_bytes;  // of a block
  int rounds = 1;    // the grid has this many times the clusters that the device holds at once
};

constexpr int kMaxCluster = 8;                      // blocks; every device with clusters allows so many
constexpr int kPieceVectors = 128;                  // a warp copies and computes a block's share in pieces of this size
constexpr std::int64_t kClusterRowBytes = 1 << 14;  // of one tensor; a shorter row leaves a block too little work
constexpr std::int64_t kWideSharedBytes = 1 << 16;  // of a block's shared memory; from here on it has 512 threads
constexpr int kSumBytes = 20;                       // of the partial sums of a thread, warp or block

// Shared memory of a block: its share of both tensors, a barrier for each piece, two barriers for the blocks' sums, and
// the sums: one for each warp, two for each block of the largest cluster.
constexpr int cluster_shared_bytes(int vectors, int threads) {
  const int pieces = (vectors + kPieceVectors - 1) / kPieceVectors;
  return 32 * vectors + 8 * (pieces + 2) + kSumBytes * (threads / kWarp + 2 * kMaxCluster);
}

// A row of V elements, which fill a whole number of vectors, in a cluster of `blocks` blocks. Tests and benchmarks may
// try sizes that cluster_config() does not choose.
inline ClusterConfig cluster_of(std::int64_t V, int element_bytes, int blocks, int threads) {
  const std::int64_t share = (V * element_bytes / 16 + blocks - 1) / blocks;
  const std::int64_t vectors = (share + 7) / 8 * 8;  // whole lines of the cache
  if (vectors > (1 << 20)) return {};
  return {blocks, threads, static_cast<int>(vectors), cluster_shared_bytes(static_cast<int>(vectors), threads)};
}

// The choice depends on the row's length and the device alone, so that a row's result does not depend on the number of
// rows. On an H100 the fewest blocks that hold the row are best: once a row, all blocks of a cluster wait for the
// slowest. Clusters of five to seven blocks leave some multiprocessors idle.
inline ClusterConfig cluster_config(std::int64_t V, int element_bytes, const SharedMemory& memory) {
  if (memory.block == 0 || V * element_bytes % 16 != 0 || V * element_bytes < kClusterRowBytes) return {};
  for (const int blocks : {1, 2, 3, 4, kMaxCluster}) {
    ClusterConfig config = cluster_of(V, element_bytes, blocks, 512);
    if (config.blocks == 0 || config.shared_bytes > memory.block) continue;
    return config.shared_bytes < kWideSharedBytes ? cluster_of(V, element_bytes, blocks, 256) : config;
  }
  return {};
}

}  // namespace spo::cuda
