#include "row_ops.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "row_kernels.h"
#include "row_scalar.h"
#include "simd_level.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace spo::cpu {
namespace {

// Flushes subnormals to zero while a kernel runs on this thread. The destructor restores the thread's mode.
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

// A factor for the kernels. A NaN gets few bits, which survive the vector conversion to bfloat16 (simd_*.h).
double factor(double x) { return std::isnan(x) ? std::numeric_limits<double>::quiet_NaN() : x; }

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

// Calls f.template operator()<T, R>(kernels) with the element types of policy and reference logits, and counts `rows`
// for the SIMD level. float64 runs in scalar double arithmetic, which keeps subnormals and is not counted.
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

DType ref_dtype(const Rows& r) { return r.data ? r.dtype : DType::f32; }

// Rows without a transform: logits lie in memory, and so does the gradient.
template <class T>
struct StoredRows {
  const Rows& rows;

  const T* read(std::int64_t i, std::int64_t first, std::int64_t) { return row<const T>(rows, i) + first; }
  T* gradient(const Rows& dz, std::int64_t i, std::int64_t first) { return row<T>(dz, i) + first; }
  void store(const Rows&, std::int64_t, std::int64_t, std::int64_t) {}
};

enum class Side { policy, reference };

// A buffer of the calling thread that keeps its memory from call to call. The page faults of new memory would cost more
// than the row that it holds.
template <class T, Side side>
T* thread_buffer(std::int64_t n) {
  thread_local std::vector<T> buffer;
  if (static_cast<std::int64_t>(buffer.size()) < n) buffer.resize(n);
  return buffer.data();
}

// Rows with a transform: logits, then their gradient, in a buffer that holds one row or part of a row.
template <class T, Side side>
class TransformedRows {
  const Rows& rows_;
  const Transform& of_;
  TransformFn<T> transform_;
  TransformGradFn<T> transform_grad_;
  Acc<T>* buffer_ = nullptr;

  Factors factors(std::int64_t i) const {
    Factors f;
    if (of_.a) f.a = factor(static_cast<const Acc<T>*>(of_.a)[i * of_.stride]);
    if (of_.b) f.b = factor(static_cast<const Acc<T>*>(of_.b)[i * of_.stride]), f.capped = true;
    return f;
  }

 public:
  TransformedRows(const Rows& rows, const Transform& of, TransformFn<T> transform, TransformGradFn<T> transform_grad)
      : rows_(rows), of_(of), transform_(transform), transform_grad_(transform_grad) {}

