// kl_loss with the row in the shared memory of a cluster of blocks. This kernel reads policy and reference logits from
// memory once; kl_loss_fwd_kernel reads them twice if a row exceeds the cache. The cluster kernel needs a device with
// enough shared memory (sm_90, sm_10x), policy and reference of one type, neither transforms nor padding, and rows that
// begin at a multiple of 16 bytes and are a multiple of 16 bytes long, at least kClusterRowBytes and no more than a
// cluster holds. kl_loss_fwd_kernel takes all other rows.
//
// A cluster takes one row after another. Each block holds a share of the row, and each warp of the block takes every
// eighth (or sixteenth) piece of the share. A warp starts the copies of its pieces and waits for them. When it has
// written a piece's gradient, it starts the copy of the same piece of the next row, which keeps the memory busy. Blocks
// wait for each other once a row, to merge their sums.
//
// The row's length and the device alone decide which lane sums which elements (cluster_config), so a row's result does
// not depend on other rows or their number. A row that does not begin at a multiple of 16 bytes goes to
// kl_loss_fwd_kernel, so its result may differ in the last bits.
#pragma once

#include <algorithm>
#include <array>
#include <map>
#include <mutex>

#include "row_kernels.cuh"

namespace spo::cuda {

// Merges the sums of `count` neighbouring lanes; each lane gets the result. Each sum moves to the common tops once, so
// that the rest is additions.
template <int count, class A>
SPO_DEVICE KlSum<A> merge_lanes(KlSum<A> sum) {
  constexpr unsigned kAll = 0xffffffffu;
  A z_top = sum.z.top, r_top = sum.r.top;
#pragma unroll
  for (int lanes = count / 2; lanes > 0; lanes /= 2) {
    z_top = max_nan(z_top, __shfl_xor_sync(kAll, z_top, lanes));
    r_top = max_nan(r_top, __shfl_xor_sync(kAll, r_top, lanes));
  }
  sum.move(z_top, r_top);
#pragma unroll
  for (int lanes = count / 2; lanes > 0; lanes /= 2) {
    sum.z.sum += __shfl_xor_sync(kAll, sum.z.sum, lanes);
    sum.r.sum += __shfl_xor_sync(kAll, sum.r.sum, lanes);
    sum.gap += __shfl_xor_sync(kAll, sum.gap, lanes);
  }
  return sum;
}

SPO_DEVICE bool is_finite(float x) { return fabsf(x) <= -kLowest<float>; }

// Gradient's operator() without a label, for a gap that is finite even if p = 0.
SPO_DEVICE float kl_gradient(const Gradient<float>& grad, float z, float r) {
  const float zs = z - grad.policy.shift, p = probability(zs, grad.policy.logsum);
  return grad.g_kl * p * (((zs - (r - grad.ref.shift)) - grad.mean) + grad.rounding);
}

// row_of() for several tensors with the same T, with one division for all. Row numbers of a launch fit 32 bits.
struct Place {
  unsigned b, t;
  SPO_DEVICE Place(unsigned row, const Rows& rows)
      : b(row / static_cast<unsigned>(rows.T)), t(row - b * static_cast<unsigned>(rows.T)) {}
  template <class T>
  SPO_DEVICE T* in(const Rows& rows) const {
    return static_cast<T*>(rows.data) + b * rows.stride_b + t * rows.stride_t;
  }
};

// A block's shared memory: its share of a row, in pieces, and the sums that blocks exchange.
template <class T, int threads>
struct ClusterShare {
  static constexpr int E = kPacket<T>, kWarps = threads / kWarp;
  uint4 *z, *r;
  float4* block_sums;  // [2, kMaxCluster], without the gaps
  float* block_gaps;
  std::uint64_t *barriers, *sums_barriers;  // one for each piece; [2]
  KlSum<float>* warp_sums;
  int begin, vectors;  // index of the share's first vector in the row, and the number of vectors
  int warp, lane;

