// The row kernels over F32 vectors. Included once by each SIMD level's source file, which names the level.
//
// What made them fast, measured (two cores, AVX-512, rows beyond cache):
// - A single sweep: the shift is the maximum of the first 512 logits, and a block is redone with a larger one only when
//   its partial sum says that the shift is far below a logit (no overflow yet, but the exponent's rounding grows with
//   it). Block maxima first cost a second read from L1; online rescaling per lane costs a second exponential an
//   element. Rows of a wide spread redo blocks most: 1.6 of a part's four at randn x 40. They take shorter ones, which
//   brings the log-prob forward of randn x 40 from 1.4 to 1.2 times that of randn, and the KL's from 1.25 to 1.15
//   (bfloat16). Short blocks for every row cost 5 to 10 % of the log-prob and 10 to 14 % of the KL.
// - Four vectors a step, stage by stage (see horner). On Zen 4 a vector takes 12 half-rate operations, six on each pair
//   of pipes (multiply-add; add, vreduceps and vscalefps): 6 cycles for 16 elements at best, 7.1 to 7.6 seen. A table
//   of 32 powers with a polynomial of degree 2 moves work between the pipes but saves none: 7.8.
// - Software prefetch, of float32 into L2, 4.5 KB ahead. Against L1 and 2 KB, where misses hold the few fill buffers of
//   L1, at [4096, 32000]: log-prob forward 14 % less time, backward 11, KL forward 6, backward 16, kl_loss 9; within L3
//   as much or more. 3.5 to 6.5 KB are alike, the first lines of each page alone as bad as none. In 16-bit types
//   arithmetic is the limit: theirs is into L1, 2 KB ahead; the other way their gradients and KL lose 15 to 20 %.
// - Flush-to-zero while a kernel runs (see row_ops.cpp): probabilities below 1e-38 otherwise take a microcode assist,
//   15 to 28 times slower on rows with a wide spread.
// - Tried in kl_loss, whose limit is what it reads and writes back: the next row into L2 while the gradient finds
//   its own there (float32: 54.5 to 51.0 ms at [4096, 32000], nothing at 151936; bfloat16: 3 to 9 % slower), into L1
//   (slower everywhere), and the gradient from the row's end to its beginning (no difference).
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "row_kernels.h"
#include "row_scalar.h"
#include "simd.h"

namespace spo::cpu::SPO_SIMD_LEVEL {
namespace {

constexpr int kGroup = 4 * F32::size;  // elements a step of the inner loops takes: four independent chains
// Elements between overflow checks, where double takes over: a lane adds 64 terms by then.
constexpr std::int64_t kBlock = 64 * kGroup;
constexpr std::int64_t kKlBlock = kBlock / 2;  // of two chains a sum
constexpr std::int64_t kFirst = 512;           // elements whose maximum is the first shift
constexpr float kWide = 64.f;                  // where those differ by more, blocks are a quarter as long
constexpr float kTooLarge = 8192.f;            // a block sum beyond this: redo with a higher shift

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
  constexpr bool kOfMemory = sizeof(T) >= sizeof(float);
  const std::uintptr_t ahead = reinterpret_cast<std::uintptr_t>(p) + (kOfMemory ? 4608 : 2048);
#pragma GCC unroll 8
  for (std::uintptr_t byte = 0; byte < kGroup * sizeof(T); byte += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead + byte), 0, kOfMemory ? 2 : 3);
}

// A group of elements as four vectors, in the fastest order for their type.
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
// Two vectors of a loop over T and R, in an order that is the same for both.
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

// The maximum, or with kNegated that of -z.
template <bool kNegated = false, class T>
float block_max(const T* z, std::int64_t groups) {
  F32 m[4] = {F32(-INFINITY), F32(-INFINITY), F32(-INFINITY), F32(-INFINITY)}, x[4];
  for (std::int64_t g = 0; g < groups; ++g) {
    load_group(z + g * kGroup, x);
    for (int k = 0; k < 4; ++k) m[k] = max(m[k], kNegated ? F32() - x[k] : x[k]);
  }
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// A sum of exponentials of one part in the making: sum of exp(z - shift).
struct ExpSum {
  float shift;
  bool wide = false;  // a larger logit than the first ones' largest is likely to be far larger
  double sum = 0;

  template <class T>
  SPO_INLINE ExpSum(const T* z, std::int64_t V) {
    const std::int64_t n = V < kFirst ? V : kFirst;
    const float first = n < kGroup ? block_max(Tail<T>(z, n).data, 1) : block_max(z, n / kGroup);
    shift = first > -FLT_MAX ? first : -FLT_MAX;
    if (n == kFirst) wide = shift + block_max<true>(z, n / kGroup) > kWide;
  }
  // Raise the shift to m if it is larger; returns by how much.
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

// Partial sums of a block, with zs and rs the logits less their shifts: of exp(zs), exp(rs) and exp(zs) (zs - rs).
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
        // Where p is 0 the gap may be infinite or NaN (-inf - -inf): no term. Where it is not and r = -inf, +inf.
        gap[k] = add_weighed(e[k], diff[k], gap[k]);
      }
    }
  }
  return {reduce_add(p[0] + p[1]), reduce_add(q[0] + q[1]), reduce_add(gap[0] + gap[1])};
}