  const Acc<T>* read(std::int64_t i, std::int64_t first, std::int64_t n) {
    buffer_ = thread_buffer<Acc<T>, side>(n);
    transform_(row<const T>(rows_, i) + first, buffer_, n, factors(i));
    return buffer_;
  }
  // The buffer again: the kernel overwrites the logits that `read` returned with their gradient. `store` computes from
  // it the gradient of the numbers in memory, and writes that to dz.
  Acc<T>* gradient(const Rows&, std::int64_t, std::int64_t) { return buffer_; }
  void store(const Rows& dz, std::int64_t i, std::int64_t first, std::int64_t n) {
    transform_grad_(row<const T>(rows_, i) + first, buffer_, row<T>(dz, i) + first, n, factors(i));
  }
};

template <class T>
RowKernels<Acc<T>, Acc<T>> kernels_of_transformed() {
  if constexpr (std::is_same_v<T, double>)
    return scalar::kernels();
  else
    return kernels_at<float, float>(simd_level());
}

// `dispatch` for kernels that may see transformed logits: calls f.template operator()<T>(kernels, policy rows,
// reference rows). T is the type in memory.
template <class Args, class F>
void dispatch_rows(const Args& a, std::int64_t rows, F f) {
  dispatch(a.z.dtype, ref_dtype(a.r), rows, [&]<class T, class R>(RowKernels<T, R> k) {
    if (!a.of_z.a && !a.of_r.a) return f.template operator()<T>(k, StoredRows<T>{a.z}, StoredRows<R>{a.r});
    f.template operator()<T>(kernels_of_transformed<T>(),
                             TransformedRows<T, Side::policy>(a.z, a.of_z, k.transform, k.transform_grad),
                             TransformedRows<R, Side::reference>(a.r, a.of_r, k.transform_ref, nullptr));
  });
}

template <class T>
double log_prob_of_label(const T* z, std::int64_t label, const RowStats& stats) {
  return label == kLabelElsewhere ? -INFINITY : scalar::log_prob(z[label], stats);
}

template <class T>
void zero(T* dz, std::int64_t n) {
  std::memset(static_cast<void*>(dz), 0, n * sizeof(T));
}

// Calls f(row, first element, number of elements) for each of the parts [begin, end).
template <class F>
void for_each_part(DType dtype, std::int64_t V, std::int64_t begin, std::int64_t end, F f) {
  const std::int64_t parts = parts_of_row(dtype, V);
  for (std::int64_t u = begin; u < end; ++u) {
    const std::int64_t first = u % parts * kPart;
    f(u / parts, first, parts == 1 ? V : std::min(V - first, kPart));
  }
}

template <class T, class R>
RowStats logits_stats(const RowKernels<T, R>& k, const T* z, std::int64_t V, std::vector<RowPart>& parts) {
  if (k.logits_part)
    for (std::int64_t i = 0, v = 0; v < V; ++i, v += kPart) parts[i] = k.logits_part(z + v, std::min(V - v, kPart));
  return k.logits_stats(z, V, parts.data());
}
template <class T, class R>
KlStats kl_stats(const RowKernels<T, R>& k, const T* z, const R* r, std::int64_t V, std::vector<RowPart>& parts) {
  if (k.kl_part)
    for (std::int64_t i = 0, v = 0; v < V; ++i, v += kPart) parts[i] = k.kl_part(z + v, r + v, std::min(V - v, kPart));
  return k.kl_stats(z, r, V, parts.data());
}

// The statistics of a row and its divergence. kl_for_grad is what the gradient takes in the place of the KL.
struct Divergence {
  KlStats stats;  // .kl is the divergence
  double kl_for_grad;
};

// An infinite KL has no gradient. NaN here makes the gradient of every element with p > 0 NaN.
double kl_for_grad(double kl) { return factor(std::isinf(kl) ? NAN : kl); }

template <class T, class R>
Divergence divergence(const RowKernels<T, R>& k, const T* z, const R* r, std::int64_t V, double mixture,
                      std::vector<RowPart>& parts) {
  if (mixture == 1) {
    if (k.reverse_kl_part)
      for (std::int64_t i = 0, v = 0; v < V; ++i, v += kPart)
        parts[i] = k.reverse_kl_part(r + v, z + v, std::min(V - v, kPart));
    const KlStats s = k.reverse_kl_stats(r, z, V, parts.data());
    return {{s.ref, s.policy, s.kl}, 0};
  }
  KlStats s = kl_stats(k, z, r, V, parts);
  if (!is_jsd(mixture)) return {s, kl_for_grad(s.kl)};
  const MixtureKl kl = k.mixture_kl(z, r, V, s, mixture);
  s.kl = mixture * kl.of_policy + (1 - mixture) * kl.of_ref;
  return {s, kl.of_policy};
}

// stats.kl: Divergence::kl_for_grad.
template <class T, class R>
void grad_divergence(const RowKernels<T, R>& k, const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats,
                     const RowGrad& grad, double mixture) {
  if (mixture == 0)
    k.grad_kl(z, r, dz, V, stats, grad);
  else
    k.grad_mixture(z, r, dz, V, stats, grad, mixture);
}

// Zeros after the columns that have a gradient.
template <class T, class Args>
void write_padding(const Args& a, std::int64_t i) {
  if (a.padding) zero(row<T>(a.dz, i) + a.V, a.padding);
}

bool wants_logp(const TokenStatsFwdArgs& a, std::int64_t i) { return a.labels && a.labels[i] != a.ignore_index; }
bool wants_kl(const TokenStatsFwdArgs& a, std::int64_t i) { return a.r.data && (!a.mask || a.mask[i]); }

// z: the row's logits.
template <class T>
void write_token_stats(const TokenStatsFwdArgs& a, std::int64_t i, const KlStats& s, const auto* z,
                       double mean_of_jsd = 0) {
  auto* stats = static_cast<Acc<T>*>(a.stats);
  stats[i] = static_cast<Acc<T>>(s.policy.shift);
  stats[a.N + i] = static_cast<Acc<T>>(s.policy.logsum);
  if (a.labels) {
    const double logp = wants_logp(a, i) ? log_prob_of_label(z, a.labels[i], s.policy) : 0;
    static_cast<Acc<T>*>(a.logps)[i] = static_cast<Acc<T>>(logp);
  }
  if (a.r.data) {
    stats[2 * a.N + i] = static_cast<Acc<T>>(s.ref.shift);
    stats[3 * a.N + i] = static_cast<Acc<T>>(s.ref.logsum);
    static_cast<Acc<T>*>(a.kl)[i] = static_cast<Acc<T>>(s.kl);
    if (is_jsd(a.mixture)) stats[4 * a.N + i] = static_cast<Acc<T>>(mean_of_jsd);
  }
}

template <class T>
double row_weight(const KlLossFwdArgs& a, std::int64_t i) {
  return a.row_weight ? factor(static_cast<const Acc<T>*>(a.row_weight)[i]) : 1;
}

}  // namespace

