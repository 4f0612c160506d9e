// Reads a row in packets. A packet is the elements that a thread takes at once: 16 bytes of policy logits. The sums of
// a row take packets from element 0 on, aligned or not, so that a row's result does not depend on its place in memory.
// Elementwise kernels take packets from the first aligned element of the output on (row_writer.cuh).
#pragma once

#include "../op_args.h"
#include "platform.h"

namespace spo::cuda {

constexpr int kVectorBytes = 16;

// Stands for elements of type T from which a Transform computes the logits. Logits without a transform have kernels of
// their own, so transforms cost them nothing.
template <class T>
struct Transformed {};

// The type of the elements in memory.
template <class T>
struct StoredAs {
  using type = T;
};
template <class T>
struct StoredAs<Transformed<T>> {
  using type = T;
};
template <class T>
using Stored = typename StoredAs<T>::type;

template <class T>
constexpr int kPacket = kVectorBytes / sizeof(Stored<T>);

using bf16 = __nv_bfloat16;
using f16 = __half;

// Stands for a reference type that is known only at run time: it differs from the policy's, or there is a transform.
struct AnyType {};

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
struct AccOf<Transformed<T>> : AccOf<T> {};
template <class T>
using Acc = typename AccOf<T>::type;

SPO_DEVICE float to_acc(float x) { return x; }
SPO_DEVICE double to_acc(double x) { return x; }
SPO_DEVICE float to_acc(bf16 x) { return __bfloat162float(x); }
SPO_DEVICE float to_acc(f16 x) { return __half2float(x); }

SPO_DEVICE void from_acc(float x, float& out) { out = x; }
SPO_DEVICE void from_acc(double x, double& out) { out = x; }
SPO_DEVICE void from_acc(float x, bf16& out) { out = __float2bfloat16(x); }
SPO_DEVICE void from_acc(float x, f16& out) { out = __float2half(x); }

// The elements of a vector in order.
SPO_DEVICE void unpack(const uint4& w, const bf16*, float* x) {
  const std::uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
SPO_DEVICE void unpack(const uint4& w, const f16*, float* x) {
  const std::uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}
SPO_DEVICE void unpack(const uint4& w, const float*, float* x) {
  x[0] = __uint_as_float(w.x);
  x[1] = __uint_as_float(w.y);
  x[2] = __uint_as_float(w.z);
  x[3] = __uint_as_float(w.w);
}
SPO_DEVICE void unpack(const uint4& w, const double*, double* x) {
  x[0] = __hiloint2double(static_cast<int>(w.y), static_cast<int>(w.x));
  x[1] = __hiloint2double(static_cast<int>(w.w), static_cast<int>(w.z));
}

SPO_DEVICE uint4 pack(const float* x, const bf16*) {
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    words[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  return {words[0], words[1], words[2], words[3]};
}
SPO_DEVICE uint4 pack(const float* x, const f16*) {
  std::uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
    words[i] = *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  return {words[0], words[1], words[2], words[3]};
}
SPO_DEVICE uint4 pack(const float* x, const float*) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}
SPO_DEVICE uint4 pack(const double* x, const double*) {
  return {static_cast<unsigned>(__double2loint(x[0])), static_cast<unsigned>(__double2hiint(x[0])),
          static_cast<unsigned>(__double2loint(x[1])), static_cast<unsigned>(__double2hiint(x[1]))};
}

// Bytes [shift, shift + 16) of two neighbouring vectors. shift is the same for a whole row.
SPO_DEVICE uint4 shifted(const uint4& low, const uint4& high, unsigned shift) {
  std::uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  if (shift & 8) {
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
  }
  if (shift & 4) {
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
  }
  const unsigned bits = 8 * (shift & 3);
  return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
          __funnelshift_r(w[3], w[4], bits)};
}

// Offset of row i, in elements.
SPO_DEVICE std::int64_t row_offset(const Rows& rows, std::int64_t i) {
  return rows.T == 1 ? i * rows.stride_b : i / rows.T * rows.stride_b + i % rows.T * rows.stride_t;
}

enum class Cache { stream, keep };  // stream: data is read once; keep: it is read again soon

template <Cache cache>
SPO_DEVICE uint4 load_vector(const void* at) {
  const auto* vector = static_cast<const uint4*>(at);
  return cache == Cache::stream ? __ldcs(vector) : *vector;
}

// Loads E elements, 16 bytes at a time. A half-precision reference beside float32 logits has 4 elements a packet, and
// takes one load of 8 bytes.
template <Cache cache, class T, int E>
SPO_DEVICE void load_elements(const T* at, Acc<T> (&x)[E]) {
  constexpr int kPerVector = kVectorBytes / sizeof(T);
  if constexpr (E < kPerVector) {
    static_assert(E * sizeof(T) == sizeof(uint2));
    const auto* half = reinterpret_cast<const uint2*>(at);
    const uint2 words = cache == Cache::stream ? __ldcs(half) : *half;
    Acc<T> both[kPerVector];
    unpack(uint4{words.x, words.y, 0, 0}, static_cast<const T*>(nullptr), both);
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = both[k];
  } else {
#pragma unroll
    for (int k = 0; k < E; k += kPerVector) unpack(load_vector<cache>(at + k), static_cast<const T*>(nullptr), x + k);
  }
}

// A row of V elements, read in packets of E. full() reads a packet inside the row. edge() reads a packet that may reach
// beyond the row, and gives -inf for elements from V on. Both give logits. at() and values() give a number u for each
// element: logit(u) is the element's logit, and dx(u, dz) is the gradient of the element in memory, where dz is the
// gradient of its logit. In this struct the element in memory, u and the logit are the same number.
template <class T, int E>
struct RowReader {
  static_assert(E * sizeof(T) % kVectorBytes == 0);
  using A = Acc<T>;
  const T* row;
  std::int64_t V;