  SPO_DEVICE ClusterShare(const ClusterConfig& config, unsigned rank, std::int64_t V)
      : warp(static_cast<int>(threadIdx.x) / kWarp), lane(static_cast<int>(threadIdx.x) % kWarp) {
    static_assert(sizeof(KlSum<float>) == kSumBytes);
    z = reinterpret_cast<uint4*>(dynamic_shared());
    r = z + config.vectors;
    block_sums = reinterpret_cast<float4*>(r + config.vectors);
    block_gaps = reinterpret_cast<float*>(block_sums + 2 * kMaxCluster);
    sums_barriers = reinterpret_cast<std::uint64_t*>(block_gaps + 2 * kMaxCluster);
    barriers = sums_barriers + 2;
    warp_sums = reinterpret_cast<KlSum<float>*>(barriers + (config.vectors + kPieceVectors - 1) / kPieceVectors);
    begin = static_cast<int>(rank) * config.vectors;
    const int left = static_cast<int>(V / E) - begin;
    vectors = left < 0 ? 0 : left < config.vectors ? left : config.vectors;
  }

  // Calls f(piece, first, end) for the warp's pieces: vectors [first, end) of the share.
  template <class F>
  SPO_DEVICE void for_pieces(F f) const {
    for (int piece = warp; piece * kPieceVectors < vectors; piece += kWarps) {
      const int first = piece * kPieceVectors, end = first + kPieceVectors;
      f(piece, first, end < vectors ? end : vectors);
    }
  }

  // Starts the copies of a piece of both tensors. One lane calls it, after the warp has read the piece's old content.
  SPO_DEVICE void copy(int piece, int first, int end, const T* z_row, const T* r_row) const {
    const auto bytes = static_cast<std::uint32_t>(end - first) * kVectorBytes;
    const std::int64_t at = static_cast<std::int64_t>(begin + first) * E;
    mbarrier_expect(barriers + piece, 2 * bytes);
    copy_bulk(z + first, z_row + at, bytes, barriers + piece);
    copy_bulk(r + first, r_row + at, bytes, barriers + piece);
  }

  SPO_DEVICE void read(int v, float (&x)[E], float (&y)[E]) const {
    unpack(z[v], static_cast<const T*>(nullptr), x);
    unpack(r[v], static_cast<const T*>(nullptr), y);
  }

  // The lane's sum over its pieces, after their copies have arrived. Sets infinite if one of their logits is infinite.
  SPO_DEVICE KlSum<float> sum(unsigned parity, bool& infinite) const {
    auto sum = KlSum<float>::empty();
    infinite = false;
    float x[E], y[E];
    for_pieces([&](int piece, int first, int end) {
      mbarrier_wait(barriers + piece, parity);
      for (int v = first + lane; v < end; v += kWarp) {
        read(v, x, y);
        sum.template add<false>(x, y);
        infinite |= !is_finite(sum.gap);
      }
    });
    if (!is_finite(sum.gap)) {  // again with gap_of_positive, as in sum_rows
      sum.gap = 0;
      for_pieces([&](int, int first, int end) {
#pragma unroll 1
        for (int v = first + lane; v < end; v += kWarp) {
          read(v, x, y);
#pragma unroll
          for (int k = 0; k < E; ++k) sum.gap += sum.gap_of_positive(x[k], y[k]);
        }
      });
    }
    return sum;
  }

  // The sum over the whole row from the sums of all threads. Blocks send their sums to each other, alternating between
  // two places. A block may send its next sum while another block still reads this row's sums. It cannot overwrite this
  // row's sums: first it waits for the other block's next sum. The other block sends that only after all its threads
  // have read.
  SPO_DEVICE KlSum<float> merge(KlSum<float> sum, unsigned turn, unsigned rank, int blocks) const {
    sum = merge_lanes<kWarp>(sum);
    if (lane == 0) warp_sums[warp] = sum;
    __syncthreads();
    const unsigned place = turn % 2 * kMaxCluster;
    std::uint64_t* barrier = sums_barriers + turn % 2;
    if (warp == 0) {
      sum = merge_lanes<kWarps>(warp_sums[lane % kWarps]);
      if (lane == 0) mbarrier_expect(barrier, static_cast<std::uint32_t>(blocks) * kSumBytes);
      if (lane < blocks) {
        const auto to = static_cast<unsigned>(lane);
        store_async(block_sums + place + rank, to, {sum.z.top, sum.z.sum, sum.r.top, sum.r.sum}, barrier);
        store_async(block_gaps + place + rank, to, sum.gap, barrier);
      }
      __syncwarp();
    }
    mbarrier_wait<true>(barrier, turn / 2 % 2);
    const int from = lane % kMaxCluster;
    sum = KlSum<float>::empty();
    if (from < blocks) {
      const float4 s = block_sums[place + from];
      sum = {{s.x, s.y}, {s.z, s.w}, block_gaps[place + from]};
    }
    return merge_lanes<kMaxCluster>(sum);
  }

