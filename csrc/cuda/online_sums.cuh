// Sums of exponentials relative to a running maximum: over a thread's packets, then over all threads of a row. The
// row's statistics come from the row's sums.
#pragma once

#include <cfloat>

#include "row_reader.cuh"

namespace spo::cuda {

constexpr float kLog2e = 1.44269504088896340736f;

template <class A>
struct PairOf {
  using type = float2;
};
template <>
struct PairOf<double> {
  using type = double2;
};
template <class A>
using Pair = typename PairOf<A>::type;

SPO_DEVICE double2 add2(double2 a, double2 b) { return {a.x + b.x, a.y + b.y}; }
SPO_DEVICE double2 mul2(double2 a, double2 b) { return {a.x * b.x, a.y * b.y}; }
SPO_DEVICE double2 fma2(double2 a, double2 b, double2 c) { return {fma(a.x, b.x, c.x), fma(a.y, b.y, c.y)}; }

// 2^x for -inf <= x <= 0 without the special function unit, which is the bottleneck. x = n + f: a polynomial
// computes 2^f (its relative error is 1.7e-7, and it is 1 at 0), and n becomes the exponent. Results below 2^-126
// become 2^-126.
SPO_DEVICE float2 exp2_polynomial(float2 x) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float2 clamped{fmaxf(x.x, -126.f), fmaxf(x.y, -126.f)};
  const float2 z = add2(clamped, {kRound, kRound}), n = add2(z, {-kRound, -kRound});
  const float2 f = fma2(n, {-1.f, -1.f}, clamped);
  constexpr float c[] = {1.f, 0.69314697f, 0.24022242f, 0.05550733f, 0.00967141f, 0.00132642f};
  float2 p{c[5], c[5]};
#pragma unroll
  for (int i = 4; i >= 0; --i) p = fma2(p, f, {c[i], c[i]});
  return mul2(p, {__uint_as_float((__float_as_uint(z.x) << 23) + 0x3f800000u),
                  __uint_as_float((__float_as_uint(z.y) << 23) + 0x3f800000u)});
}

// e^x of a pair of logits less their maximum. `pair` is its position among the pairs that are summed together.
SPO_DEVICE float2 weights(float2 x, int pair) {
  const float2 scaled = mul2(x, {kLog2e, kLog2e});
  if (SPO_POLYNOMIAL_EXP && pair % 4 == 3) return exp2_polynomial(scaled);
  return {exp2_approx(scaled.x), exp2_approx(scaled.y)};
}
SPO_DEVICE double2 weights(double2 x, int) { return {exp(x.x), exp(x.y)}; }

// e^x that is exactly 0 if x is -inf, for merging sums and for padding.
SPO_DEVICE float weight(float x) { return exp2_approx(x * kLog2e); }
SPO_DEVICE double weight(double x) { return exp(x); }

SPO_DEVICE float log_of(float x) { return logf(x); }
SPO_DEVICE double log_of(double x) { return log(x); }

SPO_DEVICE double max_nan(double a, double b) { return a > b || a != a ? a : b; }

template <class A>
constexpr A kLowest = sizeof(A) == 8 ? static_cast<A>(-DBL_MAX) : static_cast<A>(-FLT_MAX);

template <class A, int n>
SPO_DEVICE A highest(const A (&x)[n]) {
  A high = x[0];
#pragma unroll
  for (int k = 1; k < n; ++k) high = max_nan(high, x[k]);
  return high;
}

// Sum of exp(z - top) over some elements of a row. `top` starts at the lowest finite number, so z - top is -inf, not
// NaN, if z is -inf.
template <class A>
struct ExpSum {
  A top, sum;

  static SPO_DEVICE ExpSum empty() { return {kLowest<A>, 0}; }

  template <int n>
  SPO_DEVICE void add(const A (&z)[n]) {
    const A high = highest(z);
    if (!(high <= top)) {
      sum *= weight(top - high);
      top = high;
    }
    Pair<A> sums{0, 0};
#pragma unroll
    for (int k = 0; k < n; k += 2) {
      const Pair<A> zs = add2(Pair<A>{z[k], z[k + 1]}, Pair<A>{-top, -top});
      sums = add2(sums, weights(zs, k / 2));
    }
    sum += sums.x + sums.y;
  }

  SPO_DEVICE void merge(const ExpSum& other) {
    const A high = max_nan(top, other.top);
    sum = sum * weight(top - high) + other.sum * weight(other.top - high);
    top = high;
  }