std::int64_t parts_of_row(DType dtype, std::int64_t V) { return dtype == DType::f64 ? 1 : count_parts(V); }

void token_stats_fwd(const TokenStatsFwdArgs& a, std::int64_t begin, std::int64_t end) {
  std::vector<RowPart> parts(parts_of_row(a.z.dtype, a.V));
  dispatch_rows(a, end - begin, [&]<class T>(const auto& k, auto policy, auto reference) {
    for (std::int64_t i = begin; i < end; ++i) {
      Divergence d{};
      const bool with_kl = wants_kl(a, i), read = with_kl || wants_logp(a, i);
      const auto* z = read ? policy.read(i, 0, a.V) : nullptr;
      if (with_kl) {
        d = divergence(k, z, reference.read(i, 0, a.V), a.V, a.mixture, parts);
      } else if (read) {
        d.stats.policy = logits_stats(k, z, a.V, parts);
      }
      write_token_stats<T>(a, i, d.stats, z, d.kl_for_grad);
    }
  });
}

void token_stats_parts(const TokenStatsFwdArgs& a, RowPart* parts, std::int64_t begin, std::int64_t end) {
  dispatch(a.z.dtype, ref_dtype(a.r), 0, [&]<class T, class R>(RowKernels<T, R> k) {
    if (!k.logits_part) return;
    RowPart* part = parts + begin;
    for_each_part(a.z.dtype, a.V, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t n) {
      const T* z = row<T>(a.z, i) + first;
      if (wants_kl(a, i)) {
        *part = k.kl_part(z, row<R>(a.r, i) + first, n);
      } else if (wants_logp(a, i)) {
        *part = k.logits_part(z, n);
      }
      ++part;
    });
  });
}

void token_stats_of_parts(const TokenStatsFwdArgs& a, const RowPart* parts) {
  dispatch(a.z.dtype, ref_dtype(a.r), a.N, [&]<class T, class R>(RowKernels<T, R> k) {
    for (std::int64_t i = 0; i < a.N; ++i, parts += parts_of_row(a.z.dtype, a.V)) {
      KlStats s{};
      if (wants_kl(a, i)) {
        s = k.kl_stats(row<T>(a.z, i), row<R>(a.r, i), a.V, parts);
      } else if (wants_logp(a, i)) {
        s.policy = k.logits_stats(row<T>(a.z, i), a.V, parts);
      }
      write_token_stats<T>(a, i, s, row<T>(a.z, i));
    }
  });
}

void token_stats_bwd(const TokenStatsBwdArgs& a, std::int64_t begin, std::int64_t end) {
  dispatch_rows(a, end - begin, [&]<class T>(const auto& k, auto policy, auto reference) {
    const auto* stats = static_cast<const Acc<T>*>(a.stats);
    const auto* dlogps = static_cast<const Acc<T>*>(a.dlogps);
    const auto* dkl = static_cast<const Acc<T>*>(a.dkl);
    const auto* dlse = static_cast<const Acc<T>*>(a.dlse);
    for_each_part(a.z.dtype, a.V, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t n) {
      if (first == 0) write_padding<T>(a, i);
      // The logits of a row with upstream gradients of 0 may be NaN, so they are not read.
      const bool with_logp = dlogps && a.labels && a.labels[i] != a.ignore_index && dlogps[i] != 0;
      const bool with_kl = dkl && a.r.data && (!a.mask || a.mask[i]) && dkl[i] != 0;
      const double g_lse = dlse ? dlse[i] : 0;
      if (!with_logp && !with_kl && g_lse == 0) return zero(row<T>(a.dz, i) + first, n);
      const std::int64_t label = with_logp && a.labels[i] != kLabelElsewhere ? a.labels[i] - first : -1;
      const RowGrad grad{factor(with_logp ? dlogps[i] : 0), factor(with_kl ? dkl[i] : 0), factor(g_lse),
                         label < n ? label : -1};
      const RowStats of_policy{stats[i], stats[a.N + i]};
      const auto* z = policy.read(i, first, n);
      auto* dz = policy.gradient(a.dz, i, first);
      if (with_kl) {
        const double kl = is_jsd(a.mixture) ? stats[4 * a.N + i] : kl_for_grad(static_cast<const Acc<T>*>(a.kl)[i]);
        const KlStats of_both{of_policy, {stats[2 * a.N + i], stats[3 * a.N + i]}, kl};
        grad_divergence(k, z, reference.read(i, first, n), dz, n, of_both, grad, a.mixture);
      } else {
        k.grad_logp(z, dz, n, of_policy, grad);
      }
      policy.store(a.dz, i, first, n);
    });
  });
}

