#include "row_ops.h"

#include <cmath>
#include <limits>
#include <type_traits>

#include "row_kernels.h"
#include "row_scalar.h"
#include "simd_level.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace spo::cpu {
namespace {

// Flush subnormals to zero while a kernel runs on this thread, and leave the thread as it was.
class FlushToZero {
#if defined(__x86_64__)
  unsigned saved_ = _mm_getcsr();

 public:
  FlushToZero() { _mm_setcsr(saved_ | 0x8040); }  // FTZ | DAZ
  ~FlushToZero() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
  std::uint64_t saved_;

 public:
  FlushToZero() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | std::uint64_t{1} << 24));  // FZ
  }
  ~FlushToZero() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
 public:
  FlushToZero() {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;
};

template <class T, class R>
RowKernels<T, R> kernels_at(SimdLevel level) {
  switch (level) {
#if defined(__x86_64__)
    case SimdLevel::avx512: return avx512::kernels<T, R>();
    case SimdLevel::avx2: return avx2::kernels<T, R>();
#endif
    default: return portable::kernels<T, R>();
  }
}

template <class T>
T* row(const Rows& rows, std::int64_t i) {
  return static_cast<T*>(rows.data) + i / rows.T * rows.stride_b + i % rows.T * rows.stride_t;
}

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// f.template operator()<T, R>(kernels, flush) with the element types of policy and reference logits. float64 runs in
// scalar double arithmetic, in which subnormals count.
template <class F>
void dispatch(DType z, DType r, std::int64_t rows, F f) {
  if (z == DType::f64) return f.template operator()<double, double>(scalar::kernels());
  const SimdLevel level = simd_level();
  const FlushToZero flush;
  const auto with_policy = [&]<class T>() {
    switch (r) {
      case DType::bf16: return f.template operator()<T, bf16>(kernels_at<T, bf16>(level));
      case DType::f16: return f.template operator()<T, f16>(kernels_at<T, f16>(level));
      default: return f.template operator()<T, float>(kernels_at<T, float>(level));
    }
  };
  switch (z) {
    case DType::bf16: with_policy.template operator()<bf16>(); break;
    case DType::f16: with_policy.template operator()<f16>(); break;
    default: with_policy.template operator()<float>(); break;
  }
  count_rows(level, rows);
}

// An infinite KL has no gradient: NaN, for every element with a probability.
double kl_for_grad(double kl) { return std::isinf(kl) ? std::numeric_limits<double>::quiet_NaN() : kl; }

template <class T>
double log_prob_of_label(const T* z, std::int64_t label, const RowStats& stats) {
  return label == kLabelElsewhere ? -INFINITY : scalar::log_prob(z[label], stats);
}

template <class T>
void zero(T* dz, std::int64_t V) {
  std::memset(static_cast<void*>(dz), 0, V * sizeof(T));
}

}  // namespace

void token_stats_fwd(const TokenStatsFwd& a, std::int64_t begin, std::int64_t end) {
  dispatch(a.z.dtype, a.r.data ? a.r.dtype : DType::f32, end - begin, [&]<class T, class R>(RowKernels<T, R> k) {
    auto* stats = static_cast<Acc<T>*>(a.stats);
    auto* logps = static_cast<Acc<T>*>(a.logps);
    auto* kls = static_cast<Acc<T>*>(a.kl);
    for (std::int64_t i = begin; i < end; ++i) {
      const bool with_logp = a.labels && a.labels[i] != a.ignore_index;
      const bool with_kl = a.r.data && (!a.mask || a.mask[i]);
      const T* z = row<T>(a.z, i);
      KlStats s{};
      if (with_kl) {
        s = k.kl_stats(z, row<R>(a.r, i), a.V);
      } else if (with_logp) {
        s.policy = k.logits_stats(z, a.V);
      }
      stats[i] = static_cast<Acc<T>>(s.policy.shift);
      stats[a.N + i] = static_cast<Acc<T>>(s.policy.logsum);
      if (a.labels) logps[i] = with_logp ? static_cast<Acc<T>>(log_prob_of_label(z, a.labels[i], s.policy)) : 0;
      if (a.r.data) {
        stats[2 * a.N + i] = static_cast<Acc<T>>(s.ref.shift);
        stats[3 * a.N + i] = static_cast<Acc<T>>(s.ref.logsum);
        kls[i] = static_cast<Acc<T>>(s.kl);
      }
    }
  });
}

void token_stats_bwd(const TokenStatsBwd& a, std::int64_t begin, std::int64_t end) {
  dispatch(a.z.dtype, a.r.data ? a.r.dtype : DType::f32, end - begin, [&]<class T, class R>(RowKernels<T, R> k) {
    const auto* stats = static_cast<const Acc<T>*>(a.stats);
    const auto* dlogps = static_cast<const Acc<T>*>(a.dlogps);
    const auto* dkl = static_cast<const Acc<T>*>(a.dkl);
    for (std::int64_t i = begin; i < end; ++i) {
      const bool with_logp = dlogps && a.labels && a.labels[i] != a.ignore_index;
      const bool with_kl = dkl && a.r.data && (!a.mask || a.mask[i]);
      const T* z = row<T>(a.z, i);
      T* dz = row<T>(a.dz, i);
      const bool with_label = with_logp && a.labels[i] != kLabelElsewhere;
      const RowGrad grad{with_logp ? dlogps[i] : 0., with_kl ? dkl[i] : 0., with_label ? a.labels[i] : -1};
      const RowStats policy{stats[i], stats[a.N + i]};
      if (with_kl) {
        const double kl = kl_for_grad(static_cast<const Acc<T>*>(a.kl)[i]);
        k.grad_kl(z, row<R>(a.r, i), dz, a.V, {policy, {stats[2 * a.N + i], stats[3 * a.N + i]}, kl}, grad);
      } else if (with_logp) {
        k.grad_logp(z, dz, a.V, policy, grad);
      } else {
        zero(dz, a.V);
      }
    }
  });
}

void kl_loss_fwd(const KlLossFwd& a, std::int64_t begin, std::int64_t end) {
  dispatch(a.z.dtype, a.r.dtype, end - begin, [&]<class T, class R>(RowKernels<T, R> k) {
    for (std::int64_t i = begin; i < end; ++i) {
      const double weight = a.row_weight ? static_cast<const Acc<T>*>(a.row_weight)[i] : 1.;
      const T* z = row<T>(a.z, i);
      T* dz = row<T>(a.dz, i);
      a.weighted_kl[i] = 0;
      if (weight == 0) {
        zero(dz, a.V);
        continue;
      }
      KlStats s = k.kl_stats(z, row<R>(a.r, i), a.V);
      a.weighted_kl[i] = weight * s.kl;
      s.kl = kl_for_grad(s.kl);
      k.grad_kl(z, row<R>(a.r, i), dz, a.V, s, {0, weight, -1});
    }
  });
}

void scale(const Rows& rows, std::int64_t V, double factor, std::int64_t begin, std::int64_t end) {
  dispatch(rows.dtype, DType::f32, end - begin, [&]<class T, class R>(RowKernels<T, R> k) {
    for (std::int64_t i = begin; i < end; ++i) k.scale(row<T>(rows, i), V, factor);
  });
}

std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t N, std::int64_t V, std::int64_t ignore_index) {
  for (std::int64_t i = 0; i < N; ++i)
    if (labels[i] != ignore_index && labels[i] != kLabelElsewhere && (labels[i] < 0 || labels[i] >= V)) return i;
  return -1;
}

}  // namespace spo::cpu