  SPO_DEVICE RowReader(const Rows& rows, const Transform&, std::int64_t i, std::int64_t V)
      : row(static_cast<const T*>(rows.data) + row_offset(rows, i)), V(V) {}

  // Whether packets that start a multiple of E from element v are aligned.
  SPO_DEVICE bool aligned_at(std::int64_t v) const {
    return reinterpret_cast<std::uintptr_t>(row + v) % kVectorBytes == 0;
  }
  SPO_DEVICE A at(std::int64_t v) const { return to_acc(row[v]); }
  static SPO_DEVICE A logit(A u) { return u; }
  static SPO_DEVICE A dx(A, A dz) { return dz; }

  SPO_DEVICE void edge(std::int64_t first, A (&x)[E]) const {
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = first + k < V ? to_acc(row[first + k]) : -INFINITY;
  }

  // The bytes of a packet inside the row. Of a 16-bit type they take half the registers of the packet's values. A
  // misaligned packet is cut out of the two aligned vectors around it. Near the ends of the row, where these vectors
  // may reach beyond it, the packet is read element by element.
  struct Raw {
    uint4 vectors[E * sizeof(T) / kVectorBytes];
  };
  template <bool aligned, Cache cache>
  SPO_DEVICE Raw raw(std::int64_t first) const {
    constexpr int kPerVector = kVectorBytes / sizeof(T);
    const auto* bytes = reinterpret_cast<const char*>(row + first);
    const unsigned shift = aligned ? 0 : reinterpret_cast<std::uintptr_t>(bytes) % kVectorBytes;
    Raw out;
    if (!aligned && shift && (first < E || first + 2 * E > V)) {
      A x[E];
      edge(first, x);
#pragma unroll
      for (int k = 0; k < E; k += kPerVector) out.vectors[k / kPerVector] = pack(x + k, static_cast<const T*>(nullptr));
      return out;
    }
#pragma unroll
    for (int k = 0; k < E / kPerVector; ++k) {
      const char* vector = bytes + k * kVectorBytes;
      if (aligned || shift == 0)
        out.vectors[k] = load_vector<cache>(vector);
      else
        out.vectors[k] = shifted(load_vector<Cache::keep>(vector - shift),
                                 load_vector<Cache::keep>(vector - shift + kVectorBytes), shift);
    }
    return out;
  }
  static SPO_DEVICE void values(const Raw& in, A (&x)[E]) {
    constexpr int kPerVector = kVectorBytes / sizeof(T);
#pragma unroll
    for (int k = 0; k < E; k += kPerVector) unpack(in.vectors[k / kPerVector], static_cast<const T*>(nullptr), x + k);
  }