// The sums after the shifts were raised by dz and dr, which lowers zs and rs.
SPO_INLINE void raise(PartSums& sums, double dz, double dr) {
  const double scale = std::exp(-dz);
  sums.gap = sums.p == 0 || scale == 0 ? 0 : (sums.gap + sums.p * (dr - dz)) * scale;
  sums.p *= scale;
  sums.q *= std::exp(-dr);
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
      const double dz = policy.raise(block_max(zb, groups)), dr = ref.raise(block_max(rb, groups));
      raise(part.sums, dz, dr);
      raise(part.heaviest.sums, dz, dr);
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
  std::int64_t at = 0;  // the part of the heaviest stretch
  for (std::int64_t i = 0; i < count_parts(V); ++i) {
    PartSums sums = parts[i].sums, block = parts[i].heaviest.sums;
    const double dz = shift_z - parts[i].shift_z, dr = shift_r - parts[i].shift_r;
    raise(sums, dz, dr);
    raise(block, dz, dr);
    row.p += sums.p;
    row.q += sums.q;
    row.gap += sums.gap;
    if (block.p > heaviest.p) heaviest = block, at = i;
  }
  const auto& block = parts[at].heaviest;
  if ((block.shift_z != shift_z || block.shift_r != shift_r) && heaviest.p > row.p / 4 &&
      std::fabs(row.gap) < INFINITY) {
    // The gradient of a token with p near 1 is the difference of its zs - rs and the row's mean of them: both must have
    // been rounded alike, with the row's shifts. Where no stretch has a quarter of the probability, there is no such
    // token, and summing one again, which most rows of several parts would, is saved.
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
  // Before dz, which may be z, is written.
  const double at_label = grad.label >= 0 ? scalar::label_grad_logp(z, stats, grad) : 0;
  // -g_logp p = exp(z - shift) (-g_logp exp(-logsum))
  const GradExp<T> exp(static_cast<float>(-grad.g_logp * std::exp(-stats.logsum)));
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

template <class T, class R>
void grad_kl(const T* z, const R* r, T* dz, std::int64_t V, const KlStats& stats, const RowGrad& grad) {
  if (__builtin_expect(!(in_range(stats.policy) && in_range(stats.ref)), 0))
    return scalar::grad_kl(z, r, dz, V, stats, grad);
  const double at_label = grad.label >= 0 ? scalar::label_grad_kl(z, r, stats, grad) : 0;
  // With zs and rs the logits less their shifts, and mean the row's mean of zs - rs:
  // p (g_kl (log p - log q - kl) - g_logp) = exp(zs) ((zs - rs - mean) slope + rest)
  // A token with p near 1 has zs - rs near the mean. Their difference is exact; rest makes up for the mean's rounding.
  const double scale = std::exp(-stats.policy.logsum);
  const double exact_mean = stats.kl + stats.policy.logsum - stats.ref.logsum;
  const F32 mean(static_cast<float>(exact_mean));
  const F32 slope(static_cast<float>(scale * grad.g_kl));
  const F32 rest(static_cast<float>(scale * (grad.g_kl * (static_cast<float>(exact_mean) - exact_mean) - grad.g_logp)));
  const F32 sz(static_cast<float>(stats.policy.shift)), sr(static_cast<float>(stats.ref.shift));
  const GradExp<T> exp;

  const auto group = [&](const T* in, const R* ref, T* out) {
    F32 x[4], y[4];
    load_half(in, ref, x[0], x[1], y[0], y[1]);
    load_half(in + 2 * F32::size, ref + 2 * F32::size, x[2], x[3], y[2], y[3]);
    for (int k = 0; k < 4; ++k) {
      x[k] = x[k] - sz;
      y[k] = fma(x[k] - (y[k] - sr) - mean, slope, rest);
    }
    exp(x);
    for (int k = 0; k < 4; ++k) x[k] = weigh(x[k], y[k]);
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

}  // namespace

template <class T, class R>
RowKernels<T, R> kernels() {
  return {logits_part<T>, kl_part<T, R>, logits_stats<T>, kl_stats<T, R>, grad_logp<T>, grad_kl<T, R>, scale<T>};
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
