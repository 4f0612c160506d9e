// The row kernels over F32 vectors. Included once by each SIMD level's source file, which names the level.
//
// What made them fast, measured (two cores, AVX-512, rows beyond cache):
// - A single sweep: the shift is the maximum of the first 512 logits, and a block is redone with a larger one only when
//   its partial sum says that the shift is far below a logit (no overflow yet, but the exponent's rounding grows with
//   it). Block maxima first cost a second read from L1; online rescaling per lane costs a second exponential an
//   element.
// - Software prefetch of the stream some KB ahead.
// - Flush-to-zero while a kernel runs (see row_ops.cpp): probabilities below 1e-38 otherwise take a microcode assist
// each,
//   15 to 28 times slower on rows with a wide spread.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "row_kernels.h"
#include "row_scalar.h"
#include "simd.h"

namespace spo::cpu::SPO_SIMD_LEVEL {
namespace {

constexpr int kGroup = 4 * F32::size;         // elements a step of the inner loops takes: four independent chains
constexpr std::int64_t kBlock = 64 * kGroup;  // between overflow checks: a lane adds 64 terms before double takes over
constexpr std::int64_t kFirst = 512;          // elements whose maximum is the first shift
constexpr float kTooLarge = 8192.f;           // a block sum beyond this: redo with a higher shift
constexpr std::int64_t kPrefetch = 4096;      // bytes ahead

// The exponential of gradients: as precise as their type can show.
template <class T>
struct GradExpOf {
  using type = Exp<5>;
};
template <>
struct GradExpOf<float> {
  using type = Exp<6, true>;
};
template <>
struct GradExpOf<bf16> {
  using type = Exp<4>;
};
template <class T>
using GradExp = typename GradExpOf<T>::type;

template <class T>
SPO_INLINE void prefetch(
    const T* p) {  // as an integer: the address may lie beyond the logits, which is fine to prefetch
  const std::uintptr_t ahead = reinterpret_cast<std::uintptr_t>(p) + kPrefetch;
#pragma GCC unroll 8
  for (std::uintptr_t byte = 0; byte < kGroup * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte), 0, 3);
}

// A group of elements as four vectors.
template <class T>
SPO_INLINE void load_group(const T* p, F32 (&x)[4]) {
  load2(p, x[0], x[1]);
  load2(p + 2 * F32::size, x[2], x[3]);
}
template <class T>
SPO_INLINE void store_group(T* p, const F32 (&x)[4]) {
  store2(p, x[0], x[1]);
  store2(p + 2 * F32::size, x[2], x[3]);
}

// The last V % kGroup elements of a row, padded to a group with -inf: probability 0, adding nothing anywhere.
template <class T>
struct Tail {
  T data[kGroup];
  Tail(const T* p, std::int64_t n) {
    for (T& x : data) set_minus_infinity(x);
    std::memcpy(data, p, n * sizeof(T));
  }
};

// f(elements, groups) over a row, a block at a time, the padded tail last.
template <class T, class F>
SPO_INLINE void for_blocks(const T* z, std::int64_t V, F f) {
  const std::int64_t whole = V / kGroup * kGroup;
  for (std::int64_t v = 0; v < whole; v += kBlock) f(z + v, (whole - v < kBlock ? whole - v : kBlock) / kGroup);
  if (whole < V) f(Tail<T>(z + whole, V - whole).data, 1);
}
template <class T, class R, class F>
SPO_INLINE void for_blocks(const T* z, const R* r, std::int64_t V, F f) {
  const std::int64_t whole = V / kGroup * kGroup;
  for (std::int64_t v = 0; v < whole; v += kBlock) f(z + v, r + v, (whole - v < kBlock ? whole - v : kBlock) / kGroup);
  if (whole < V) f(Tail<T>(z + whole, V - whole).data, Tail<R>(r + whole, V - whole).data, 1);
}

template <class T>
float block_max(const T* z, std::int64_t groups) {
  F32 m[4] = {F32(-INFINITY), F32(-INFINITY), F32(-INFINITY), F32(-INFINITY)}, x[4];
  for (std::int64_t g = 0; g < groups; ++g) {
    load_group(z + g * kGroup, x);
    for (int k = 0; k < 4; ++k) m[k] = max(m[k], x[k]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// A sum of exponentials of one row in the making: sum of exp(z - shift).
struct ExpSum {
  float shift;
  double sum = 0;

  template <class T>
  SPO_INLINE ExpSum(const T* z, std::int64_t V) {
    const std::int64_t n = V < kFirst ? V : kFirst;
    const float first = n < kGroup ? block_max(Tail<T>(z, n).data, 1) : block_max(z, n / kGroup);
    shift = first > -FLT_MAX ? first : -FLT_MAX;
  }
  // Raise the shift to m if it is larger; returns by how much.
  double raise(float m) {
    if (!(m > shift)) return 0;
    const double by = static_cast<double>(m) - shift;
    shift = m;
    sum *= std::exp(-by);
    return by;
  }
  RowStats stats() const { return {shift, std::log(sum)}; }
};

template <class T>
SPO_INLINE float sum_exp(const T* z, std::int64_t groups, float shift) {
  const F32 s(shift);
  const Exp<5> exp;
  F32 sum[4], x[4];
  for (std::int64_t g = 0; g < groups; ++g) {
    prefetch(z + g * kGroup);
    load_group(z + g * kGroup, x);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[k] = sum[k] + exp(x[k] - s);
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
RowStats logits_stats(const T* z, std::int64_t V) {
  ExpSum s(z, V);
  for_blocks(z, V, [&](const T* block, std::int64_t groups) {
    float sum = sum_exp(block, groups, s.shift);
    if (__builtin_expect(!(sum < kTooLarge), 0)) {
      s.raise(block_max(block, groups));
      sum = sum_exp(block, groups, s.shift);
    }
    s.sum += sum;
  });
  if (__builtin_expect(s.sum == 0, 0)) return scalar::logits_stats(z, V);
  return s.stats();
}

// Partial sums of a block, with zs and rs the logits less their shifts: of exp(zs), exp(rs) and exp(zs) (zs - rs).
struct KlBlock {
  float p, q, gap;
};

template <class T, class R>
SPO_INLINE KlBlock sum_kl(const T* z, const R* r, std::int64_t groups, float shift_z, float shift_r) {
  const F32 sz(shift_z), sr(shift_r);
  const Exp<5> exp;
  F32 p[4], q[4], gap[4], x[4], y[4];
  for (std::int64_t g = 0; g < groups; ++g) {
    prefetch(z + g * kGroup);
    prefetch(r + g * kGroup);
    load_group(z + g * kGroup, x);
    load_group(r + g * kGroup, y);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const F32 zs = x[k] - sz, rs = y[k] - sr, w = exp(zs);
      p[k] = p[k] + w;
      q[k] = q[k] + exp(rs);
      // Where p is 0 the gap may be infinite or NaN (-inf - -inf): no term. Where it is not and r = -inf, +inf.
      gap[k] = fma(w, where_nonzero(w, zs - rs), gap[k]);
    }
  }
  return {reduce_add((p[0] + p[1]) + (p[2] + p[3])), reduce_add((q[0] + q[1]) + (q[2] + q[3])),
          reduce_add((gap[0] + gap[1]) + (gap[2] + gap[3]))};
}

template <class T, class R>
KlStats kl_stats(const T* z, const R* r, std::int64_t V) {
  ExpSum p(z, V), q(r, V);
  double gap = 0;
  for_blocks(z, r, V, [&](const T* zb, const R* rb, std::int64_t groups) {
    KlBlock b = sum_kl(zb, rb, groups, p.shift, q.shift);
    if (__builtin_expect(!(b.p < kTooLarge && b.q < kTooLarge), 0)) {
      // gap is a sum of exp(zs) (zs - rs): raising a shift lowers zs or rs.
      const double sum = p.sum, dz = p.raise(block_max(zb, groups)), dr = q.raise(block_max(rb, groups));
      gap = sum == 0 ? 0 : (gap + sum * (dr - dz)) * std::exp(-dz);
      b = sum_kl(zb, rb, groups, p.shift, q.shift);
    }
    p.sum += b.p;
    q.sum += b.q;
    gap += b.gap;
  });
  if (__builtin_expect(p.sum == 0 || q.sum == 0, 0)) return scalar::kl_stats(z, r, V);
  const RowStats policy = p.stats(), ref = q.stats();
  return {policy, ref, gap / p.sum - policy.logsum + ref.logsum};
}

// Otherwise the row was not finite, or belongs to `scalar` in the forward too.
SPO_INLINE bool in_range(const RowStats& s) { return std::fabs(s.shift) <= FLT_MAX && std::fabs(s.logsum) < 40; }

// f(in, out, groups) over a row; the tail passes through a padded buffer.
template <class T, class F>
SPO_INLINE void for_grad_blocks(const T* z, T* dz, std::int64_t V, F f) {
  const std::int64_t whole = V / kGroup * kGroup;
  f(z, dz, whole / kGroup);
  if (whole < V) {
    Tail<T> tail(z + whole, V - whole);
    f(tail.data, tail.data, 1);
    std::memcpy(dz + whole, tail.data, (V - whole) * sizeof(T));
  }
}

template <class T>
void grad_logp(const T* z, T* dz, std::int64_t V, const RowStats& stats, const RowGrad& grad) {
  if (__builtin_expect(!in_range(stats), 0)) return scalar::grad_logp(z, dz, V, stats, grad);
  const double at_label = scalar::label_grad_logp(z, stats, grad);  // before dz, which may be z, is written
  // -g_logp p = exp(z - shift) (-g_logp exp(-logsum))
  const GradExp<T> exp(static_cast<float>(-grad.g_logp * std::exp(-stats.logsum)));
  const F32 shift(static_cast<float>(stats.shift));
  for_grad_blocks(z, dz, V, [&](const T* in, T* out, std::int64_t groups) {
    F32 x[4];
    for (std::int64_t g = 0; g < groups; ++g) {
      prefetch(in + g * kGroup);
      load_group(in + g * kGroup, x);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) x[k] = exp(x[k] - shift);
      store_group(out + g * kGroup, x);
    }
  });
  from_double(at_label, dz[grad.label]);
}

template <class T, class R>
void grad_kl(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad) {
  if (__builtin_expect(!(in_range(stats.policy) && in_range(stats.ref)), 0))
    return scalar::grad_kl(z, r, dz, V, stats, grad);
  const double at_label = grad.label >= 0 ? scalar::label_grad_kl(z, r, stats, grad) : 0;
  // With zs and rs the logits less their shifts:
  // p (g_kl (log p - log q - kl) - g_logp) = exp(zs) ((zs - rs) slope + constant)
  const double scale = std::exp(-stats.policy.logsum);
  const double gap = stats.ref.logsum - stats.policy.logsum;
  const F32 slope(static_cast<float>(scale * grad.g_kl));
  const F32 constant(static_cast<float>(scale * (grad.g_kl * (gap - stats.kl) - grad.g_logp)));
  const F32 sz(static_cast<float>(stats.policy.shift)), sr(static_cast<float>(stats.ref.shift));
  const GradExp<T> exp;

  const auto group = [&](const T* in, const R* ref, T* out) {
    F32 x[4], y[4];
    load_group(in, x);
    load_group(ref, y);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const F32 zs = x[k] - sz, rs = y[k] - sr, p = exp(zs);
      x[k] = where_nonzero(p, p * fma(zs - rs, slope, constant));
    }
    store_group(out, x);
  };
  const std::int64_t whole = V / kGroup * kGroup;
  for (std::int64_t v = 0; v < whole; v += kGroup) {
    prefetch(z + v);
    prefetch(r + v);
    group(z + v, r + v, dz + v);
  }
  if (whole < V) {
    Tail<T> tail(z + whole, V - whole);
    group(tail.data, Tail<R>(r + whole, V - whole).data, tail.data);
    std::memcpy(dz + whole, tail.data, (V - whole) * sizeof(T));
  }
  if (grad.label >= 0) from_double(at_label, dz[grad.label]);
}

template <class T>
void scale(T* x, std::int64_t n, double factor) {
  const F32 f(static_cast<float>(factor));
  for_grad_blocks(x, x, n, [&](const T* in, T* out, std::int64_t groups) {
    F32 v[4];
    for (std::int64_t g = 0; g < groups; ++g) {
      load_group(in + g * kGroup, v);
      for (int k = 0; k < 4; ++k) v[k] = v[k] * f;
      store_group(out + g * kGroup, v);
    }
  });
}

}  // namespace

template <class T, class R>
RowKernels<T, R> kernels() {
  return {logits_stats<T>, kl_stats<T, R>, grad_logp<T>, grad_kl<T, R>, scale<T>};
}

template RowKernels<float, float> kernels();
template RowKernels<float, bf16> kernels();
template RowKernels<float, f16> kernels();
template RowKernels<bf16, float> kernels();
template RowKernels<bf16, bf16> kernels();
template RowKernels<bf16, f16> kernels();
template RowKernels<f16, float> kernels();
template RowKernels<f16, bf16> kernels();
template RowKernels<f16, f16> kernels();

}  // namespace spo::cpu::SPO_SIMD_LEVEL
