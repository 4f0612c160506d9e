#include "bandwidth_probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

namespace spo::probe {
namespace {

typedef std::uint32_t Lanes __attribute__((vector_size(16), aligned(4), may_alias));
constexpr std::int64_t kLine = 16;  // floats in a cache line

std::atomic<std::uint32_t> sink;

// Prefetches into L2, as the row kernels do for float32. Prefetching into L1 is slower.
template <int ahead>
inline void prefetch(const float* p) {
  if (ahead) __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + ahead), 0, 2);
}

// xor is one short instruction a vector, so the loop measures memory.
template <int streams, int ahead>
void read_share(const float* p, std::int64_t n) {
  const std::int64_t each = n / (streams * kLine) * kLine;
  Lanes bits[4] = {};
  for (std::int64_t i = 0; i < each; i += kLine)
    for (int s = 0; s < streams; ++s) {
      const float* line = p + s * each + i;
      prefetch<ahead>(line);
      for (int k = 0; k < 4; ++k) bits[k] ^= reinterpret_cast<const Lanes*>(line)[k];
    }
  const Lanes all = bits[0] ^ bits[1] ^ bits[2] ^ bits[3];
  sink = all[0] ^ all[1] ^ all[2] ^ all[3];
}

template <int ahead>
void update_share(float* p, std::int64_t n) {
  for (std::int64_t i = 0; i + kLine <= n; i += kLine) {
    prefetch<ahead>(p + i);
    for (int k = 0; k < 4; ++k) reinterpret_cast<Lanes*>(p + i)[k] ^= 0x80000000u;  // flips the sign
  }
}

// Each thread runs the loop on a share of its own.
template <class T>
double seconds(void (*loop)(T*, std::int64_t), T* data, std::int64_t n, int threads) {
  const std::int64_t each = n / threads;
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(loop, data + t * each, each);
  loop(data, each);
  for (std::thread& worker : workers) worker.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class T>
double fastest(std::initializer_list<void (*)(T*, std::int64_t)> loops, T* data, std::int64_t n, int threads) {
  double best = 1e300;
  for (const auto loop : loops) best = std::min(best, seconds(loop, data, n, std::max(threads, 1)));
  return best;
}

}  // namespace

double seconds_to_read(const float* data, std::int64_t n, int threads) {
  return fastest<const float>({read_share<1, 0>, read_share<1, 4608>, read_share<4, 0>, read_share<4, 4608>}, data, n,
                              threads);
}
double seconds_to_update(float* data, std::int64_t n, int threads) {
  return fastest<float>({update_share<0>, update_share<4608>}, data, n, threads);
}

}  // namespace spo::probe