  SPO_DEVICE void write(T* row, int v, const uint4& words) const {
    __stcs(reinterpret_cast<uint4*>(row) + begin + v, words);
  }
};

// The grid is a whole number of clusters; cluster i takes the rows i, i + clusters, and so on.
template <class T, int threads>
__global__ void __launch_bounds__(threads, threads == kThreads ? 3 : 2)
    kl_loss_cluster_kernel(KlLossFwdArgs a, ClusterConfig config) {
  if constexpr (SPO_CLUSTERS) {
    constexpr int E = kPacket<T>;
    const auto blocks = static_cast<unsigned>(config.blocks), N = static_cast<unsigned>(a.N);
    const unsigned rank = blockIdx.x % blocks, clusters = gridDim.x / blocks;
    const bool first_of_row = rank == 0 && threadIdx.x == 0;
    const ClusterShare<T, threads> share(config, rank, a.V);
    const int lane = share.lane;

    const auto weight_of = [&](unsigned row) {
      return a.row_weight && row < N ? static_cast<const float*>(a.row_weight)[row] : 1.f;
    };
    // The cluster's first row from `row` on whose weight is not 0. Writes the zeros of the rows before it.
    const auto skip = [&](unsigned row, float& weight) {
      for (; row < N && weight == 0; row += clusters, weight = weight_of(row)) {
        if (first_of_row) a.weighted_kl[row] = 0;
        T* out = Place(row, a.dz).in<T>(a.dz);
        share.for_pieces([&](int, int first, int end) {
          for (int v = first + lane; v < end; v += kWarp) share.write(out, v, {0, 0, 0, 0});
        });
      }
      return row;
    };

    float weight = weight_of(blockIdx.x / blocks);
    unsigned row = skip(blockIdx.x / blocks, weight);
    Place place(row, a.z);
    if (lane == 0 && row < N) {
      share.for_pieces([&](int piece, int, int) { mbarrier_init(share.barriers + piece); });
      if (share.warp == 0) {
        mbarrier_init(share.sums_barriers);
        mbarrier_init(share.sums_barriers + 1);
      }
      mbarrier_init_fence();
      const T *z = place.in<T>(a.z), *r = place.in<T>(a.r);
      share.for_pieces([&](int piece, int first, int end) { share.copy(piece, first, end, z, r); });
    }
    __syncwarp();
    cluster_sync();  // without it a block could send its sum to a block that has not begun

    for (unsigned turn = 0; row < N; ++turn) {
      float next_weight = weight_of(row + clusters);
      bool infinite;
      const KlSum<float> own = share.sum(turn % 2, infinite), sum = share.merge(own, turn, rank, config.blocks);
      const float kl = kl_of(sum);
      if (first_of_row) a.weighted_kl[row] = static_cast<double>(weight) * kl;
      const Gradient<float> grad(RowStats<float>(sum.z), RowStats<float>(sum.r), kl_for_grad(kl), 0, weight, 0);
      // Sums of numbers below 1e30 are finite.
      const bool careful =
          infinite || !(fmaxf(fabsf(grad.policy.shift), fabsf(grad.ref.shift)) < 1e30f && fabsf(grad.mean) < 1e30f);

      const unsigned next = skip(row + clusters, next_weight);
      const Place next_place(next, a.z);
      const T *z_next = next_place.in<T>(a.z), *r_next = next_place.in<T>(a.r);
      T* out = place.in<T>(a.dz);
      share.for_pieces([&](int piece, int first, int end) {
        for (int v = first + lane; v < end; v += kWarp) {
          float x[E], y[E];
          share.read(v, x, y);
#pragma unroll
          for (int k = 0; k < E; ++k) x[k] = kl_gradient(grad, x[k], y[k]);
          if (careful) {  // computed anew; a test of p = 0 for each element would be an eighth of the instructions
            float z[E];
            share.read(v, z, y);
#pragma unroll
            for (int k = 0; k < E; ++k) x[k] = grad.template operator()<true>(z[k], y[k], false);
          }
          share.write(out, v, pack(x, static_cast<const T*>(nullptr)));
        }
        __syncwarp();  // every lane has read the piece that the copy overwrites
        if (lane == 0 && next < N) share.copy(piece, first, end, z_next, r_next);
      });
      row = next;
      place = next_place;
      weight = next_weight;
    }
    // No block waits here: each has received all sums, so no other block stores in its shared memory any more.
  }
}

// Gives all three tensors the same T. Evenly spaced rows (T = 1) fit any T. False if two tensors have different T
// above 1.
inline bool with_same_steps(const KlLossFwdArgs& a, KlLossFwdArgs* out) {
  const std::int64_t T = std::max({a.z.T, a.r.T, a.dz.T});
  KlLossFwdArgs same = a;
  for (Rows* rows : {&same.z, &same.r, &same.dz}) {
    if (rows->T == T) continue;
    if (rows->T != 1) return false;
    *rows = {rows->data, rows->dtype, T, rows->stride_b * T, rows->stride_b};
  }
  if (out) *out = same;
  return true;
}

// The cluster for rows like these; 0 blocks if kl_loss_fwd_kernel takes them. Length, alignment and strides decide, and
// the number of rows does not. A gradient out of place is contiguous, so its rows are aligned if they are whole
// vectors: a row goes to the same kernel in place and out of place.
inline ClusterConfig cluster_config_of(const KlLossFwdArgs& a, int element_bytes, const SharedMemory& memory) {
  const auto aligned = [&](const Rows& rows) {
    const std::int64_t begin = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(rows.data));
    return (begin | rows.stride_b * element_bytes | rows.stride_t * element_bytes) % kVectorBytes == 0;
  };
  if (a.of_z.a || a.of_r.a || a.padding > 0) return {};
  if (a.z.dtype != a.r.dtype || a.N > kMaxGrid || !with_same_steps(a, nullptr)) return {};
  if (!aligned(a.z) || !aligned(a.r) || !aligned(a.dz)) return {};
  return cluster_config(a.V, element_bytes, memory);
}

