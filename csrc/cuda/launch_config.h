// How many threads and blocks take how much of the rows. Plain arithmetic, apart from the kernels so that tests can
// try every shape without a GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace spo::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;                     // of every block
constexpr std::int64_t kMaxGrid = 0x7fffffff;     // blocks along x
constexpr std::int64_t kWarpRow = 2048;           // elements: a row up to this long is one warp's, eight to a block
constexpr std::int64_t kSplitElements = 1 << 13;  // a block's least share of a row that is split
constexpr int kMaxSplits = 64;

// A reduction over rows.
struct ReduceConfig {
  int threads_per_row;          // kWarp or kThreads
  int splits;                   // blocks a row: 1 unless rows are too few to fill the GPU
  std::int64_t split_elements;  // elements of all splits but the last; a multiple of 16 unless splits is 1
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
  splits = (V + elements - 1) / elements;  // rounding up may leave the last one nothing
  return {kThreads, static_cast<int>(splits), elements, N * splits};
}

// Blocks of a launch whose blocks take one part of the work after another: no more than the GPU holds at a time.
inline std::int64_t resident_blocks(std::int64_t blocks, int multiprocessors) {
  constexpr std::int64_t kEach = 2048 / kThreads;  // 2048 threads a multiprocessor
  return std::min(blocks, kEach * std::max(multiprocessors, 1));
}

// An elementwise kernel over rows: threads_per_row threads take block_elements of one row.
struct ElementwiseConfig {
  int threads_per_row;
  unsigned parts;  // of a row
  std::int64_t part_elements;
  std::int64_t blocks;
};

// per_thread: elements that a thread of a block takes, whole chunks.
inline ElementwiseConfig elementwise_config(std::int64_t N, std::int64_t V, int per_thread) {
  if (V <= kWarpRow) {
    constexpr int kRows = kThreads / kWarp;
    return {kWarp, 1, V, (N + kRows - 1) / kRows};
  }
  const std::int64_t elements = std::int64_t{kThreads} * per_thread, parts = (V + elements - 1) / elements;
  return {kThreads, static_cast<unsigned>(parts), elements, N * parts};
}

}  // namespace spo::cuda