  // The sum over a whole row: at least 1 if some element is finite. If all are -inf the sum is tiny but not 0, because
  // exp2_polynomial clamps to 2^-126; report 0.
  SPO_DEVICE A total() const { return sum < A(0.5) ? A(0) : sum; }
};

// ExpSum of policy and reference, and gap: the sum of exp(zs) (zs - rs), where zs and rs are the logits less their
// tops.
template <class A>
struct KlSum {
  ExpSum<A> z, r;
  A gap;

  static SPO_DEVICE KlSum empty() { return {ExpSum<A>::empty(), ExpSum<A>::empty(), 0}; }

  // If the policy's sum becomes 0, so does the gap, even where a top moves by infinity.
  SPO_DEVICE void move(A z_top, A r_top) {
    const A by_z = z_top - z.top, by_r = r_top - r.top, keep = weight(-by_z);
    gap = z.sum * keep == 0 ? 0 : keep * (gap + z.sum * (by_r - by_z));
    z = {z_top, z.sum * keep};
    r = {r_top, r.sum * weight(-by_r)};
  }

  // An infinite logit makes the gap infinite or NaN; sum_rows then computes the gap again, with gap_of_positive.
  // padded: both packets end in -inf.
  template <bool padded, int n>
  SPO_DEVICE void add(const A (&zx)[n], const A (&rx)[n]) {
    const A z_high = highest(zx), r_high = highest(rx);
    if (!(z_high <= z.top) || !(r_high <= r.top)) move(max_nan(z.top, z_high), max_nan(r.top, r_high));
    Pair<A> p_sums{0, 0}, q_sums{0, 0}, gaps{0, 0};
#pragma unroll
    for (int k = 0; k < n; k += 2) {
      const Pair<A> zs = add2(Pair<A>{zx[k], zx[k + 1]}, Pair<A>{-z.top, -z.top});
      const Pair<A> rs = add2(Pair<A>{rx[k], rx[k + 1]}, Pair<A>{-r.top, -r.top});
      const Pair<A> p = weights(zs, k / 2);
      p_sums = add2(p_sums, p);
      q_sums = add2(q_sums, weights(rs, k / 2));
      Pair<A> gap_of_pair = fma2(rs, Pair<A>{-1, -1}, zs);
      if constexpr (padded) {
        if (weight(zs.x) == 0) gap_of_pair.x = 0;
        if (weight(zs.y) == 0) gap_of_pair.y = 0;
      }
      gaps = fma2(p, gap_of_pair, gaps);
    }
    z.sum += p_sums.x + p_sums.y;
    r.sum += q_sums.x + q_sums.y;
    gap += gaps.x + gaps.y;
  }

  // The gap that one element adds: 0 if p = 0, +inf if r = -inf and p > 0.
  SPO_DEVICE A gap_of_positive(A zx, A rx) const {
    const A zs = zx - z.top, p = weight(zs);
    return p == 0 ? A(0) : p * (zs - (rx - r.top));
  }

  SPO_DEVICE void merge(KlSum other) {
    const A z_top = max_nan(z.top, other.z.top), r_top = max_nan(r.top, other.r.top);
    move(z_top, r_top);
    other.move(z_top, r_top);
    z.sum += other.z.sum;
    r.sum += other.r.sum;
    gap += other.gap;
  }
};

template <class A>
SPO_DEVICE ExpSum<A> shuffle_xor(const ExpSum<A>& s, int lanes) {
  return {__shfl_xor_sync(0xffffffffu, s.top, lanes), __shfl_xor_sync(0xffffffffu, s.sum, lanes)};
}
template <class A>
SPO_DEVICE KlSum<A> shuffle_xor(const KlSum<A>& s, int lanes) {
  return {shuffle_xor(s.z, lanes), shuffle_xor(s.r, lanes), __shfl_xor_sync(0xffffffffu, s.gap, lanes)};
}

// Merges the sums of a row's threads; every thread gets the result. With kThreads a row, a kernel may call it only
// once: a second call could overwrite sums that other threads still read.
template <int threads_per_row, class Sum>
SPO_DEVICE Sum merge_threads(Sum sum) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sum.merge(shuffle_xor(sum, lanes));
  if constexpr (threads_per_row > kWarp) {
    constexpr int kWarps = threads_per_row / kWarp;
    __shared__ Sum of_warp[kWarps];
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sum;
    __syncthreads();
    sum = of_warp[0];
    for (int w = 1; w < kWarps; ++w) sum.merge(of_warp[w]);
  }
  return sum;
}

