// F32 as 4 lanes of the compilers' vector extension: SSE2 on x86-64, NEON on arm64. Included by simd.h.
#pragma once

namespace spo::cpu::SPO_SIMD_LEVEL {

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
SPO_INLINE F32 operator/(F32 a, F32 b) { return a.v / b.v; }
SPO_INLINE F32 fma(F32 a, F32 b, F32 c) { return a.v * b.v + c.v; }
// a < b ? x : y for each lane.
SPO_INLINE F32 where_less(F32 a, F32 b, F32 x, F32 y) { return a.v < b.v ? x.v : y.v; }
// NaN in b gives NaN.
SPO_INLINE F32 max(F32 a, F32 b) { return a.v > b.v ? a.v : b.v; }
SPO_INLINE F32 min(F32 a, F32 b) { return a.v < b.v ? a.v : b.v; }
SPO_INLINE F32 where_nonzero(F32 w, F32 x) { return F32(x.bits() & reinterpret_cast<F32::words>(w.v != 0.f)); }
SPO_INLINE F32 shift_to_exponent(F32 z) { return F32(z.bits() << 23); }
// As in simd_avx512.h.
SPO_INLINE void split_exponent(F32 x, F32& m, F32& e) {
  typedef std::int32_t integers __attribute__((vector_size(16)));
  const integers n = (reinterpret_cast<integers>(x.v) - kSqrtHalfBits) >> 23;
  m = F32(x.bits() - (reinterpret_cast<F32::words>(n) << 23));
  e = __builtin_convertvector(n, F32::floats);
}

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
  // Subnormal: with the exponent raised by one the number is normal, and the subtraction removes the implicit bit.
  const F32 subnormal = F32(normal + (1 << 23)) - F32(splat(113 << 23));
  const F32::words finite = exponent == 0 ? subnormal.bits() : normal;
  return F32((exponent == (0x1f << 23) ? special : finite) | (bits & 0x8000) << 16);
}
// x rounded to bfloat16, in the lower 16 bits of each lane. NaN as in simd_avx512.h.
SPO_INLINE F32::words bf16_in_lower_half(F32 x) {
  const F32::words bits = x.bits();
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
SPO_INLINE void narrow(F32 x, bf16* p) { store_halves(bf16_in_lower_half(x), p); }
SPO_INLINE void narrow(F32 x, f16* p) {
  const F32::words sign = (x.bits() >> 16) & 0x8000, bits = x.bits() & 0x7fffffff;
  const F32 half_ulp(0.5f);  // adding it aligns and rounds a subnormal's bits
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
  const F32::words both = bf16_in_lower_half(even) | bf16_in_lower_half(odd) << 16;
  std::memcpy(p, &both, sizeof both);
}
#endif
SPO_INLINE void to_array(F32 a, float* out) { std::memcpy(out, &a.v, sizeof a.v); }

}  // namespace spo::cpu::SPO_SIMD_LEVEL
