// The row kernels on a GPU: the equations of spo_kernels/reference.py in one pass over the logits.
//
// A short row belongs to one warp, a longer one to one block. If rows are long and too few to fill the GPU, several
// blocks split each of them. Each thread keeps a running maximum and sums relative to it over its packets; threads
// merge their sums in a fixed order.
//
// What decides the speed for bfloat16, by the instruction counts of tests/cuda/test_machine_code.py:
// - An element of a log-prob costs one exponential, and 1/16 of one for a new maximum: a thread looks for a new maximum
//   once in two packets.
// - On an H100 the special function unit takes 50 % of the memory's time, and the issue of instructions 42 %.
// - A B200 moves more than twice the bytes a cycle: the special function unit alone would take 97 %. A polynomial
//   computes a quarter of the exponentials, with two operations an instruction, which leaves 74 %.
// - The loops leave out what few elements need: the label's gradient, and gaps of infinite logits. A branch for
//   infinite gaps, though never taken, cost the KL a third of its instructions.
// - Logits with a transform have kernels of their own. A tanh costs two operations of the special function unit, as
//   many as two exponentials, and no more memory.
#pragma once

#include <cassert>
#include <type_traits>

#include "launch_config.h"
#include "online_sums.cuh"
#include "row_writer.cuh"

namespace spo::cuda {

// Blocks that a multiprocessor must hold. A thread then has 80 registers, or 128 for double. Without this bound ptxas
// 13.0 aims at more blocks and spills.
template <class T>
constexpr int kBlocks = std::is_same_v<Acc<T>, double> ? 2 : 3;

constexpr float kLog2eLow = 1.9259629911266175e-08f;  // log2(e) less kLog2e

// Index of the calling thread's group of threads_per_row threads: a warp, or a block of kThreads.
template <int threads_per_row>
SPO_DEVICE std::int64_t group_index() {
  return static_cast<std::int64_t>(blockIdx.x) * (kThreads / threads_per_row) + threadIdx.x / threads_per_row;
}

// The elements [begin, end) of a row that a group takes: all of the row, or one split of it.
template <int threads_per_row>
struct Share {
  std::int64_t row, begin, end;

