// F32 as 8 lanes of AVX2, with FMA and F16C. Included by simd.h.
#pragma once

#include <immintrin.h>

namespace spo::cpu::SPO_SIMD_LEVEL {

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
SPO_INLINE F32 operator/(F32 a, F32 b) { return _mm256_div_ps(a.v, b.v); }
SPO_INLINE F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
// a < b ? x : y for each lane.
SPO_INLINE F32 where_less(F32 a, F32 b, F32 x, F32 y) {
  return _mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ));
}
// NaN in b gives NaN: _mm256_min_ps and _mm256_max_ps return the second operand.
SPO_INLINE F32 max(F32 a, F32 b) { return _mm256_max_ps(a.v, b.v); }
SPO_INLINE F32 min(F32 a, F32 b) { return _mm256_min_ps(a.v, b.v); }
SPO_INLINE F32 where_nonzero(F32 w, F32 x) {
  return _mm256_and_ps(_mm256_cmp_ps(w.v, _mm256_setzero_ps(), _CMP_NEQ_UQ), x.v);
}
SPO_INLINE F32 shift_to_exponent(F32 z) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(z.v), 23)); }
// As in simd_avx512.h.
SPO_INLINE void split_exponent(F32 x, F32& m, F32& e) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i n = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(kSqrtHalfBits)), 23);
  m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(n, 23)));
  e = _mm256_cvtepi32_ps(n);
}

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
// x rounded to bfloat16, in the lower 16 bits of each lane. NaN as in simd_avx512.h.
SPO_INLINE __m256i bf16_in_lower_half(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(even, _mm256_set1_epi32(0x7fff))), 16);
}
SPO_INLINE void store2(bf16* p, F32 a, F32 b) {
  const __m256i packed =
      _mm256_packus_epi32(bf16_in_lower_half(a.v), bf16_in_lower_half(b.v));  // packs within 128-bit lanes
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
SPO_INLINE void load2_any(const bf16* p, F32& even, F32& odd) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
}
SPO_INLINE void store2_any(bf16* p, F32 even, F32 odd) {
  const __m256i high = _mm256_slli_epi32(bf16_in_lower_half(odd.v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(high, bf16_in_lower_half(even.v)));
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

}  // namespace spo::cpu::SPO_SIMD_LEVEL