  template <bool aligned, Cache cache>
  SPO_DEVICE void full(std::int64_t first, A (&x)[E]) const {
    values(raw<aligned, cache>(first), x);
  }
};

template <int E>
struct RowReader<AnyType, E> {
  using A = float;
  const void* row;
  DType dtype;
  std::int64_t V;

  SPO_DEVICE RowReader(const Rows& rows, const Transform&, std::int64_t i, std::int64_t V) : dtype(rows.dtype), V(V) {
    row = static_cast<const char*>(rows.data) + row_offset(rows, i) * bytes();
  }

  SPO_DEVICE int bytes() const { return dtype == DType::f32 ? 4 : 2; }  // of an element
  SPO_DEVICE bool aligned_at(std::int64_t v) const {
    return (reinterpret_cast<std::uintptr_t>(row) + v * bytes()) % kVectorBytes == 0;
  }
  SPO_DEVICE float at(std::int64_t v) const {
    switch (dtype) {
      case DType::bf16: return to_acc(static_cast<const bf16*>(row)[v]);
      case DType::f16: return to_acc(static_cast<const f16*>(row)[v]);
      default: return static_cast<const float*>(row)[v];
    }
  }
  static SPO_DEVICE float logit(float u) { return u; }
  SPO_DEVICE void edge(std::int64_t first, float (&x)[E]) const {
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = first + k < V ? at(first + k) : -INFINITY;
  }
  template <bool aligned, Cache cache>
  SPO_DEVICE void full(std::int64_t first, float (&x)[E]) const {
    if constexpr (aligned) {
      switch (dtype) {
        case DType::bf16: return load_elements<cache>(static_cast<const bf16*>(row) + first, x);
        case DType::f16: return load_elements<cache>(static_cast<const f16*>(row) + first, x);
        default: return load_elements<cache>(static_cast<const float*>(row) + first, x);
      }
    }
    edge(first, x);
  }

  struct Raw {
    float x[E];
  };
  template <bool aligned, Cache cache>
  SPO_DEVICE Raw raw(std::int64_t first) const {
    Raw out;
    full<aligned, cache>(first, out.x);
    return out;
  }
  static SPO_DEVICE void values(const Raw& in, float (&x)[E]) {
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = in.x[k];
  }
};

SPO_DEVICE float tanh_of(float x) { return tanhf(x); }
SPO_DEVICE double tanh_of(double x) { return tanh(x); }

// A row of elements with a transform. The transform is made of two steps, so that the gradient takes one tanh: first u,
// which is x or tanh(a x), then the logit, a multiple of u.
template <class T, int E>
struct RowReader<Transformed<T>, E> : RowReader<T, E> {
  using Elements = RowReader<T, E>;
  using A = Acc<T>;
  A a = 1, b = 1;
  bool capped = false;

  SPO_DEVICE RowReader(const Rows& rows, const Transform& t, std::int64_t i, std::int64_t V)
      : Elements(rows, t, i, V), capped(t.b) {
    if (t.a) a = static_cast<const A*>(t.a)[i * t.stride];
    if (capped) b = static_cast<const A*>(t.b)[i * t.stride];
  }

  SPO_DEVICE A logit(A u) const { return (capped ? b : a) * u; }
  SPO_DEVICE A dx(A u, A dz) const { return (capped ? a * b * fma(-u, u, A(1)) : a) * dz; }

  SPO_DEVICE A at(std::int64_t v) const {
    const A x = Elements::at(v);
    return capped ? tanh_of(a * x) : x;
  }
  SPO_DEVICE void values(const typename Elements::Raw& in, A (&u)[E]) const {
    Elements::values(in, u);
    first_step(u);
  }
  template <bool aligned, Cache cache>
  SPO_DEVICE void full(std::int64_t first, A (&x)[E]) const {
    Elements::template full<aligned, cache>(first, x);
    first_step(x);
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = logit(x[k]);
  }
  SPO_DEVICE void edge(std::int64_t first, A (&x)[E]) const {
    Elements::edge(first, x);
    first_step(x);
#pragma unroll
    for (int k = 0; k < E; ++k)
      if (first + k < this->V)
        x[k] = logit(x[k]);
      else
        x[k] = -INFINITY;
  }

 private:
  SPO_DEVICE void first_step(A (&x)[E]) const {
    if (!capped) return;
#pragma unroll
    for (int k = 0; k < E; ++k) x[k] = tanh_of(a * x[k]);
  }
};

}  // namespace spo::cuda