  SPO_DEVICE Share(std::int64_t group, std::int64_t V, unsigned splits, std::int64_t split_elements) {
    if constexpr (threads_per_row == kWarp) {
      row = group, begin = 0, end = V;
    } else {  // a group is a block, of which a grid has fewer than 2^31
      const unsigned block = static_cast<unsigned>(group);
      row = block / splits;
      begin = block % splits * split_elements;
      end = begin + split_elements < V ? begin + split_elements : V;
    }
  }
};

SPO_DEVICE void check_label(std::int64_t label, std::int64_t V) {
  assert((label == kLabelElsewhere || (label >= 0 && label < V)) &&
         "spo_kernels: labels must be in [0, V) or ignore_index");
}

// The statistics of a row's policy logits, and the log-probability of its label.
template <class T, int E>
SPO_DEVICE void write_logits_stats(const TokenStatsFwdArgs& a, const RowReader<T, E>& z, std::int64_t row,
                                   const RowStats<Acc<T>>& s) {
  auto* stats = static_cast<Acc<T>*>(a.stats);
  stats[row] = s.shift;
  stats[a.N + row] = s.logsum;
  if (!a.labels) return;
  const std::int64_t label = a.labels[row];
  Acc<T> logp = 0;
  if (label != a.ignore_index) {
    check_label(label, a.V);
    logp = label == kLabelElsewhere ? -INFINITY : s.log_prob(z.logit(z.at(label)));
  }
  static_cast<Acc<T>*>(a.logps)[row] = logp;
}
template <class A>
SPO_DEVICE void write_kl_stats(const TokenStatsFwdArgs& a, std::int64_t row, const RowStats<A>& ref, A kl) {
  auto* stats = static_cast<A*>(a.stats);
  stats[2 * a.N + row] = ref.shift;
  stats[3 * a.N + row] = ref.logsum;
  static_cast<A*>(a.kl)[row] = kl;
}

struct Wanted {
  bool logp, kl;
  SPO_DEVICE Wanted(const TokenStatsFwdArgs& a, std::int64_t row)
      : logp(a.labels && a.labels[row] != a.ignore_index), kl(a.r.data && (!a.mask || a.mask[row])) {}
};

// An ignored and masked row is not read. Its outputs are 0.
template <class T, int E>
SPO_DEVICE void write_unwanted(const TokenStatsFwdArgs& a, const RowReader<T, E>& z, std::int64_t row) {
  using A = Acc<T>;
  write_logits_stats(a, z, row, RowStats<A>(0, 0));
  if (a.r.data) write_kl_stats<A>(a, row, {0, 0}, 0);
}

// T and R are the types of the logits, or Transformed of them. Without a reference, R is T and with_kl is false.
// split_sums [N, splits] receives the sums of rows that are split.
template <class T, class R, bool with_kl, int threads_per_row>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    token_stats_fwd_kernel(TokenStatsFwdArgs a, unsigned splits, std::int64_t split_elements, void* split_sums) {
  using A = Acc<T>;
  constexpr int E = kPacket<T>;
  const std::int64_t group = group_index<threads_per_row>();
  const auto [row, begin, end] = Share<threads_per_row>(group, a.V, splits, split_elements);
  if (row >= a.N) return;
  const RowReader<T, E> z(a.z, a.of_z, row, a.V);
  const Wanted wanted(a, row);
  const bool first = threadIdx.x % threads_per_row == 0;

  if constexpr (with_kl) {
    if (wanted.kl) {
      const RowReader<R, E> r(a.r, a.of_r, row, a.V);
      const bool aligned = z.aligned_at(0) && r.aligned_at(0);
      const auto sum =
          merge_threads<threads_per_row>(aligned ? sum_rows<threads_per_row, true, Cache::stream>(z, r, begin, end)
                                                 : sum_rows<threads_per_row, false, Cache::stream>(z, r, begin, end));
      if (!first) return;
      if (splits > 1) {
        static_cast<KlSum<A>*>(split_sums)[group] = sum;
      } else {
        write_logits_stats(a, z, row, RowStats<A>(sum.z));
        write_kl_stats<A>(a, row, RowStats<A>(sum.r), kl_of(sum));
      }
      return;
    }
  }
  if (!wanted.logp) {
    if (first && splits == 1) write_unwanted(a, z, row);
    return;
  }
  const auto sum =
      merge_threads<threads_per_row>(z.aligned_at(0) ? sum_row<threads_per_row, true, Cache::stream>(z, begin, end)
                                                     : sum_row<threads_per_row, false, Cache::stream>(z, begin, end));
  if (!first) return;
  if (splits > 1) {
    if constexpr (with_kl)
      static_cast<KlSum<A>*>(split_sums)[group] = {sum, ExpSum<A>::empty(), 0};
    else
      static_cast<ExpSum<A>*>(split_sums)[group] = sum;
  } else {
    write_logits_stats(a, z, row, RowStats<A>(sum));
    if constexpr (with_kl) write_kl_stats<A>(a, row, {0, 0}, 0);
  }
}

// Merges the sums of rows that were split, one thread a row.
template <class T, bool with_kl>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    merge_splits_kernel(TokenStatsFwdArgs a, unsigned splits, const void* split_sums) {
  using A = Acc<T>;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= a.N) return;
  const RowReader<T, kPacket<T>> z(a.z, a.of_z, row, a.V);
  const Wanted wanted(a, row);
  if (!wanted.logp && !wanted.kl) return write_unwanted(a, z, row);
  if constexpr (with_kl) {
    const auto* sums = static_cast<const KlSum<A>*>(split_sums) + row * splits;
    KlSum<A> sum = sums[0];
    for (unsigned i = 1; i < splits; ++i) sum.merge(sums[i]);
    write_logits_stats(a, z, row, RowStats<A>(sum.z));
    if (wanted.kl)
      write_kl_stats<A>(a, row, RowStats<A>(sum.r), kl_of(sum));
    else
      write_kl_stats<A>(a, row, {0, 0}, 0);
  } else {
    const auto* sums = static_cast<const ExpSum<A>*>(split_sums) + row * splits;
    ExpSum<A> sum = sums[0];
    for (unsigned i = 1; i < splits; ++i) sum.merge(sums[i]);
    write_logits_stats(a, z, row, RowStats<A>(sum));
  }
}

