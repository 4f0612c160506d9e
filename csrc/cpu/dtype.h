// Element types of logits, and their scalar conversions. simd_*.h has the vector conversions.
//
// Functions here and in row_scalar.h are static. Each SIMD level's object is compiled for its own instruction set, so a
// copy shared between objects could be one that this CPU cannot run.
#pragma once

#include <cstdint>
#include <cstring>

namespace spo::cpu {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

static inline float bit_float(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

static inline double to_double(double x) { return x; }
static inline double to_double(float x) { return x; }
static inline double to_double(bf16 x) { return bit_float(std::uint32_t{x.bits} << 16); }
static inline double to_double(f16 x) {
  const std::uint32_t sign = std::uint32_t(x.bits & 0x8000) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 0) {
    const double magnitude = mantissa * 0x1p-24;
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 0x1f) return bit_float(sign | 0x7f800000 | mantissa << 13);
  return bit_float(sign | (exponent + 127 - 15) << 23 | mantissa << 13);
}

static inline std::uint32_t float_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Round to nearest even. A float32 NaN becomes 0x7fc00000, because the vector conversion to bfloat16 takes only a NaN
// with few bits set.
static inline void from_double(double x, double& out) { out = x; }
static inline void from_double(double x, float& out) { out = x != x ? bit_float(0x7fc00000) : static_cast<float>(x); }
static inline void from_double(double x, bf16& out) {
  const std::uint32_t bits = float_bits(static_cast<float>(x));
  out.bits = x != x ? 0x7fc0 : static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void from_double(double x, f16& out) {
  const std::uint32_t bits = float_bits(static_cast<float>(x));
  const std::uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  std::uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;
  else if (magnitude >= 143u << 23)
    half = 0x7c00;
  else if (magnitude < 113u << 23)  // subnormal: adding 1/2 aligns and rounds the bits
    half = float_bits(bit_float(magnitude) + 0.5f) - float_bits(0.5f);
  else
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  out.bits = static_cast<std::uint16_t>(half | sign);
}

// -inf pads a row: it adds nothing to a sum of exponentials.
static inline void set_minus_infinity(float& x) { x = bit_float(0xff800000); }
static inline void set_minus_infinity(bf16& x) { x.bits = 0xff80; }
static inline void set_minus_infinity(f16& x) { x.bits = 0xfc00; }

}  // namespace spo::cpu
