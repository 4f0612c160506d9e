// A thin vector layer: one class F32 of `size` float lanes per instruction set, with just the operations the row
// kernels need. Each SIMD level compiles this header in an object of its own, in a namespace of its own
// (SPO_SIMD_LEVEL), with its own compiler flags; nothing here may be called from another level's object.
//
// 16-bit types convert to float on load and round to nearest even on store, two vectors at a time, in memory order.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.h"

#if defined(SPO_SIMD_AVX512) || defined(SPO_SIMD_AVX2)
#include <immintrin.h>
#endif

#define SPO_INLINE __attribute__((always_inline)) inline

namespace spo::cpu::SPO_SIMD_LEVEL {

constexpr float kLog2e = 1.44269504088896340736f;

// Polynomials of least relative error among those that are 1 at 0, so that the largest logit of a row counts exactly 1.
// Error in float32 arithmetic: 4th degree 3.0e-6, 5th 1.7e-7, 6th 1.0e-7. The 4th is enough for gradients that are
// rounded to bfloat16. Sums take the 5th: the 4th left 3e-6 on log-probabilities of rows with few likely tokens, where
// eager torch is exact. float32 gradients take the 6th.
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

#if defined(SPO_SIMD_AVX512)

struct F32 {
  static constexpr int size = 16;
  __m512 v;
  SPO_INLINE F32() : v(_mm512_setzero_ps()) {}
  SPO_INLINE F32(__m512 x) : v(x) {}
  SPO_INLINE explicit F32(float x) : v(_mm512_set1_ps(x)) {}
};

SPO_INLINE F32 operator+(F32 a, F32 b) { return _mm512_add_ps(a.v, b.v); }
SPO_INLINE F32 operator-(F32 a, F32 b) { return _mm512_sub_ps(a.v, b.v); }
SPO_INLINE F32 operator*(F32 a, F32 b) { return _mm512_mul_ps(a.v, b.v); }
SPO_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
SPO_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a.v, b.v); }
SPO_INLINE float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
SPO_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }
SPO_INLINE __mmask16 nonzero(F32 w) { return _mm512_cmp_ps_mask(w.v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
// w x, and w x + sum, that take 0 x as 0 whatever x is. A NaN in w stays.
SPO_INLINE F32 weigh(F32 w, F32 x) { return _mm512_maskz_mul_ps(nonzero(w), w.v, x.v); }
SPO_INLINE F32 add_weighed(F32 w, F32 x, F32 sum) { return _mm512_mask3_fmadd_ps(w.v, x.v, sum.v, nonzero(w)); }

SPO_INLINE void load2(const float* p, F32& a, F32& b) {
  a = _mm512_loadu_ps(p);
  b = _mm512_loadu_ps(p + 16);
}
SPO_INLINE void store2(float* p, F32 a, F32 b) {
  _mm512_storeu_ps(p, a.v);
  _mm512_storeu_ps(p + 16, b.v);
}
SPO_INLINE __m512 widen(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}
SPO_INLINE void load2(const bf16* p, F32& a, F32& b) {
  a = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
SPO_INLINE __m512i
round_high_half(__m512 x) {  // to nearest even, in the upper 16 bits; NaN stays NaN (quiet, no payload)
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
}
SPO_INLINE void store2(bf16* p, F32 a, F32 b) {
  alignas(64) static constexpr std::uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                         23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                         45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i halves = _mm512_permutex2var_epi16(round_high_half(a.v), _mm512_load_si512(kOdd), round_high_half(b.v));
  _mm512_storeu_si512(p, halves);
}
SPO_INLINE void load2_any(const bf16* p, F32& even, F32& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
SPO_INLINE void store2_any(bf16* p, F32 even, F32 odd) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  constexpr int kSelect = 0xca;  // a ? b : c, bit by bit
  _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(high, round_high_half(odd.v),
                                                   _mm512_srli_epi32(round_high_half(even.v), 16), kSelect));
}
SPO_INLINE void load2(const f16* p, F32& a, F32& b) {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
SPO_INLINE void store2(f16* p, F32 a, F32 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}

#else

#if defined(SPO_SIMD_AVX2)

struct F32 {
  static constexpr int size = 8;
  __m256 v;
  SPO_INLINE F32() : v(_mm256_setzero_ps()) {}
  SPO_INLINE F32(__m256 x) : v(x) {}
  SPO_INLINE explicit F32(float x) : v(_mm256_set1_ps(x)) {}
};

SPO_INLINE F32 operator+(F32 a, F32 b) { return _mm256_add_ps(a.v, b.v); }
SPO_INLINE F32 operator-(F32 a, F32 b) { return _mm256_sub_ps(a.v, b.v); }
SPO_INLINE F32 operator*(F32 a, F32 b) { return _mm256_mul_ps(a.v, b.v); }
SPO_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
// Of a NaN in b the result is NaN: min and max return their second operand then.
SPO_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a.v, b.v); }
SPO_INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a.v, b.v); }
SPO_INLINE F32 where_nonzero(F32 w, F32 x) {
  return _mm256_and_ps(_mm256_cmp_ps(w.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), x.v);
}
SPO_INLINE F32 shift_to_exponent(F32 z) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(z.v), 23)); }