// The probability of an element whose logit less the row's shift is zs.
SPO_DEVICE float probability(float zs, float logsum) {
  // log2(e) is kLog2e + kLog2eLow: with kLog2e alone, p would be off by 1e-8 |zs| p.
  return exp2_approx(fmaf(zs, kLog2e, fmaf(zs, kLog2eLow, -logsum * kLog2e)));
}
SPO_DEVICE double probability(double zs, double logsum) { return exp(zs - logsum); }

// The gradient of an element of one row.
template <class A>
struct Gradient {
  RowStats<A> policy, ref;
  A g_logp, g_kl, g_lse;
  A g_minus_p;       // what -p is multiplied by
  A mean, rounding;  // the mean under p of the gap (z - policy.shift) - (r - ref.shift), and its rounding error

  SPO_DEVICE Gradient(const RowStats<A>& policy, const RowStats<A>& ref, A kl, A g_logp, A g_kl, A g_lse)
      : policy(policy), ref(ref), g_logp(g_logp), g_kl(g_kl), g_lse(g_lse), g_minus_p(g_logp - g_lse) {
    const A logsums = policy.logsum - ref.logsum;
    mean = kl + logsums;
    const A of_logsums = mean - kl;  // Knuth's exact sum
    rounding = (of_logsums - logsums) + ((mean - of_logsums) - kl);
  }

  template <bool with_kl>
  SPO_DEVICE A operator()(A z, A r, bool at_label) const {
    const A zs = z - policy.shift, p = probability(zs, policy.logsum);
    // The label has a formula of its own, with 1 - p: g_logp - g_logp p would lose digits where p is near 1.
    const A grad = at_label ? fma(g_lse, p, g_logp * (1 - p)) : g_minus_p * (0 - p);
    if constexpr (!with_kl) return grad;
    // The gap of a token with p near 1 is near the mean, so their difference is exact. `rounding` is added after it.
    const A gap = p == 0 ? 0 : ((zs - (r - ref.shift)) - mean) + rounding;
    return fma(g_kl * p, gap, grad);
  }
};

// log(p / m) and log(q / m) of an element, where gap = log p - log q and m = mixture p + (1 - mixture) q.
template <class A>
struct LogShares {
  A of_policy, of_ref;
  SPO_DEVICE LogShares(A gap, A mixture) {
    const A far = weight(-fabs(gap)), rest = 1 - mixture;
    const A log_sum = log_of(gap < 0 ? rest + mixture * far : mixture + rest * far);
    of_policy = (gap < 0 ? gap : A(0)) - log_sum;
    of_ref = (gap > 0 ? -gap : A(0)) - log_sum;
  }
};

// Gradient for the reverse KL if mixture is 1, else for the JSD; mean is then KL(p || m).
template <class A>
struct MixtureGradient : Gradient<A> {
  A mixture, mean;

  SPO_DEVICE MixtureGradient(const RowStats<A>& policy, const RowStats<A>& ref, A mean, A g_logp, A g_kl, A g_lse,
                             A mixture)
      : Gradient<A>(policy, ref, 0, g_logp, g_kl, g_lse), mixture(mixture), mean(mean) {}

  template <bool with_kl>
  SPO_DEVICE A operator()(A z, A r, bool at_label) const {
    const A grad = Gradient<A>::template operator()<false>(z, r, at_label);
    const A zs = z - this->policy.shift, rs = r - this->ref.shift, p = probability(zs, this->policy.logsum);
    if (mixture == 1) return fma(this->g_kl, p - probability(rs, this->ref.logsum), grad);
    const LogShares<A> shares((zs - rs) - (this->policy.logsum - this->ref.logsum), mixture);
    return p == 0 ? grad : fma(this->g_kl * mixture * p, shares.of_policy - mean, grad);
  }
};

// An infinite KL has no gradient. NaN here makes the gradient of every element with p > 0 NaN.
template <class A>
SPO_DEVICE A kl_for_grad(A kl) {
  return kl - kl == 0 ? kl : kl - kl;
}

