// F32 as 16 lanes of AVX-512. Included by simd.h.
#pragma once

#include <immintrin.h>

namespace spo::cpu::SPO_SIMD_LEVEL {

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
SPO_INLINE F32 operator/(F32 a, F32 b) { return _mm512_div_ps(a.v, b.v); }
SPO_INLINE F32 max(F32 a, F32 b) { return _mm512_max_ps(a.v, b.v); }
// a < b ? x : y for each lane.
SPO_INLINE F32 where_less(F32 a, F32 b, F32 x, F32 y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v);
}
SPO_INLINE float reduce_add(F32 a) { return _mm512_reduce_add_ps(a.v); }
SPO_INLINE float reduce_max(F32 a) { return _mm512_reduce_max_ps(a.v); }
SPO_INLINE __mmask16 nonzero(F32 w) { return _mm512_cmp_ps_mask(w.v, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
// w x and w x + sum, where 0 x is 0 even if x is infinite or NaN. NaN in w gives NaN.
SPO_INLINE F32 weigh(F32 w, F32 x) { return _mm512_maskz_mul_ps(nonzero(w), w.v, x.v); }
SPO_INLINE F32 add_weighed(F32 w, F32 x, F32 sum) { return _mm512_mask3_fmadd_ps(w.v, x.v, sum.v, nonzero(w)); }
// x = m 2^e, with m from sqrt(1/2) to sqrt(2), for a positive normal x.
SPO_INLINE void split_exponent(F32 x, F32& m, F32& e) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i n = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(kSqrtHalfBits)), 23);
  m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(n, 23)));
  e = _mm512_cvtepi32_ps(n);
}

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
// x rounded to bfloat16, in the upper 16 bits of each lane; the lower bits mean nothing. A NaN stays NaN if its lower
// 16 bits are 0, as after a load from bfloat16, an invalid operation, and `factor` (row_ops.cpp). Others may become -0.
SPO_INLINE __m512i bf16_in_upper_half(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
}
SPO_INLINE void store2(bf16* p, F32 a, F32 b) {
  alignas(64) static constexpr std::uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                         23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                         45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i halves =
      _mm512_permutex2var_epi16(bf16_in_upper_half(a.v), _mm512_load_si512(kOdd), bf16_in_upper_half(b.v));
  _mm512_storeu_si512(p, halves);
}
SPO_INLINE void load2_any(const bf16* p, F32& even, F32& odd) {
  const __m512i both = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
SPO_INLINE void store2_any(bf16* p, F32 even, F32 odd) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  constexpr int kSelect = 0xca;  // a ? b : c for each bit
  _mm512_storeu_si512(p, _mm512_ternarylogic_epi32(high, bf16_in_upper_half(odd.v),
                                                   _mm512_srli_epi32(bf16_in_upper_half(even.v), 16), kSelect));
}
SPO_INLINE void load2(const f16* p, F32& a, F32& b) {
  a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)));
}
SPO_INLINE void store2(f16* p, F32 a, F32 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT));
}

// x[k] = e^x[k] * scale, with scale in the coefficients: x log2(e) = n + f, then poly(f) 2^n. scalef gives inf where
// the result overflows, and 0 for x = -inf.
//
// exact: f comes from x itself, not from the rounded product, which takes two more instructions. Without it the
// relative error of a small result is 1e-7 |log2 result|: invisible in a sum, visible in a float32 gradient.
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
      if constexpr (exact) x[k] = max(F32(-1000.f), x[k]);  // below, u's rounding error would exceed the range of f
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

}  // namespace spo::cpu::SPO_SIMD_LEVEL