SPO_INLINE void load2(const float* p, F32& a, F32& b) {
  a = _mm256_loadu_ps(p);
  b = _mm256_loadu_ps(p + 8);
}
SPO_INLINE void store2(float* p, F32 a, F32 b) {
  _mm256_storeu_ps(p, a.v);
  _mm256_storeu_ps(p + 8, b.v);
}
SPO_INLINE __m256 widen(__m128i bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
SPO_INLINE void load2(const bf16* p, F32& a, F32& b) {
  a = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b = widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
SPO_INLINE __m256i round_high_half(__m256 x) {  // to nearest even, moved to the lower 16 bits
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
}
SPO_INLINE void store2(bf16* p, F32 a, F32 b) {
  const __m256i packed = _mm256_packus_epi32(round_high_half(a.v), round_high_half(b.v));  // packs within 128-bit lanes
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
SPO_INLINE void load2_any(const bf16* p, F32& even, F32& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
SPO_INLINE void store2_any(bf16* p, F32 even, F32 odd) {
  const __m256i high = _mm256_slli_epi32(round_high_half(odd.v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(high, round_high_half(even.v)));
}
SPO_INLINE void load2(const f16* p, F32& a, F32& b) {
  a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
}
SPO_INLINE void store2(f16* p, F32 a, F32 b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}
SPO_INLINE void to_array(F32 a, float* out) { _mm256_storeu_ps(out, a.v); }

#else  // portable: the compilers' vector extension, 16 bytes wide, which is SSE2 on x86-64 and NEON on arm64

struct F32 {
  static constexpr int size = 4;
  typedef float floats __attribute__((vector_size(16)));
  typedef std::uint32_t words __attribute__((vector_size(16)));  // unsigned: sums of bit patterns may wrap
  typedef std::uint16_t halves __attribute__((vector_size(8)));
  floats v;
  SPO_INLINE F32() : v{} {}
  SPO_INLINE F32(floats x) : v(x) {}
  SPO_INLINE explicit F32(words bits) : v(reinterpret_cast<floats>(bits)) {}
  SPO_INLINE explicit F32(float x) : v{x, x, x, x} {}
  SPO_INLINE words bits() const { return reinterpret_cast<words>(v); }
};

SPO_INLINE F32 operator+(F32 a, F32 b) { return a.v + b.v; }
SPO_INLINE F32 operator-(F32 a, F32 b) { return a.v - b.v; }
SPO_INLINE F32 operator*(F32 a, F32 b) { return a.v * b.v; }
SPO_INLINE F32 fma(F32 a, F32 b, F32 c) { return a.v * b.v + c.v; }
// Of a NaN in b the result is NaN.
SPO_INLINE F32 max(F32 a, F32 b) { return a.v > b.v ? a.v : b.v; }
SPO_INLINE F32 min(F32 a, F32 b) { return a.v < b.v ? a.v : b.v; }
SPO_INLINE F32 where_nonzero(F32 w, F32 x) { return F32(x.bits() & reinterpret_cast<F32::words>(w.v != 0.f)); }
SPO_INLINE F32 shift_to_exponent(F32 z) { return F32(z.bits() << 23); }

SPO_INLINE F32::words splat(std::uint32_t x) { return F32::words{x, x, x, x}; }
SPO_INLINE F32::words load_halves(const void* p) {
  F32::halves h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, F32::words);
}
SPO_INLINE void store_halves(F32::words bits, void* p) {
  const F32::halves h = __builtin_convertvector(bits, F32::halves);
  std::memcpy(p, &h, sizeof h);
}
SPO_INLINE F32 widen(const bf16* p) { return F32(load_halves(p) << 16); }
SPO_INLINE F32 widen(const f16* p) {
  const F32::words bits = load_halves(p), shifted = (bits & 0x7fff) << 13, exponent = shifted & (0x1f << 23);
  const F32::words normal = shifted + ((127 - 15) << 23), special = normal + ((128 - 16) << 23);  // inf and NaN
  // Subnormal: one exponent step up, then the implicit bit is taken off again, all in normal numbers.
  const F32 subnormal = F32(normal + (1 << 23)) - F32(splat(113 << 23));
  const F32::words finite = exponent == 0 ? subnormal.bits() : normal;
  return F32((exponent == (0x1f << 23) ? special : finite) | (bits & 0x8000) << 16);
}
SPO_INLINE F32::words rounded_high_half(F32 x) {  // to nearest even, moved to the lower 16 bits
  const F32::words bits = x.bits();
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
SPO_INLINE void narrow(F32 x, bf16* p) { store_halves(rounded_high_half(x), p); }
SPO_INLINE void narrow(F32 x, f16* p) {
  const F32::words sign = (x.bits() >> 16) & 0x8000, bits = x.bits() & 0x7fffffff;
  const F32 half_ulp(0.5f);  // adding it aligns a subnormal's bits, rounding included
  const F32::words subnormal = (F32(bits) + half_ulp).bits() - half_ulp.bits();
  const F32::words normal = (bits - (112 << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const F32::words special = bits > 0x7f800000 ? splat(0x7e00) : splat(0x7c00);
  const F32::words finite = bits < (113 << 23) ? subnormal : normal;
  store_halves((bits >= (143u << 23) ? special : finite) | sign, p);
}
SPO_INLINE void load2(const float* p, F32& a, F32& b) {
  std::memcpy(&a.v, p, sizeof a.v);
  std::memcpy(&b.v, p + 4, sizeof b.v);
}
SPO_INLINE void store2(float* p, F32 a, F32 b) {
  std::memcpy(p, &a.v, sizeof a.v);
  std::memcpy(p + 4, &b.v, sizeof b.v);
}
template <class T>
SPO_INLINE void load2(const T* p, F32& a, F32& b) {
  a = widen(p);
  b = widen(p + 4);
}
template <class T>
SPO_INLINE void store2(T* p, F32 a, F32 b) {
  narrow(a, p);
  narrow(b, p + 4);
}
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
SPO_INLINE void load2_any(const bf16* p, F32& even, F32& odd) {
  F32::words both;
  std::memcpy(&both, p, sizeof both);
  even = F32(both << 16);
  odd = F32(both & 0xffff0000u);
}
SPO_INLINE void store2_any(bf16* p, F32 even, F32 odd) {
  const F32::words both = rounded_high_half(even) | rounded_high_half(odd) << 16;
  std::memcpy(p, &both, sizeof both);
}
#endif
SPO_INLINE void to_array(F32 a, float* out) { std::memcpy(out, &a.v, sizeof a.v); }

#endif

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

SPO_INLINE F32 weigh(F32 w, F32 x) { return w * where_nonzero(w, x); }
SPO_INLINE F32 add_weighed(F32 w, F32 x, F32 sum) { return fma(w, where_nonzero(w, x), sum); }

#endif

// The same pair in whatever order is fastest, one order a type, for loops that do not mix types. bfloat16 as even and
// odd elements takes a shift and a mask to load: 1.1 to 1.2 times as fast as in order with AVX2, 1.2 to 1.4 portably.
template <class T>
SPO_INLINE void load2_any(const T* p, F32& a, F32& b) {
  load2(p, a, b);
}
template <class T>
SPO_INLINE void store2_any(T* p, F32 a, F32 b) {
  store2(p, a, b);
}

// x[k] = c[0] + c[1] f[k] + ... The exponentials below take several vectors stage by stage: left to itself the compiler
// emits one after the other, further apart than out-of-order execution looks (Zen 4: 11 % of the loop's time).
template <int size, int n>
SPO_INLINE void horner(const F32 (&c)[size], const F32 (&f)[n], F32 (&x)[n]) {
#pragma GCC unroll 8
  for (int k = 0; k < n; ++k) x[k] = fma(c[size - 1], f[k], c[size - 2]);
#pragma GCC unroll 8
  for (int i = size - 3; i >= 0; --i) {
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) x[k] = fma(x[k], f[k], c[i]);
  }
}

#if defined(SPO_SIMD_AVX512)

// x[k] = e^x[k] * scale, the scale folded into the coefficients: x log2(e) = n + f, then poly(f) 2^n. scalef handles
// every exponent, overflow to inf and -inf included.
//
// exact: take f from x itself, not from the rounded product. One instruction more; without it the relative error of a
// small result is 1e-7 |log2 result|, which a sum does not notice but a float32 gradient shows.
template <int degree, bool exact = false>
struct Exp {
  F32 c[degree + 1];
  SPO_INLINE explicit Exp(float scale = 1.f) {
    for (int i = 0; i <= degree; ++i) c[i] = F32(scale * Exp2Poly<degree>::c[i]);
  }
  template <int n>
  SPO_INLINE void operator()(F32 (&x)[n]) const {
    constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
    F32 u[n], f[n];
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      if constexpr (exact) x[k] = max(F32(-1000.f), x[k]);  // far below, what the rounding took away would not fit f
      u[k] = x[k] * F32(kLog2e);
    }
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) {
      if constexpr (exact) {
        f[k] = _mm512_fmsub_ps(x[k].v, F32(kLog2e).v, _mm512_roundscale_ps(u[k].v, kFloor));
      } else {
        f[k] = _mm512_reduce_ps(u[k].v, kFloor);  // u - floor(u)
      }
    }
    horner(c, f, x);
#pragma GCC unroll 8
    for (int k = 0; k < n; ++k) x[k] = _mm512_scalef_ps(x[k].v, u[k].v);
  }
};

#else

// x[k] = e^x[k] * scale without a scaling instruction: adding 1.5 * 2^23 rounds x log2(e) to an integer n, which then
// stands in the low bits and, biased, is the exponent. What is left of x, in two steps since n ln(2) does not fit one
// float, goes to the polynomial. Clamped to exponents of -127 (0) and 128 (inf).
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