// A packet of policy logits, and of reference logits with_kl.
template <class Z, class R, bool with_kl>
struct PacketLogits {
  Z z;
  R r;
};
template <class Z, class R>
struct PacketLogits<Z, R, false> {
  Z z;
};

// The gradient of elements [begin, end) of a row. label is -1 for a row without one. `out` may be z: both then have the
// same alignment, so a thread reads only elements that it writes.
template <int threads_per_row, bool with_kl, int batch, class T, class R, int E, class Grad>
SPO_DEVICE void write_gradient(Stored<T>* out, const RowReader<T, E>& z, const RowReader<R, E>& r, const Grad& grad,
                               std::int64_t label, std::int64_t begin, std::int64_t end) {
  using A = Acc<T>;
  // The label's element is written twice, by the same thread. To write it once, inside its packet, every element would
  // need a comparison. The label's logits are read before the first write, which may be in place.
  const bool owns_label = label >= 0 && writes_in_packet<threads_per_row, E>(out, label, begin, end, z.V);
  const A u_label = owns_label ? z.at(label) : A{0}, r_label = with_kl && owns_label ? r.logit(r.at(label)) : A{0};
  const auto dx = [&](A u, A r_logit, bool at_label) {
    return z.dx(u, grad.template operator()<with_kl>(z.logit(u), r_logit, at_label));
  };
  using Inputs = PacketLogits<typename RowReader<T, E>::Raw, typename RowReader<R, E>::Raw, with_kl>;
  const auto write = [&]<bool aligned>() {
    write_row<threads_per_row, E, batch>(
        out, begin, end, z.V,
        [&](std::int64_t first) {
          Inputs in;
          in.z = z.template raw<aligned, Cache::stream>(first);
          if constexpr (with_kl) in.r = r.template raw<aligned, Cache::stream>(first);
          return in;
        },
        [&](const Inputs& in, A(&x)[E]) {
          A y[E];
          z.values(in.z, x);
          if constexpr (with_kl) r.values(in.r, y);
#pragma unroll
          for (int k = 0; k < E; ++k) x[k] = dx(x[k], with_kl ? r.logit(y[k]) : 0, false);
        },
        [&](std::int64_t v) { from_acc(dx(z.at(v), with_kl ? r.logit(r.at(v)) : 0, v == label), out[v]); });
  };
  const std::int64_t head = aligned_from(out);  // the first packet starts here
  if (z.aligned_at(head) && (!with_kl || r.aligned_at(head)))
    write.template operator()<true>();
  else
    write.template operator()<false>();
  if (owns_label) from_acc(dx(u_label, r_label, true), out[label]);
}

// What the gradient takes from the reference: nothing, the KL, or another divergence.
constexpr int kNoReference = 0, kOfKl = 1, kOfMixture = 2;

