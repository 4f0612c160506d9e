// The kernels of one row of logits, or of one part of it. spo_kernels/reference.py has the equations. A pointer to
// logits means V (or n) contiguous elements, aligned as one element is. A gradient may overwrite its logits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "dtype.h"

namespace spo::cpu {

// The log-sum-exp of a row is shift + logsum. shift is near the row's maximum and exact in the accumulation dtype. The
// two stay apart: for logits near 1e4 their float32 sum would change every probability by a factor of up to 1 + 5e-4.
struct RowStats {
  double shift, logsum;
};

struct KlStats {
  RowStats policy, ref;
  double kl;
};

// KL(p || m) and KL(q || m) of a row, where m = mixture p + (1 - mixture) q.
struct MixtureKl {
  double of_policy, of_ref;
};

// Elements of a part. Each part of a row is summed by itself, so a row has the same bits whether one thread sums all of
// its parts or several threads share them. A multiple of every level's kGroup.
constexpr std::int64_t kPart = 16384;
static inline std::int64_t count_parts(std::int64_t V) { return (V + kPart - 1) / kPart; }

// Sums over a part, where zs and rs are the logits less the part's shifts.
struct PartSums {
  double p, q, gap;  // sums of exp(zs), exp(rs), exp(zs) (zs - rs)
};
struct RowPart {
  double shift_z, shift_r;
  PartSums sums;
  // The block with the most probability, and the shifts it was summed with. The part's final shifts may be larger.
  struct {
    std::int64_t begin, size;
    PartSums sums;
    double shift_z, shift_r;
  } heaviest;
};

// Upstream gradients of one row's log-prob, KL and log-sum-exp, 0 where there is none. label is negative if the row or
// part has no label.
struct RowGrad {
  double g_logp, g_kl, g_lse;
  std::int64_t label;
};

// One row's transform of the numbers x in memory: z = a x, or b tanh(a x) if capped.
struct Factors {
  double a = 1, b = 1;
  bool capped = false;
};

// Sums of one part of n elements. LogitsPartFn sets shift_z and sums.p alone.
template <class T>
using LogitsPartFn = RowPart (*)(const T* z, std::int64_t n);
template <class T, class R>
using KlPartFn = RowPart (*)(const T* z, const R* r, std::int64_t n);
// Statistics of a row from the sums of all its parts.
template <class T>
using LogitsStatsFn = RowStats (*)(const T* z, std::int64_t V, const RowPart* parts);
template <class T, class R>
using KlStatsFn = KlStats (*)(const T* z, const R* r, std::int64_t V, const RowPart* parts);
// Gradient of a row or part. GradLogpFn: of log-prob and log-sum-exp. GradKlFn: of the KL as well.
template <class T>
using GradLogpFn = void (*)(const T* z, T* dz, std::int64_t V, const RowStats& stats, const RowGrad& grad);
template <class T, class R>
using GradKlFn = void (*)(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad);
// KL(p || m) and KL(q || m), from the statistics of a row. If those are of more columns, V columns' shares of both
// sums.
template <class T, class R>
using MixtureKlFn = MixtureKl (*)(const T* z, const R* r, std::int64_t V, const KlStats& stats, double mixture);
// Gradient of a row or part, for the reverse KL if mixture is 1, else for the JSD; stats.kl is then KL(p || m).
template <class T, class R>
using GradMixtureFn = void (*)(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad,
                               double mixture);
template <class T>
using ScaleFn = void (*)(T* x, std::int64_t n, double scale);
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
// TransformFn computes z from x, TransformGradFn computes dx from x and dz: n elements each.
template <class T>
using TransformFn = void (*)(const T* x, Acc<T>* z, std::int64_t n, const Factors& factors);
template <class T>
using TransformGradFn = void (*)(const T* x, const Acc<T>* dz, T* dx, std::int64_t n, const Factors& factors);

template <class T, class R>
struct RowKernels {
  LogitsPartFn<T> logits_part;  // null, like kl_part, if rows are not summed by parts
  KlPartFn<T, R> kl_part;
  LogitsStatsFn<T> logits_stats;
  KlStatsFn<T, R> kl_stats;
  GradLogpFn<T> grad_logp;
  GradKlFn<T, R> grad_kl;
  KlPartFn<R, T> reverse_kl_part;
  KlStatsFn<R, T> reverse_kl_stats;
  MixtureKlFn<T, R> mixture_kl;
  GradMixtureFn<T, R> grad_mixture;
  ScaleFn<T> scale;
  TransformFn<T> transform;
  TransformFn<R> transform_ref;
  TransformGradFn<T> transform_grad;
};

// Each SIMD level has a namespace and an object of its own, with kernels<T, R>() for T, R in {float, bf16, f16}.
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
