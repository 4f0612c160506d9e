// What happens to one row of logits. Equations: spo_kernels/reference.py. Every pointer is to V contiguous elements,
// with no alignment beyond that of the element; outputs may be the logits themselves.
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

// Upstream gradients of one row. label is -1 where the row has none here; g_logp is 0 where logp is not wanted.
struct RowGrad {
  double g_logp, g_kl;
  std::int64_t label;
};

template <class T>
using LogitsStatsFn = RowStats (*)(const T* z, std::int64_t V);
template <class T, class R>
using KlStatsFn = KlStats (*)(const T* z, const R* r, std::int64_t V);
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