template <class T, class R, int term, int threads_per_row>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    token_stats_bwd_kernel(TokenStatsBwdArgs a, unsigned splits, std::int64_t split_elements) {
  using A = Acc<T>;
  constexpr int E = kPacket<T>;
  constexpr bool with_kl = term != kNoReference;
  const auto [row, begin, end] = Share<threads_per_row>(group_index<threads_per_row>(), a.V, splits, split_elements);
  if (row >= a.N) return;
  auto* out = row_of<Stored<T>>(a.dz, row);
  if (end == a.V) write_padding<threads_per_row>(out, a.V, a.padding);

  // The block's first logits wait for these loads, so they are issued together. The logits of a row with upstream
  // gradients of 0 may be NaN, so they are not read.
  const std::int64_t target = a.dlogps && a.labels ? a.labels[row] : a.ignore_index;
  const A dlogp = a.dlogps ? static_cast<const A*>(a.dlogps)[row] : A{0};
  const A g_logp = target == a.ignore_index ? A{0} : dlogp;
  const A g_kl = with_kl && a.dkl && (!a.mask || a.mask[row]) ? static_cast<const A*>(a.dkl)[row] : A{0};
  const A g_lse = a.dlse ? static_cast<const A*>(a.dlse)[row] : A{0};
  const bool logp = g_logp != 0, kl = g_kl != 0;
  if (!logp && !kl && g_lse == 0) return write_zeros<threads_per_row, E>(out, begin, end, a.V);

  const std::int64_t label = logp && target != kLabelElsewhere ? target : -1;
  if (logp) check_label(target, a.V);
  const auto* stats = static_cast<const A*>(a.stats);
  const RowStats<A> policy(stats[row], stats[a.N + row]);
  const RowReader<T, E> z(a.z, a.of_z, row, a.V);
  if constexpr (with_kl) {
    if (kl) {
      const RowStats<A> ref(stats[2 * a.N + row], stats[3 * a.N + row]);
      const RowReader<R, E> r(a.r, a.of_r, row, a.V);
      if constexpr (term == kOfKl) {
        const Gradient<A> grad(policy, ref, kl_for_grad(static_cast<const A*>(a.kl)[row]), g_logp, g_kl, g_lse);
        return write_gradient<threads_per_row, true, kBatch<true, R>>(out, z, r, grad, label, begin, end);
      } else {
        const A mixture = static_cast<A>(a.mixture), mean = a.mixture < 1 ? stats[4 * a.N + row] : A{0};
        const MixtureGradient<A> grad(policy, ref, mean, g_logp, g_kl, g_lse, mixture);
        return write_gradient<threads_per_row, true, 1>(out, z, r, grad, label, begin, end);
      }
    }
  }
  const Gradient<A> grad(policy, {0, 0}, 0, g_logp, 0, g_lse);
  write_gradient<threads_per_row, false, kBatch<false, T>>(out, z, z, grad, label, begin, end);
}

// KL(p || m) and KL(q || m) of a row, or of some of its elements.
template <class A>
struct MixtureSum {
  A of_policy, of_ref;

  SPO_DEVICE void merge(const MixtureSum& other) {
    of_policy += other.of_policy;
    of_ref += other.of_ref;
  }
};
template <class A>
SPO_DEVICE MixtureSum<A> shuffle_xor(const MixtureSum<A>& s, int lanes) {
  return {__shfl_xor_sync(0xffffffffu, s.of_policy, lanes), __shfl_xor_sync(0xffffffffu, s.of_ref, lanes)};
}

template <bool aligned, class T, class R, int E>
SPO_DEVICE MixtureSum<Acc<T>> sum_mixture(const RowReader<T, E>& z, const RowReader<R, E>& r,
                                          const RowStats<Acc<T>>& policy, const RowStats<Acc<T>>& ref, Acc<T> mixture) {
  using A = Acc<T>;
  MixtureSum<A> sum{0, 0};
  for_packets<kThreads, E>(0, z.V, [&]<int packets, bool full>(std::int64_t first) {
#pragma unroll 1
    for (int c = 0; c < packets; ++c, first += std::int64_t{kThreads} * E) {
      A x[E], y[E];
      if constexpr (full) {
        z.template full<aligned, Cache::stream>(first, x);
        r.template full<aligned, Cache::stream>(first, y);
      } else {
        z.edge(first, x);
        r.edge(first, y);
      }
#pragma unroll
      for (int k = 0; k < E; ++k) {
        const A zs = x[k] - policy.shift, rs = y[k] - ref.shift;
        const A p = probability(zs, policy.logsum), q = probability(rs, ref.logsum);
        const LogShares<A> shares((zs - rs) - (policy.logsum - ref.logsum), mixture);
        if (p != 0) sum.of_policy = fma(p, shares.of_policy, sum.of_policy);
        if (q != 0) sum.of_ref = fma(q, shares.of_ref, sum.of_ref);
      }
    }
  });
  return sum;
}