// The log-sum-exp of a row is shift + logsum, as in csrc/cpu/row_kernels.h.
template <class A>
struct RowStats {
  A shift, logsum;

  SPO_DEVICE RowStats(A shift, A logsum) : shift(shift), logsum(logsum) {}
  SPO_DEVICE explicit RowStats(const ExpSum<A>& s) {
    shift = s.total() == 0 ? 0 : s.top;
    logsum = s.top <= -kLowest<A> ? log_of(s.total()) : s.top - s.top;  // +inf and NaN: NaN
  }
  SPO_DEVICE A log_prob(A z) const { return (z - shift) - logsum; }
};

// The KL from a row's sums. It takes the logarithm of a quotient: the rounding errors of a difference of two logarithms
// could exceed a small KL. The rounding error of gap / p is added, so that a large KL is rounded only once.
template <class A>
SPO_DEVICE A kl_of(const KlSum<A>& s) {
  const A p = s.z.total(), gap = p == 0 ? A(0) : s.gap, mean = gap / p, logs = log_of(s.r.total() / p);
  const A remainder = fma(-mean, p, gap) / p;
  return mean + (fabs(mean) <= -kLowest<A> ? logs + remainder : logs);
}

// Calls add<packets, full>(first) for the calling thread's packets of elements [begin, end): two packets at a time,
// then one, then the incomplete last one (full is false). The second packet of two is threads_per_row packets after the
// first. begin is a multiple of two packets.
template <int threads_per_row, int E, class Add>
SPO_DEVICE void for_packets(std::int64_t begin, std::int64_t end, Add add) {
  constexpr std::int64_t kStep = std::int64_t{threads_per_row} * E;
  std::int64_t first = begin + static_cast<std::int64_t>(threadIdx.x % threads_per_row) * E;
  for (; first + kStep + E <= end; first += 2 * kStep) add.template operator()<2, true>(first);
  for (; first + E <= end; first += kStep) add.template operator()<1, true>(first);
  if (first < end) add.template operator()<1, false>(first);
}

template <int threads_per_row, bool aligned, Cache cache, class T, int E>
SPO_DEVICE ExpSum<Acc<T>> sum_row(const RowReader<T, E>& z, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kStep = std::int64_t{threads_per_row} * E;
  auto sum = ExpSum<Acc<T>>::empty();
  for_packets<threads_per_row, E>(begin, end, [&]<int packets, bool full>(std::int64_t first) {
    Acc<T> x[packets * E];
#pragma unroll
    for (int c = 0; c < packets; ++c) {
      auto& packet = *reinterpret_cast<Acc<T>(*)[E]>(x + c * E);
      if constexpr (full)
        z.template full<aligned, cache>(first + c * kStep, packet);
      else
        z.edge(first, packet);
    }
    sum.add(x);
  });
  return sum;
}

template <int threads_per_row, bool aligned, Cache cache, class T, class R, int E>
SPO_DEVICE KlSum<Acc<T>> sum_rows(const RowReader<T, E>& z, const RowReader<R, E>& r, std::int64_t begin,
                                  std::int64_t end) {
  constexpr std::int64_t kStep = std::int64_t{threads_per_row} * E;
  auto sum = KlSum<Acc<T>>::empty();
  std::int64_t first = begin + static_cast<std::int64_t>(threadIdx.x % threads_per_row) * E;
  Acc<T> x[E], y[E];
  for (; first + E <= end; first += kStep) {
    z.template full<aligned, cache>(first, x);
    r.template full<aligned, cache>(first, y);
    sum.template add<false>(x, y);
  }
  if (first < end) {
    z.edge(first, x);
    r.edge(first, y);
    sum.template add<true>(x, y);
  }
  if (!(fabs(sum.gap) <= -kLowest<Acc<T>>)) {  // once more with gap_of_positive, too slow for the loop above
    sum.gap = 0;
    for (first = begin + static_cast<std::int64_t>(threadIdx.x % threads_per_row) * E; first < end; first += kStep)
      for (int k = 0; k < E && first + k < end; ++k) {
        const Acc<T> zx = z.logit(z.at(first + k)), rx = r.logit(r.at(first + k));
        sum.gap += sum.gap_of_positive(zx, rx);
      }
  }
  return sum;
}

}  // namespace spo::cuda