// Shared memory of the current device, which is asked once. The emulator asks each time: tests change its device.
inline cudaError_t shared_memory_of_device(SharedMemory& memory) {
#if defined(SPO_CUDA_EMULATOR)
  return shared_memory(0, memory);
#else
  static std::mutex mutex;
  static std::map<int, SharedMemory> known;
  int device;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) {
    memory = found->second;
    return cudaSuccess;
  }
  error = shared_memory(device, memory);
  if (error == cudaSuccess) known.emplace(device, memory);
  return error;
#endif
}

// Launches the kernel in clusters of this configuration. `launched` is false if the device cannot hold one.
template <class T>
cudaError_t launch_kl_loss_cluster(const KlLossFwdArgs& a, const ClusterConfig& config, const SharedMemory& memory,
                                   cudaStream_t stream, bool& launched) {
  static std::mutex mutex;
  static std::map<std::array<int, 4>, int> known;  // clusters resident at once
  const auto kernel =
      config.threads == kThreads ? kl_loss_cluster_kernel<T, kThreads> : kl_loss_cluster_kernel<T, 2 * kThreads>;
  launched = false;
  int device = 0;
#if !defined(SPO_CUDA_EMULATOR)
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
#endif
  int resident = 0;
  {
    const std::lock_guard lock(mutex);
    const std::array<int, 4> key{device, config.blocks, config.threads, config.shared_bytes};
    const auto found = known.find(key);
    if (found != known.end()) {
      resident = found->second;
    } else {
      if (const cudaError_t error = prepare_clusters(kernel, config, memory, resident)) return error;
      known.emplace(key, resident);
    }
  }
  if (resident == 0) return cudaSuccess;
  launched = true;
  const std::int64_t clusters = std::min<std::int64_t>(a.N, std::int64_t{resident} * config.rounds);
  return launch_cluster_kernel(kernel, static_cast<unsigned>(clusters), config, stream, a, config);
}

// Launches the kernel if rows and device suit it; else `launched` is false.
template <class T>
cudaError_t launch_kl_loss_cluster(const KlLossFwdArgs& a, cudaStream_t stream, bool& launched) {
  launched = false;
  SharedMemory memory;
  if (const cudaError_t error = shared_memory_of_device(memory)) return error;
  const ClusterConfig config = cluster_config_of(a, sizeof(T), memory);
  KlLossFwdArgs same = a;
  if (config.blocks == 0 || !with_same_steps(a, &same)) return cudaSuccess;
  return launch_kl_loss_cluster<T>(same, config, memory, stream, launched);
}

}  // namespace spo::cuda
