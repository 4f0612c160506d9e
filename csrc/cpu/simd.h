// A thin vector layer: for each instruction set a class F32 of `size` float lanes, with the operations that the row
// kernels need. Each SIMD level compiles this header into an object of its own, in a namespace of its own
// (SPO_SIMD_LEVEL), with compiler flags of its own. No other object may call what is defined here.
//
// load2 and store2 move two vectors in memory order. 16-bit types become float on load, and round to nearest even on
// store.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#define SPO_INLINE __attribute__((always_inline)) inline

namespace spo::cpu::SPO_SIMD_LEVEL {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr std::int32_t kSqrtHalfBits = 0x3f3504f3;  // of the float sqrt(1/2)

// Polynomials of least relative error among those that are 1 at 0, so that a row's largest logit counts exactly 1.
// Error in float32 arithmetic: 3.0e-6 for the 4th degree, 1.7e-7 for the 5th, 1.0e-7 for the 6th. Gradients that are
// rounded to bfloat16 use the 4th. float32 gradients, gradients of transformed rows and the tanh of a softcap use the
// 6th, everything else the 5th: with the 4th, log-probs of rows with few likely tokens were off by 3e-6, where eager
// torch is exact.
template <int degree>
struct Exp2Poly;  // 2^f, f in [0, 1)
template <>
struct Exp2Poly<4> {
  static constexpr float c[] = {1.f, 0.6930448413f, 0.241280213f, 0.05224244669f, 0.01342670154f};
};
template <>
struct Exp2Poly<5> {
  static constexpr float c[] = {1.f, 0.6931512952f, 0.2401644439f, 0.05579991639f, 0.009017026983f, 0.001867131679f};
};
template <>
struct Exp2Poly<6> {
  static constexpr float c[] = {
      1.f, 0.6931470633f, 0.2402293086f, 0.05548528209f, 0.009675451554f, 0.001246784232f, 0.0002161292796f};
};
template <int degree>
struct ExpPoly;  // e^f, f in [-ln(2) / 2, ln(2) / 2]
template <>
struct ExpPoly<4> {
  static constexpr float c[] = {1.f, 0.9999668598f, 0.50003016f, 0.1678747535f, 0.0415138565f};
};
template <>
struct ExpPoly<5> {
  static constexpr float c[] = {1.f, 0.999999702f, 0.4999915063f, 0.1666763574f, 0.0418979302f, 0.008290315978f};
};
template <>
struct ExpPoly<6> {
  static constexpr float c[] = {
      1.f, 1.f, 0.4999999404f, 0.1666643173f, 0.04166800156f, 0.008374155499f, 0.001384365489f};
};

// x[k] = c[0] + c[1] f[k] + ... Each stage runs over all n vectors before the next stage begins. Otherwise the compiler
// finishes one vector before it begins the next, and the independent instructions lie too far apart for out-of-order
// execution (11 % of the loop's time on Zen 4).
template <class V, int size, int n>
SPO_INLINE void horner(const V (&c)[size], const V (&f)[n], V (&x)[n]) {
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) x[k] = fma(c[size - 1], f[k], c[size - 2]);
#pragma GCC unroll 8
  for (int i = size - 3; i >= 0; --i) {
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) x[k] = fma(x[k], f[k], c[i]);
  }
}

}  // namespace spo::cpu::SPO_SIMD_LEVEL

#if defined(SPO_SIMD_AVX512)
#include "simd_avx512.h"
#elif defined(SPO_SIMD_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace spo::cpu::SPO_SIMD_LEVEL {

// log(x) of a positive normal x. Error: at most 1.5 ulp near 1, and 1.2e-7 |log x| elsewhere.
SPO_INLINE F32 log(F32 x) {
  F32 m, e;
  split_exponent(x, m, e);
  const F32 s = (m - F32(1.f)) / (m + F32(1.f)), t = s * s;  // log m = 2 artanh s
  F32 p = fma(F32(2.f / 9), t, F32(2.f / 7));
  p = fma(p, t, F32(2.f / 5));
  p = fma(p, t, F32(2.f / 3));
  return fma(e, F32(0.693147181f), fma(s * t, p, s + s));
}

// load2 and store2 in the fastest order for the type, for loops over one type. For bfloat16 each level splits even and
// odd elements: a shift extracts the even ones, a mask the odd ones.
template <class T>
SPO_INLINE void load2_any(const T* p, F32& a, F32& b) {
  load2(p, a, b);
}
template <class T>
SPO_INLINE void store2_any(T* p, F32 a, F32 b) {
  store2(p, a, b);
}

#if !defined(SPO_SIMD_AVX512)  // simd_avx512.h has instructions for all of the following

SPO_INLINE float reduce_add(F32 a) {
  float lane[F32::size];
  to_array(a, lane);
  for (int n = F32::size / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) lane[i] += lane[i + n];
  return lane[0];
}
SPO_INLINE float reduce_max(F32 a) {
  float lane[F32::size];
  to_array(a, lane);
  float m = lane[0];
  for (int i = 1; i < F32::size; ++i) m = lane[i] > m ? lane[i] : m;
  return m;
}

// w x and w x + sum, where 0 x is 0 even if x is infinite or NaN.
SPO_INLINE F32 weigh(F32 w, F32 x) { return w * where_nonzero(w, x); }
SPO_INLINE F32 add_weighed(F32 w, F32 x, F32 sum) { return fma(w, where_nonzero(w, x), sum); }

// x[k] = e^x[k] * scale. Adding kRound = 1.5 * 2^23 + 127 rounds x log2(e) to an integer n. The low bits of the sum are
// n + 127, the exponent bits of 2^n. The polynomial takes x - n ln(2); ln(2) does not fit one float, so it is
// subtracted in two steps. x is clamped so that n runs from -127 (result 0) to 128 (inf). The parameter `exact` has an
// effect in simd_avx512.h alone. The computation here is always exact.
template <int degree, bool exact = true>
struct Exp {
  static constexpr float kRound = 12582912.f + 127.f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  F32 c[degree + 1];
  SPO_INLINE explicit Exp(float scale = 1.f) {
    for (int i = 0; i <= degree; ++i) c[i] = F32(scale * ExpPoly<degree>::c[i]);
  }
  template <int n>
  SPO_INLINE void operator()(F32 (&x)[n]) const {
    F32 z[n], f[n];
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      x[k] = min(F32(88.8f), max(F32(-88.1f), x[k]));
      z[k] = fma(x[k], F32(kLog2e), F32(kRound));
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      const F32 whole = z[k] - F32(kRound);
      f[k] = fma(whole, F32(-kLn2Low), fma(whole, F32(-kLn2High), x[k]));
    }
    horner(c, f, x);
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) x[k] = x[k] * shift_to_exponent(z[k]);
  }
};

#endif

}  // namespace spo::cpu::SPO_SIMD_LEVEL