void mixture_kl(const MixtureKlArgs& a, std::int64_t begin, std::int64_t end) {
  dispatch_rows(a, end - begin, [&]<class T>(const auto& k, auto policy, auto reference) {
    const auto* stats = static_cast<const Acc<T>*>(a.stats);
    auto* kls = static_cast<Acc<T>*>(a.kls);
    for (std::int64_t i = begin; i < end; ++i) {
      MixtureKl kl{};
      if (!a.mask || a.mask[i]) {
        const KlStats s{{stats[i], stats[a.N + i]}, {stats[2 * a.N + i], stats[3 * a.N + i]}, 0};
        kl = k.mixture_kl(policy.read(i, 0, a.V), reference.read(i, 0, a.V), a.V, s, a.mixture);
      }
      kls[i] = static_cast<Acc<T>>(kl.of_policy);
      kls[a.N + i] = static_cast<Acc<T>>(kl.of_ref);
    }
  });
}

void kl_loss_fwd(const KlLossFwdArgs& a, std::int64_t begin, std::int64_t end) {
  std::vector<RowPart> parts(parts_of_row(a.z.dtype, a.V));
  dispatch_rows(a, end - begin, [&]<class T>(const auto& k, auto policy, auto reference) {
    for (std::int64_t i = begin; i < end; ++i) {
      const double weight = row_weight<T>(a, i);
      a.weighted_kl[i] = 0;
      write_padding<T>(a, i);
      if (weight == 0) {
        zero(row<T>(a.dz, i), a.V);
        continue;
      }
      const auto* z = policy.read(i, 0, a.V);
      const auto* r = reference.read(i, 0, a.V);
      Divergence d = divergence(k, z, r, a.V, a.mixture, parts);
      a.weighted_kl[i] = weight * d.stats.kl;
      d.stats.kl = d.kl_for_grad;
      grad_divergence(k, z, r, policy.gradient(a.dz, i, 0), a.V, d.stats, RowGrad{0, weight, 0, -1}, a.mixture);
      policy.store(a.dz, i, 0, a.V);
    }
  });
}

void kl_loss_parts(const KlLossFwdArgs& a, RowPart* parts, std::int64_t begin, std::int64_t end) {
  dispatch(a.z.dtype, a.r.dtype, 0, [&]<class T, class R>(RowKernels<T, R> k) {
    if (!k.kl_part) return;
    RowPart* part = parts + begin;
    for_each_part(a.z.dtype, a.V, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t n) {
      if (row_weight<T>(a, i) != 0) *part = k.kl_part(row<T>(a.z, i) + first, row<R>(a.r, i) + first, n);
      ++part;
    });
  });
}

void kl_loss_of_parts(const KlLossFwdArgs& a, const RowPart* parts, KlStats* stats) {
  dispatch(a.z.dtype, a.r.dtype, a.N, [&]<class T, class R>(RowKernels<T, R> k) {
    for (std::int64_t i = 0; i < a.N; ++i, parts += parts_of_row(a.z.dtype, a.V)) {
      const double weight = row_weight<T>(a, i);
      a.weighted_kl[i] = 0;
      if (weight == 0) continue;
      stats[i] = k.kl_stats(row<T>(a.z, i), row<R>(a.r, i), a.V, parts);
      a.weighted_kl[i] = weight * stats[i].kl;
      stats[i].kl = kl_for_grad(stats[i].kl);
    }
  });
}

void kl_loss_grad(const KlLossFwdArgs& a, const KlStats* stats, std::int64_t begin, std::int64_t end) {
  dispatch(a.z.dtype, a.r.dtype, 0, [&]<class T, class R>(RowKernels<T, R> k) {
    for_each_part(a.z.dtype, a.V, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t n) {
      const double weight = row_weight<T>(a, i);
      T* dz = row<T>(a.dz, i) + first;
      if (first == 0) write_padding<T>(a, i);
      if (weight == 0) return zero(dz, n);
      k.grad_kl(row<T>(a.z, i) + first, row<R>(a.r, i) + first, dz, n, stats[i], RowGrad{0, weight, 0, -1});
    });
  });
}

void scale(const Rows& rows, std::int64_t V, double scale, std::int64_t begin, std::int64_t end) {
  dispatch(rows.dtype, DType::f32, end - begin, [&]<class T, class R>(RowKernels<T, R> k) {
    for_each_part(rows.dtype, V, begin, end, [&](std::int64_t i, std::int64_t first, std::int64_t n) {
      k.scale(row<T>(rows, i) + first, n, factor(scale));
    });
  });
}

std::int64_t first_bad_label(const std::int64_t* labels, std::int64_t N, std::int64_t V, std::int64_t ignore_index) {
  for (std::int64_t i = 0; i < N; ++i)
    if (labels[i] != ignore_index && labels[i] != kLabelElsewhere && (labels[i] < 0 || labels[i] >= V)) return i;
  return -1;
}

}  // namespace spo::cpu
