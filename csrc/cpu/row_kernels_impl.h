// The row kernels over F32 vectors. Each SIMD level's source file includes this header once and names the level.
//
// What decides the speed of rows beyond the cache (docs/lab.md has the measurements):
// - One sweep a row. The shift is the maximum of a part's first 512 logits. If a block's sum is above kTooLarge, the
//   shift is far below some logit. The block is then summed again with a larger shift, because the exponential's
//   rounding error grows with the difference (and a float overflows at 88). Rows of a wide spread repeat blocks most,
//   so their blocks are a quarter as long.
// - Four vectors a step, stage by stage (see horner).
// - Software prefetch: float32 4.5 KB ahead into L2, since misses to L1 hold its few fill buffers; 16-bit types 2 KB
//   ahead into L1, since arithmetic limits them.
// - Subnormals are flushed to zero while a kernel runs (row_ops.cpp). Otherwise a probability below 1e-38 takes a
//   microcode assist, which makes rows of a wide spread 15 to 28 times slower.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "row_kernels.h"
#include "row_scalar.h"
#include "simd.h"

namespace spo::cpu::SPO_SIMD_LEVEL {
namespace {

constexpr int kGroup = 4 * F32::size;  // elements that a step of the inner loops takes: four independent chains
// A block: elements between two overflow checks. A lane adds 64 terms in float32, then the block's sum joins a double.
constexpr std::int64_t kBlock = 64 * kGroup;
constexpr std::int64_t kKlBlock = kBlock / 2;  // the KL has two chains for each sum
constexpr std::int64_t kFirst = 512;           // a part's first shift is the maximum of its first kFirst elements
constexpr float kWide = 64.f;  // if the first kFirst elements spread further than this, blocks are a quarter as long
constexpr float kTooLarge = 8192.f;  // a block with a larger sum is summed again with a larger shift

// The exponential for gradients of type T, no more precise than T can show.
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

// The address is computed as an integer: it may lie beyond the logits, and computing such a pointer is undefined.
template <class T>
SPO_INLINE void prefetch(const T* p) {
  constexpr bool kMemoryBound = sizeof(T) >= sizeof(float);  // by arithmetic otherwise
  const std::uintptr_t ahead = reinterpret_cast<std::uintptr_t>(p) + (kMemoryBound ? 4608 : 2048);
#pragma GCC unroll 8
  for (std::uintptr_t byte = 0; byte < kGroup * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte), 0, kMemoryBound ? 2 : 3);
}

// A group as four vectors, in the fastest order for its type.
template <class T>
SPO_INLINE void load_group(const T* p, F32 (&x)[4]) {
  load2_any(p, x[0], x[1]);
  load2_any(p + 2 * F32::size, x[2], x[3]);
}
template <class T>
SPO_INLINE void store_group(T* p, const F32 (&x)[4]) {
  store2_any(p, x[0], x[1]);
  store2_any(p + 2 * F32::size, x[2], x[3]);
}
// Half a group of T and of R, in the same order for both.
template <class T, class R>
SPO_INLINE void load_half(const T* z, const R* r, F32& z0, F32& z1, F32& r0, F32& r1) {
  if constexpr (std::is_same_v<T, R>) {
    load2_any(z, z0, z1);
    load2_any(r, r0, r1);
  } else {
    load2(z, z0, z1);
    load2(r, r0, r1);
  }
}

// The last n < kGroup elements of a row, padded to a group with -inf, which adds nothing to any sum.
template <class T>
struct Tail {
  T data[kGroup];
  Tail(const T* p, std::int64_t n) {
    for (T& x : data) set_minus_infinity(x);
    std::memcpy(data, p, n * sizeof(T));
  }
};

// Calls f(elements, groups) for each block of a row, then for the padded tail.
template <class T, class F>
SPO_INLINE void for_blocks(const T* z, std::int64_t V, std::int64_t block, F f) {
  const std::int64_t whole = V / kGroup * kGroup;
  for (std::int64_t v = 0; v < whole; v += block) f(z + v, (whole - v < block ? whole - v : block) / kGroup);
  if (whole < V) f(Tail<T>(z + whole, V - whole).data, 1);
}
template <class T, class R, class F>
SPO_INLINE void for_blocks(const T* z, const R* r, std::int64_t V, std::int64_t block, F f) {
  const std::int64_t whole = V / kGroup * kGroup;
  for (std::int64_t v = 0; v < whole; v += block) f(z + v, r + v, (whole - v < block ? whole - v : block) / kGroup);
  if (whole < V) f(Tail<T>(z + whole, V - whole).data, Tail<R>(r + whole, V - whole).data, 1);
}

// The maximum of z, or of -z with kNegated.
template <bool kNegated = false, class T>
float block_max(const T* z, std::int64_t groups) {
  F32 m[4] = {F32(-INFINITY), F32(-INFINITY), F32(-INFINITY), F32(-INFINITY)}, x[4];
  for (std::int64_t g = 0; g < groups; ++g) {
    load_group(z + g * kGroup, x);
    for (int k = 0; k < 4; ++k) m[k] = max(m[k], kNegated ? F32() - x[k] : x[k]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// The running sum of exp(z - shift) over one part.
struct ExpSum {
  float shift;
  bool wide = false;  // the spread is wide: a logit above the shift is likely to be far above it
  double sum = 0;

  template <class T>
  SPO_INLINE ExpSum(const T* z, std::int64_t V) {
    const std::int64_t n = V < kFirst ? V : kFirst;
    const float first = n < kGroup ? block_max(Tail<T>(z, n).data, 1) : block_max(z, n / kGroup);
    shift = first > -FLT_MAX ? first : -FLT_MAX;
    if (n == kFirst) wide = shift + block_max<true>(z, n / kGroup) > kWide;
  }
  // Raises the shift to m if m is larger, and returns by how much.
  double raise(float m) {
    if (!(m > shift)) return 0;
    const double by = static_cast<double>(m) - shift;
    shift = m;
    sum *= std::exp(-by);
    return by;
  }
};

template <class T>
SPO_INLINE float sum_exp(const T* z, std::int64_t groups, float shift) {
  const F32 s(shift);
  const Exp<5> exp;
  F32 sum[4], x[4];
  for (std::int64_t g = 0; g < groups; ++g) {
    prefetch(z + g * kGroup);
    load_group(z + g * kGroup, x);
    for (int k = 0; k < 4; ++k) x[k] = x[k] - s;
    exp(x);
    for (int k = 0; k < 4; ++k) sum[k] = sum[k] + x[k];
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
RowPart logits_part(const T* z, std::int64_t n) {
  ExpSum s(z, n);
  for_blocks(z, n, s.wide ? kBlock / 4 : kBlock, [&](const T* block, std::int64_t groups) {
    float sum = sum_exp(block, groups, s.shift);
    if (__builtin_expect(!(sum < kTooLarge), 0)) {
      s.raise(block_max(block, groups));
      sum = sum_exp(block, groups, s.shift);
    }
    s.sum += sum;
  });
  RowPart part{};
  part.shift_z = s.shift;
  part.sums.p = s.sum;
  return part;
}

template <class T>
RowStats logits_stats(const T* z, std::int64_t V, const RowPart* parts) {
  double shift = parts[0].shift_z, sum = 0;
  for (std::int64_t i = 1; i < count_parts(V); ++i) shift = std::fmax(shift, parts[i].shift_z);
  for (std::int64_t i = 0; i < count_parts(V); ++i) sum += parts[i].sums.p * std::exp(parts[i].shift_z - shift);
  if (__builtin_expect(sum == 0, 0)) return scalar::logits_stats(z, V);
  return {shift, std::log(sum)};
}

// PartSums of one block, in float32.
struct KlBlock {
  float p, q, gap;
};

template <class T, class R>
SPO_INLINE KlBlock sum_kl(const T* z, const R* r, std::int64_t groups, float shift_z, float shift_r) {
  const F32 sz(shift_z), sr(shift_r);
  const Exp<5> exp;
  F32 p[2], q[2], gap[2];
  for (std::int64_t g = 0; g < groups; ++g) {
    prefetch(z + g * kGroup);
    prefetch(r + g * kGroup);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const std::int64_t v = g * kGroup + half * 2 * F32::size;
      F32 e[4];  // two of the policy, two of the reference
      load_half(z + v, r + v, e[0], e[1], e[2], e[3]);
      for (int k = 0; k < 2; ++k) e[k] = e[k] - sz;
      for (int k = 2; k < 4; ++k) e[k] = e[k] - sr;
      const F32 diff[2] = {e[0] - e[2], e[1] - e[3]};
      exp(e);
      for (int k = 0; k < 2; ++k) {
        p[k] = p[k] + e[k];
        q[k] = q[k] + e[k + 2];
        // If p is 0, the difference may be infinite or NaN (-inf - -inf), and adds nothing. If p > 0 and r = -inf, the
        // gap becomes +inf.
        gap[k] = add_weighed(e[k], diff[k], gap[k]);
      }
    }
  }
  return {reduce_add(p[0] + p[1]), reduce_add(q[0] + q[1]), reduce_add(gap[0] + gap[1])};
}

// Moves the sums to shifts that are larger by by_z and by_r: zs and rs become smaller by these.
SPO_INLINE void raise(PartSums& sums, double by_z, double by_r) {
  const double scale = std::exp(-by_z);
  sums.gap = sums.p == 0 || scale == 0 ? 0 : (sums.gap + sums.p * (by_r - by_z)) * scale;
  sums.p *= scale;
  sums.q *= std::exp(-by_r);
}

template <class T, class R>
RowPart kl_part(const T* z, const R* r, std::int64_t n) {
  ExpSum policy(z, n), ref(r, n);
  RowPart part{};
  const std::int64_t block = policy.wide || ref.wide ? kKlBlock / 4 : kKlBlock;
  std::int64_t begin = 0;
  for_blocks(z, r, n, block, [&](const T* zb, const R* rb, std::int64_t groups) {
    KlBlock b = sum_kl(zb, rb, groups, policy.shift, ref.shift);
    if (__builtin_expect(!(b.p < kTooLarge && b.q < kTooLarge), 0)) {
      const double by_z = policy.raise(block_max(zb, groups)), by_r = ref.raise(block_max(rb, groups));
      raise(part.sums, by_z, by_r);
      raise(part.heaviest.sums, by_z, by_r);
      b = sum_kl(zb, rb, groups, policy.shift, ref.shift);
    }
    part.sums.p += b.p;
    part.sums.q += b.q;
    part.sums.gap += b.gap;
    const std::int64_t size = groups * kGroup < n - begin ? groups * kGroup : n - begin;
    if (b.p > part.heaviest.sums.p) part.heaviest = {begin, size, {b.p, b.q, b.gap}, policy.shift, ref.shift};
    begin += size;
  });
  part.shift_z = policy.shift;
  part.shift_r = ref.shift;
  return part;
}

template <class T, class R>
KlStats kl_stats(const T* z, const R* r, std::int64_t V, const RowPart* parts) {
  double shift_z = parts[0].shift_z, shift_r = parts[0].shift_r;
  for (std::int64_t i = 1; i < count_parts(V); ++i) {
    shift_z = std::fmax(shift_z, parts[i].shift_z);
    shift_r = std::fmax(shift_r, parts[i].shift_r);
  }
  PartSums row{}, heaviest{};
  std::int64_t at = 0;  // the part that holds the heaviest block
  for (std::int64_t i = 0; i < count_parts(V); ++i) {
    PartSums sums = parts[i].sums, block = parts[i].heaviest.sums;
    const double by_z = shift_z - parts[i].shift_z, by_r = shift_r - parts[i].shift_r;
    raise(sums, by_z, by_r);
    raise(block, by_z, by_r);
    row.p += sums.p;
    row.q += sums.q;
    row.gap += sums.gap;
    if (block.p > heaviest.p) heaviest = block, at = i;
  }
  const auto& block = parts[at].heaviest;
  if ((block.shift_z != shift_z || block.shift_r != shift_r) && heaviest.p > row.p / 4 &&
      std::fabs(row.gap) < INFINITY) {
    // The gradient of a token with p near 1 is its own zs - rs less the row's mean of zs - rs. Both must be rounded
    // alike, so the block that holds this token is summed again with the row's shifts. A block with less than a quarter
    // of the probability holds no such token and is not summed again, which saves the work in most rows.
    const std::int64_t v = at * kPart + block.begin, n = block.size;
    const float sz = static_cast<float>(shift_z), sr = static_cast<float>(shift_r);
    const KlBlock b = n < kGroup ? sum_kl(Tail<T>(z + v, n).data, Tail<R>(r + v, n).data, 1, sz, sr)
                                 : sum_kl(z + v, r + v, n / kGroup, sz, sr);
    row.p += b.p - heaviest.p;
    row.q += b.q - heaviest.q;
    row.gap += b.gap - heaviest.gap;
  }
  if (__builtin_expect(row.p == 0 || row.q == 0, 0)) return scalar::kl_stats(z, r, V);
  const RowStats p{shift_z, std::log(row.p)}, q{shift_r, std::log(row.q)};
  return {p, q, row.gap / row.p - p.logsum + q.logsum};
}

// Whether a row has finite statistics. The gradient of other rows runs in `scalar`.
SPO_INLINE bool in_range(const RowStats& s) { return std::fabs(s.shift) <= FLT_MAX && std::fabs(s.logsum) < 40; }

// Calls f(in, out, groups) for the whole groups of a row, then for its tail in a padded buffer.
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
  // This comes first, since dz may be z.
  const double at_label = grad.label >= 0 ? scalar::label_grad_logp(z, stats, grad) : 0;
  // (g_lse - g_logp) p = exp(z - shift) ((g_lse - g_logp) exp(-logsum))
  const GradExp<T> exp(static_cast<float>((grad.g_lse - grad.g_logp) * std::exp(-stats.logsum)));
  const F32 shift(static_cast<float>(stats.shift));
  for_grad_blocks(z, dz, V, [&](const T* in, T* out, std::int64_t groups) {
    F32 x[4];
    for (std::int64_t g = 0; g < groups; ++g) {
      prefetch(in + g * kGroup);
      load_group(in + g * kGroup, x);
      for (int k = 0; k < 4; ++k) x[k] = x[k] - shift;
      exp(x);
      store_group(out + g * kGroup, x);
    }
  });
  if (grad.label >= 0) from_double(at_label, dz[grad.label]);
}

// Calls gradients(x, y) for the logits x of a group and the reference logits y, which makes x their gradient.
template <class T, class R, class F>
SPO_INLINE void for_kl_grad_groups(const T* z, const R* r, T* dz, std::int64_t V, F gradients) {
  const auto group = [&](const T* in, const R* ref, T* out) {
    F32 x[4], y[4];
    load_half(in, ref, x[0], x[1], y[0], y[1]);
    load_half(in + 2 * F32::size, ref + 2 * F32::size, x[2], x[3], y[2], y[3]);
    gradients(x, y);
    if constexpr (std::is_same_v<T, R>) {
      store_group(out, x);
    } else {
      store2(out, x[0], x[1]);
      store2(out + 2 * F32::size, x[2], x[3]);
    }
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
}

template <class T, class R>
void grad_kl(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad) {
  if (__builtin_expect(!(in_range(stats.policy) && in_range(stats.ref)), 0))
    return scalar::grad_kl(z, r, dz, V, stats, grad);
  const double at_label = grad.label >= 0 ? scalar::label_grad_kl(z, r, stats, grad) : 0;
  // zs and rs are the logits less their shifts, mean is the row's mean of zs - rs:
  // p (g_kl (log p - log q - kl) + g_lse - g_logp) = exp(zs) ((zs - rs - mean) slope + rest)
  // For a token with p near 1, zs - rs is near the mean, so the difference is exact. rest corrects the mean's rounding.
  const double scale = std::exp(-stats.policy.logsum);
  const double exact_mean = stats.kl + stats.policy.logsum - stats.ref.logsum;
  const F32 mean(static_cast<float>(exact_mean));
  const F32 slope(static_cast<float>(scale * grad.g_kl));
  const double mean_error = static_cast<float>(exact_mean) - exact_mean;
  const F32 rest(static_cast<float>(scale * (grad.g_kl * mean_error + (grad.g_lse - grad.g_logp))));
  const F32 sz(static_cast<float>(stats.policy.shift)), sr(static_cast<float>(stats.ref.shift));
  const GradExp<T> exp;

  for_kl_grad_groups(z, r, dz, V, [&](F32(&x)[4], F32(&y)[4]) __attribute__((always_inline)) {
    for (int k = 0; k < 4; ++k) {
      x[k] = x[k] - sz;
      y[k] = fma(x[k] - (y[k] - sr) - mean, slope, rest);
    }
    exp(x);
    for (int k = 0; k < 4; ++k) x[k] = weigh(x[k], y[k]);
  });
  if (grad.label >= 0) from_double(at_label, dz[grad.label]);
}

// scalar::log_shares of vectors.
struct LogShares {
  F32 mixture, rest;
  const Exp<6, true> exp;

  explicit LogShares(double mixture)
      : mixture(static_cast<float>(mixture)), rest(static_cast<float>(1 - mixture)), exp() {}

  template <int n>
  SPO_INLINE void operator()(const F32 (&gap)[n], F32 (&of_policy)[n], F32 (&of_ref)[n]) const {
    F32 far[n];
    for (int k = 0; k < n; ++k) far[k] = F32() - max(gap[k], F32() - gap[k]);
    exp(far);
    for (int k = 0; k < n; ++k) {
      const F32 sum = where_less(gap[k], F32(), fma(mixture, far[k], rest), fma(rest, far[k], mixture));
      const F32 log_sum = log(sum);
      of_policy[k] = where_less(gap[k], F32(), gap[k], F32()) - log_sum;
      of_ref[k] = where_less(F32(), gap[k], F32() - gap[k], F32()) - log_sum;
    }
  }
};

template <class T, class R>
MixtureKl mixture_kl(const T* z, const R* r, std::int64_t V, const KlStats& stats, double mixture) {
  if (__builtin_expect(!(in_range(stats.policy) && in_range(stats.ref)), 0))
    return scalar::mixture_kl(z, r, V, stats, mixture);
  const F32 sz(static_cast<float>(stats.policy.shift)), sr(static_cast<float>(stats.ref.shift));
  const F32 logsums(static_cast<float>(stats.policy.logsum - stats.ref.logsum));
  const LogShares shares_of(mixture);
  const Exp<5> exp;
  MixtureKl kl{};
  for_blocks(z, r, V, kKlBlock / 2, [&](const T* zb, const R* rb, std::int64_t groups) {
    F32 of_policy[4], of_ref[4];
    for (std::int64_t v = 0; v < groups * kGroup; v += kGroup) {
      F32 x[4], y[4], gap[4], policy[4], ref[4];
      load_half(zb + v, rb + v, x[0], x[1], y[0], y[1]);
      load_half(zb + v + 2 * F32::size, rb + v + 2 * F32::size, x[2], x[3], y[2], y[3]);
      for (int k = 0; k < 4; ++k) {
        x[k] = x[k] - sz;
        y[k] = y[k] - sr;
        gap[k] = (x[k] - y[k]) - logsums;
      }
      shares_of(gap, policy, ref);
      exp(x);
      exp(y);
      for (int k = 0; k < 4; ++k) {
        of_policy[k] = add_weighed(x[k], policy[k], of_policy[k]);
        of_ref[k] = add_weighed(y[k], ref[k], of_ref[k]);
      }
    }
    kl.of_policy += reduce_add((of_policy[0] + of_policy[1]) + (of_policy[2] + of_policy[3]));
    kl.of_ref += reduce_add((of_ref[0] + of_ref[1]) + (of_ref[2] + of_ref[3]));
  });
  return {kl.of_policy * std::exp(-stats.policy.logsum), kl.of_ref * std::exp(-stats.ref.logsum)};
}

template <class T, class R>
void grad_mixture(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad,
                  double mixture) {
  if (__builtin_expect(!(in_range(stats.policy) && in_range(stats.ref)), 0))
    return scalar::grad_mixture(z, r, dz, V, stats, grad, mixture);
  const double at_label =
      grad.label >= 0 ? scalar::grad_mixture_of(z[grad.label], r[grad.label], true, stats, grad, mixture) : 0;
  const F32 sz(static_cast<float>(stats.policy.shift)), sr(static_cast<float>(stats.ref.shift));
  const F32 logsums(static_cast<float>(stats.policy.logsum - stats.ref.logsum));
  const double scale = std::exp(-stats.policy.logsum), others = scale * (grad.g_lse - grad.g_logp);
  const bool reverse = mixture == 1;
  // The reverse KL: e^zs by_p + e^rs by_q. For equal logits the two terms are exact opposites.
  const Exp<6, true> exp;
  const F32 by_p(static_cast<float>(others + scale * grad.g_kl));
  const F32 by_q(static_cast<float>(-grad.g_kl * std::exp(-stats.ref.logsum)));
  // The JSD: e^zs ((log(p / m) - KL(p || m)) slope + rest).
  const F32 slope(static_cast<float>(scale * grad.g_kl * mixture)), rest(static_cast<float>(others));
  const F32 mean(static_cast<float>(stats.kl));
  const LogShares shares_of(mixture);

  for_kl_grad_groups(z, r, dz, V, [&](F32(&x)[4], F32(&y)[4]) __attribute__((always_inline)) {
    for (int k = 0; k < 4; ++k) x[k] = x[k] - sz, y[k] = y[k] - sr;
    if (reverse) {
      exp(x);
      exp(y);
      for (int k = 0; k < 4; ++k) x[k] = weigh(x[k], by_p) + weigh(y[k], by_q);
    } else {
      F32 policy[4], ref[4];
      for (int k = 0; k < 4; ++k) y[k] = (x[k] - y[k]) - logsums;
      shares_of(y, policy, ref);
      exp(x);
      for (int k = 0; k < 4; ++k) x[k] = weigh(x[k], fma(policy[k] - mean, slope, rest));
    }
  });
  if (grad.label >= 0) from_double(at_label, dz[grad.label]);
}

template <class T>
void scale(T* x, std::int64_t n, double scale) {
  const F32 f(static_cast<float>(scale));
  for_grad_blocks(x, x, n, [&](const T* in, T* out, std::int64_t groups) {
    F32 v[4];
    for (std::int64_t g = 0; g < groups; ++g) {
      load_group(in + g * kGroup, v);
      for (int k = 0; k < 4; ++k) v[k] = v[k] * f;
      store_group(out + g * kGroup, v);
    }
  });
}

// tanh(u), and its derivative 1 - tanh(u)^2. Error: at most 2 ulp each.
SPO_INLINE void tanh_and_slope(const F32 (&u)[2], F32 (&tanh)[2], F32 (&slope)[2]) {
  const Exp<6, true> exp;
  F32 size[2], s[2];
  for (int k = 0; k < 2; ++k) {
    size[k] = max(F32() - u[k], u[k]);
    s[k] = F32(-2.f) * size[k];
  }
  exp(s);
  for (int k = 0; k < 2; ++k) {
    const F32 one_plus = F32(1.f) + s[k], far = (F32(1.f) - s[k]) / one_plus;
    slope[k] = F32(4.f) * s[k] / (one_plus * one_plus);
    // Near 0 the difference above cancels.
    const F32 t = size[k] * size[k];
    F32 p = fma(F32(0.017241081f), t, F32(-0.05304474f));
    p = fma(p, t, F32(0.13325787f));
    p = fma(p, t, F32(-0.33333144f));
    const F32 near = fma(size[k] * t, p, size[k]);
    tanh[k] = where_less(size[k], F32(0.5f), near, far);
    tanh[k] = where_less(u[k], F32(), F32() - tanh[k], tanh[k]);
  }
}

constexpr int kPair = 2 * F32::size;

// Calls f(x, y, out) for pairs of vectors of a row, and for the tail in padded buffers.
template <class X, class Y, class Z, class F>
SPO_INLINE void for_pairs(const X* x, const Y* y, Z* out, std::int64_t n, F f) {
  const std::int64_t whole = n / kPair * kPair;
  for (std::int64_t v = 0; v < whole; v += kPair) f(x + v, y + v, out + v);
  if (whole == n) return;
  X last_x[kPair]{};
  Y last_y[kPair]{};
  Z last_out[kPair];
  std::memcpy(last_x, x + whole, (n - whole) * sizeof(X));
  std::memcpy(last_y, y + whole, (n - whole) * sizeof(Y));
  f(last_x, last_y, last_out);
  std::memcpy(out + whole, last_out, (n - whole) * sizeof(Z));
}

template <class T>
void transform(const T* x, float* z, std::int64_t n, const Factors& factors) {
  const F32 a(static_cast<float>(factors.a)), b(static_cast<float>(factors.b));
  for_pairs(x, x, z, n, [&](const T* in, const T*, float* out) {
    F32 u[2], slope[2];
    load2(in, u[0], u[1]);
    for (F32& k : u) k = k * a;
    if (factors.capped) {
      tanh_and_slope({u[0], u[1]}, u, slope);
      for (F32& k : u) k = k * b;
    }
    store2(out, u[0], u[1]);
  });
}

template <class T>
void transform_grad(const T* x, const float* dz, T* dx, std::int64_t n, const Factors& factors) {
  const F32 a(static_cast<float>(factors.a)), ab(static_cast<float>(factors.a * factors.b));
  for_pairs(x, dz, dx, n, [&](const T* in, const float* upstream, T* out) {
    F32 g[2];
    load2(upstream, g[0], g[1]);
    if (factors.capped) {
      F32 u[2], tanh[2], slope[2];
      load2(in, u[0], u[1]);
      for (F32& k : u) k = k * a;
      tanh_and_slope(u, tanh, slope);
      for (int k = 0; k < 2; ++k) g[k] = g[k] * slope[k];
    }
    store2(out, g[0] * ab, g[1] * ab);
  });
}

}  // namespace

template <class T, class R>
RowKernels<T, R> kernels() {
  return {.logits_part = logits_part<T>,
          .kl_part = kl_part<T, R>,
          .logits_stats = logits_stats<T>,
          .kl_stats = kl_stats<T, R>,
          .grad_logp = grad_logp<T>,
          .grad_kl = grad_kl<T, R>,
          .reverse_kl_part = kl_part<R, T>,
          .reverse_kl_stats = kl_stats<R, T>,
          .mixture_kl = mixture_kl<T, R>,
          .grad_mixture = grad_mixture<T, R>,
          .scale = scale<T>,
          .transform = transform<T>,
          .transform_ref = transform<R>,
          .transform_grad = transform_grad<T>};
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
