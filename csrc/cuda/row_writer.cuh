// Writes a row, or a split of it, in aligned vectors.
#pragma once

#include <type_traits>

#include "row_reader.cuh"

namespace spo::cuda {

template <class T>
SPO_DEVICE T* row_of(const Rows& rows, std::int64_t i) {
  return static_cast<T*>(rows.data) + row_offset(rows, i);
}

// Packets that a thread of an elementwise kernel loads before it writes the first. They are four vectors: of one
// tensor, or two each of two tensors. A reference of AnyType is kept as float32 values, which take more registers: then
// a thread loads one packet.
template <bool with_kl, class R>
constexpr int kBatch = !with_kl                             ? 4
                       : std::is_same_v<Stored<R>, AnyType> ? 1
                                                            : 2;

// Index of the first aligned element of an output row.
template <class T>
SPO_DEVICE std::int64_t aligned_from(const T* out) {
  const unsigned misaligned = reinterpret_cast<std::uintptr_t>(out) % kVectorBytes;
  return misaligned ? (kVectorBytes - misaligned) / sizeof(T) : 0;
}

// Writes a split [begin, end) of a row of V. begin and end are multiples of a packet, or the row's ends. With `head`
// elements before the first aligned element of the output, the split's packets lie in [begin + head, end + head), and
// are written as aligned vectors. The row's first split also writes the elements before the first packet, and its last
// split the elements after the last packet, one by one.
//
// load(first) reads the inputs of a packet, packet(inputs, values) computes its values, and one(v) computes and writes
// an element. A thread loads `batch` packets before it writes the first: memory is busy only while many loads are in
// flight.
template <int threads_per_row, int E, int batch, class T, class LoadFn, class PacketFn, class OneFn>
SPO_DEVICE void write_row(T* out, std::int64_t begin, std::int64_t end, std::int64_t V, LoadFn load, PacketFn packet,
                          OneFn one) {
  constexpr int kPerVector = kVectorBytes / sizeof(T);
  constexpr std::int64_t kStep = std::int64_t{threads_per_row} * E;
  const int lane = threadIdx.x % threads_per_row;
  const std::int64_t head = aligned_from(out),
                     last = (end + head < V ? end + head : V) - E;  // the last packet starts here at most
  for (std::int64_t v = begin + head + static_cast<std::int64_t>(lane) * E; v <= last; v += batch * kStep) {
    decltype(load(v)) inputs[batch];
#pragma unroll
    for (int b = 0; b < batch; ++b)
      if (v + b * kStep <= last) inputs[b] = load(v + b * kStep);
#pragma unroll
    for (int b = 0; b < batch; ++b) {
      if (v + b * kStep > last) break;
      Acc<T> x[E];
      packet(inputs[b], x);
#pragma unroll
      for (int k = 0; k < E; k += kPerVector)
        __stcs(reinterpret_cast<uint4*>(out + v + b * kStep + k), pack(x + k, static_cast<const T*>(nullptr)));
    }
  }
  if (begin == 0 && lane < head && lane < V) one(lane);
  if (end == V) {
    const std::int64_t whole = V > head ? (V - head) / E * E : 0;
    const std::int64_t v = head + whole + lane;
    if (lane < E && v < V) one(v);
  }
}

// Whether write_row writes element v in a packet of the calling thread.
template <int threads_per_row, int E, class T>
SPO_DEVICE bool writes_in_packet(const T* out, std::int64_t v, std::int64_t begin, std::int64_t end, std::int64_t V) {
  const std::int64_t head = aligned_from(out), at = v - (begin + head);
  const bool whole = v >= begin + head && v < end + head && head + (v - head) / E * E + E <= V;
  return whole && at / E % threads_per_row == threadIdx.x % threads_per_row;
}

template <int threads_per_row, int E, class T>
SPO_DEVICE void write_zeros(T* out, std::int64_t begin, std::int64_t end, std::int64_t V) {
  write_row<threads_per_row, E, 1>(
      out, begin, end, V, [](std::int64_t) { return 0; },
      [](int, Acc<T>(&x)[E]) {
#pragma unroll
        for (int k = 0; k < E; ++k) x[k] = 0;
      },
      [=](std::int64_t v) { from_acc(Acc<T>{0}, out[v]); });
}

// Zeros in the columns after the first V of a row of an output. These columns are few, so short code matters more than
// wide stores.
template <int threads_per_row, class T>
SPO_DEVICE void write_padding(T* out, std::int64_t V, std::int64_t padding) {
#pragma unroll 1
  for (std::int64_t v = threadIdx.x % threads_per_row; v < padding; v += threads_per_row)
    from_acc(Acc<T>{0}, out[V + v]);
}

}  // namespace spo::cuda