// A block a row.
template <class T, class R>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) mixture_kl_kernel(MixtureKlArgs a) {
  using A = Acc<T>;
  constexpr int E = kPacket<T>;
  const std::int64_t row = blockIdx.x;
  auto* kls = static_cast<A*>(a.kls);
  if (a.mask && !a.mask[row]) {
    if (threadIdx.x == 0) kls[row] = kls[a.N + row] = 0;
    return;
  }
  const auto* stats = static_cast<const A*>(a.stats);
  const RowStats<A> policy(stats[row], stats[a.N + row]), ref(stats[2 * a.N + row], stats[3 * a.N + row]);
  const RowReader<T, E> z(a.z, a.of_z, row, a.V);
  const RowReader<R, E> r(a.r, a.of_r, row, a.V);
  const A mixture = static_cast<A>(a.mixture);
  const auto sum =
      merge_threads<kThreads>(z.aligned_at(0) && r.aligned_at(0) ? sum_mixture<true>(z, r, policy, ref, mixture)
                                                                 : sum_mixture<false>(z, r, policy, ref, mixture));
  if (threadIdx.x != 0) return;
  kls[row] = sum.of_policy;
  kls[a.N + row] = sum.of_ref;
}

// A row's KL and then its gradient, while the row is in the cache.
template <class T, class R, int threads_per_row>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) kl_loss_fwd_kernel(KlLossFwdArgs a) {
  using A = Acc<T>;
  constexpr int E = kPacket<T>;
  const std::int64_t row = group_index<threads_per_row>();
  if (row >= a.N) return;
  auto* out = row_of<Stored<T>>(a.dz, row);
  write_padding<threads_per_row>(out, a.V, a.padding);
  const bool first = threadIdx.x % threads_per_row == 0;
  const A row_weight = a.row_weight ? static_cast<const A*>(a.row_weight)[row] : A{1};
  if (row_weight == 0) {
    if (first) a.weighted_kl[row] = 0;
    return write_zeros<threads_per_row, E>(out, 0, a.V, a.V);
  }
  const RowReader<T, E> z(a.z, a.of_z, row, a.V);
  const RowReader<R, E> r(a.r, a.of_r, row, a.V);
  // merge_threads is the barrier between the sweeps: in place, the second sweep overwrites what the first one reads.
  const auto sum = merge_threads<threads_per_row>(z.aligned_at(0) && r.aligned_at(0)
                                                      ? sum_rows<threads_per_row, true, Cache::keep>(z, r, 0, a.V)
                                                      : sum_rows<threads_per_row, false, Cache::keep>(z, r, 0, a.V));
  const A kl = kl_of(sum);
  if (first) a.weighted_kl[row] = static_cast<double>(row_weight) * kl;
  const Gradient<A> grad(RowStats<A>(sum.z), RowStats<A>(sum.r), kl_for_grad(kl), 0, row_weight, 0);
  write_gradient<threads_per_row, true, kBatch<true, R>>(out, z, r, grad, -1, 0, a.V);
}

// loss = the sum of N values in a fixed order. One block.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocks<A>) sum_kernel(const double* values, std::int64_t N, A* loss) {
  __shared__ double of_thread[kThreads];
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < N; i += kThreads) sum += values[i];
  of_thread[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(half)) of_thread[threadIdx.x] += of_thread[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss = static_cast<A>(of_thread[0]);
}

// rows *= *scale. A scale of 1 leaves the memory untouched. Each group takes one split after another: if each split had
// a block of its own, a scale of 1 would still take a tenth of the time of another scale.
template <class T, int threads_per_row>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    scale_kernel(Rows rows, std::int64_t N, std::int64_t V, const Acc<T>* scale, unsigned splits,
                 std::int64_t split_elements) {
  using A = Acc<T>;
  constexpr int E = kPacket<T>;
  const A by = *scale;
  if (by == 1) return;
  const std::int64_t groups = static_cast<std::int64_t>(gridDim.x) * (kThreads / threads_per_row);
  for (std::int64_t group = group_index<threads_per_row>(); group < N * splits; group += groups) {
    const Share<threads_per_row> share(group, V, splits, split_elements);
    const RowReader<T, E> x(rows, {}, share.row, V);
    T* out = row_of<T>(rows, share.row);
    write_row<threads_per_row, E, kBatch<false, T>>(
        out, share.begin, share.end, V, [&](std::int64_t first) { return x.template raw<true, Cache::stream>(first); },
        [&](const typename RowReader<T, E>::Raw& in, A(&values)[E]) {
          x.values(in, values);
#pragma unroll
          for (int k = 0; k < E; ++k) values[k] *= by;
        },
        [&](std::int64_t v) { from_acc(x.at(v) * by, out[v]); });
  }
}

}  // namespace spo::cuda
