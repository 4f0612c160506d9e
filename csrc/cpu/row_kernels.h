// What happens to one row of logits. Equations: spo_kernels/reference.py. Every pointer is to V (or n) contiguous
// elements, with no alignment beyond that of the element; outputs may be the logits themselves.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace spo::cpu {

// log-sum-exp in two parts, lse = shift + logsum: shift is some value near the maximum and exact in the logits'
// accumulation type. Their float32 sum would lose 5e-4 of every probability at 1e4.
struct RowStats {
  double shift, logsum;
};

struct KlStats {
  RowStats policy, ref;
  double kl;
};

// Elements of a row that are summed by themselves. Fixed, so that a row's result is the same, bit for bit, whether one
// thread sums all its parts or several share them. A multiple of every level's step.
constexpr std::int64_t kPart = 16384;
static inline std::int64_t count_parts(std::int64_t V) { return (V + kPart - 1) / kPart; }

// Sums over a part of a row, with zs and rs the logits less the part's shifts.
struct PartSums {
  double p, q, gap;  // of exp(zs), exp(rs), exp(zs) (zs - rs)
};
struct RowPart {
  double shift_z, shift_r;
  PartSums sums;
  // The stretch that holds most of the part's probability, and the shifts it was summed with: older than the part's
  // where those were raised after it.
  struct {
    std::int64_t begin, size;
    PartSums sums;
    double shift_z, shift_r;
  } heaviest;
};

// Upstream gradients of one row. label is -1 where the row has none here; g_logp is 0 where logp is not wanted.
struct RowGrad {
  double g_logp, g_kl;
  std::int64_t label;
};

// One part, of n elements; of the policy alone only shift_z and sums.p are set.
template <class T>
using LogitsPartFn = RowPart (*)(const T* z, std::int64_t n);
template <class T, class R>
using KlPartFn = RowPart (*)(const T* z, const R* r, std::int64_t n);
// The row of all its parts.
template <class T>
using LogitsStatsFn = RowStats (*)(const T* z, std::int64_t V, const RowPart* parts);
template <class T, class R>
using KlStatsFn = KlStats (*)(const T* z, const R* r, std::int64_t V, const RowPart* parts);
// dz = g_logp (1[v = label] - p)
template <class T>
using GradLogpFn = void (*)(const T* z, T* dz, std::int64_t V, const RowStats& stats, const RowGrad& grad);
// dz = g_logp (1[v = label] - p) + g_kl p (log p - log q - kl)
template <class T, class R>
using GradKlFn = void (*)(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad);
template <class T>
using ScaleFn = void (*)(T* x, std::int64_t n, double scale);

template <class T, class R>
struct RowKernels {
  LogitsPartFn<T> logits_part;  // null, as kl_part, where rows are not taken in parts
  KlPartFn<T, R> kl_part;
  LogitsStatsFn<T> logits_stats;
  KlStatsFn<T, R> kl_stats;
  GradLogpFn<T> grad_logp;
  GradKlFn<T, R> grad_kl;
  ScaleFn<T> scale;
};

// One namespace and one object a SIMD level; kernels<T, R>() for T, R in {float, bf16, f16}.
namespace avx512 {
template <class T, class R>
RowKernels<T, R> kernels();
}
namespace avx2 {
template <class T, class R>
RowKernels<T, R> kernels();
}
namespace portable {
template <class T, class R>
RowKernels<T, R> kernels();
}

}  // namespace spo::cpu
