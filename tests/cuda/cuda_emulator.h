// Runs CUDA kernels on the CPU, for tests of csrc/cuda without a GPU: one fiber for each CUDA thread, one cluster of
// blocks at a time.
//
// It models blocks, warps, barriers, shuffles, shared memory and vector loads. A thread runs until it waits for others.
// When all threads of a warp wait, the next warp runs. Warps run in ascending order in even blocks and in descending
// order in odd ones, so a missing barrier gives a wrong result in one of the orders. The program stops where a GPU may
// hang or compute garbage: a barrier that some threads never reach, a shuffle of lanes that have exited, a misaligned
// vector.
//
// Blocks of a cluster take turns in the same way: a block runs until it waits for the cluster's barrier or for bytes.
// Each block has dynamic shared memory, which starts as NaN; a kernel of clusters must not have static shared memory. A
// bulk copy happens at once in even clusters, and in odd ones when a thread waits for its barrier. A thread that reads
// too early then sees NaN or an older row. A store in another block's shared memory arrives at the same time as a bulk
// copy would. The program stops at a copy that nobody waits for, and at a store in a block that has not begun or has
// returned.
//
// It models neither time nor data races between threads that run without waiting. The results of approximate
// instructions go through off_by(), which moves them by a hash of the result: equal results move equally.
//
// Build with -std=c++20 -fno-strict-aliasing: vectors and their elements alias, as nvcc lets them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef __shared__
#define __shared__ static thread_local  // except in clusters, a CPU thread runs one block at a time
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 128 * 1024;

inline int capability = 90;    // compute capability of the emulated device, times ten: 90 has clusters, 80 has none
inline long clusters_run = 0;  // clusters that have run, of kernels with dynamic shared memory

// A stack, and the place where execution left it.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void spo_emulator_switch(void** save, void* load);
asm(R"(
.text
.weak spo_emulator_switch
.type spo_emulator_switch,@function
spo_emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size spo_emulator_switch,.-spo_emulator_switch
)");
inline void switch_context(Context& from, Context& to) { spo_emulator_switch(&from.stack_pointer, to.stack_pointer); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  constexpr int kSaved = 6;  // registers that the switch restores before it returns to `entry`
  auto** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;  // aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSaved; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context {
  ucontext_t context;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
inline void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = kStack;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

enum class State { ready, at_collective, at_barrier, at_cluster, at_mbarrier, done };

struct Copy {
  void* to;
  const void* from;  // null: copies `values`
  std::size_t bytes;
  float values[4] = {};
};

// A phase ends after one arrival and the bytes that it announces.
struct Mbarrier {
  unsigned phase = 0;
  bool arrived = false;
  std::int64_t missing = 0;   // bytes announced that have not come
  std::vector<Copy> waiting;  // copies to make when a thread waits

  void advance() {
    if (!arrived || missing) return;
    ++phase;
    arrived = false;
  }
  void make(const Copy& copy) {
    std::memcpy(copy.to, copy.from ? copy.from : copy.values, copy.bytes);
    missing -= static_cast<std::int64_t>(copy.bytes);
    advance();
  }
  bool passed(unsigned parity) {  // called for a thread that waits
    if (phase % 2 != parity % 2) return true;
    std::vector<Copy> copies;
    copies.swap(waiting);
    for (const Copy& copy : copies) make(copy);
    return phase % 2 != parity % 2;
  }
};

struct Thread {
  uint3 index;
  int lane = 0, warp = 0;
  State state = State::ready;
  std::uint32_t mask = 0;              // of the collective at which it waits
  std::uint64_t given = 0, taken[32];  // its value for the collective, and the values of all lanes
  Mbarrier* awaited = nullptr;         // it waits for the phase of this parity
  unsigned parity = 0;
  Context context;
  char* stack = nullptr;
};

struct FreeAligned {
  void operator()(char* p) const { std::free(p); }
};

struct Block {
  dim3 grid, size;
  uint3 index;
  std::vector<Thread> threads;
  std::vector<Block>* cluster = nullptr;
  bool begun = false, late_copies = false;
  std::unique_ptr<char, FreeAligned> shared;
  std::size_t shared_bytes = 0;
  std::map<const void*, Mbarrier> mbarriers;
  Context scheduler;
  void (*run)(const void*) = nullptr;
  const void* kernel = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local Thread* self = nullptr;
inline thread_local const void* scheduler_stack = nullptr;
inline thread_local std::size_t scheduler_stack_size = 0;

[[noreturn]] inline void stop(const char* what) {
  std::fprintf(stderr, "cuda_emulator: %s (block %u", what, block->index.x);
  if (self) std::fprintf(stderr, ", thread %u", self->index.x);
  std::fprintf(stderr, ")\n");
  std::abort();
}

// Switches from a thread to the scheduler. Returns when the scheduler resumes the thread.
inline void yield() {
  Thread& me = *self;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(me.state == State::done ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
  switch_context(me.context, block->scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  switch_context(me.context, block->scheduler);
#endif
}

inline void resume(Thread& thread) {
  self = &thread;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, thread.stack, kStack);
  switch_context(block->scheduler, thread.context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  switch_context(block->scheduler, thread.context);
#endif
  self = nullptr;
}

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  block->run(block->kernel);
  self->state = State::done;
  yield();
  std::abort();
}

// If every lane of a mask has arrived at a collective, gives each lane the values of the others.
inline bool release_collective(Thread* warp, int lanes) {
  for (int i = 0; i < lanes; ++i) {
    if (warp[i].state != State::at_collective) continue;
    const std::uint32_t mask = warp[i].mask;
    for (int k = 0; k < kWarp; ++k) {
      if (!(mask >> k & 1)) continue;
      self = &warp[i];
      if (k >= lanes || warp[k].state == State::done) stop("a *_sync mask names a lane that has exited");
      if (warp[k].state != State::at_collective) stop("a *_sync waits for a lane that is at a barrier");
      if (warp[k].mask != mask) stop("lanes met in a *_sync with different masks");
    }
    for (int k = 0; k < kWarp; ++k) {
      if (!(mask >> k & 1)) continue;
      for (int j = 0; j < kWarp; ++j) warp[k].taken[j] = mask >> j & 1 ? warp[j].given : 0;
      warp[k].state = State::ready;
    }
    self = nullptr;
    return true;
  }
  return false;
}

inline bool can_run(Thread& t) {
  return t.state == State::ready || (t.state == State::at_mbarrier && t.awaited->passed(t.parity));
}

// Runs a block until each thread waits for other blocks or for bytes, or has returned. False if no thread could run.
inline bool run_block(Block& current, bool backwards) {
  block = &current;
  auto& threads = current.threads;
  const int n = static_cast<int>(threads.size()), warps = (n + kWarp - 1) / kWarp;
  for (bool ran = false;; ran = true) {
    bool moved = false;
    for (int w = 0; w < warps; ++w) {
      const int warp = backwards ? warps - 1 - w : w, lanes = std::min(kWarp, n - warp * kWarp);
      Thread* first = &threads[warp * kWarp];
      do {
        for (int i = 0; i < lanes; ++i) {
          if (!can_run(first[i])) continue;
          current.begun = moved = true;
          first[i].state = State::ready;
          resume(first[i]);
        }
      } while (release_collective(first, lanes));
    }
    int waiting = 0, done = 0;
    for (const Thread& t : threads) waiting += t.state == State::at_barrier, done += t.state == State::done;
    if (waiting == n) {
      for (Thread& t : threads) t.state = State::ready;
      continue;
    }
    if (waiting && done) stop("__syncthreads() is not reached by all threads of the block: some have returned");
    if (!moved) return ran;
  }
}

inline void run_cluster(std::vector<Block>& blocks, bool backwards) {
  for (;;) {
    bool moved = false;
    for (std::size_t b = 0; b < blocks.size(); ++b)
      moved |= run_block(blocks[backwards ? blocks.size() - 1 - b : b], (blocks[0].index.x + b) % 2 == 1);
    std::size_t all = 0, waiting = 0, done = 0;
    for (const Block& b : blocks)
      for (const Thread& t : b.threads) ++all, waiting += t.state == State::at_cluster, done += t.state == State::done;
    if (done == all) break;
    if (waiting == all) {
      for (Block& b : blocks)
        for (Thread& t : b.threads) t.state = State::ready;
      continue;
    }
    if (waiting && done) stop("the cluster's barrier is not reached by all threads: some have returned");
    if (!moved) stop("deadlock");
  }
  for (const Block& b : blocks)
    for (const auto& entry : b.mbarriers)
      if (entry.second.missing) stop("nobody waits for a bulk copy or a store in another block");
}

struct alignas(64) Stack {
  char bytes[kStack];
};
inline thread_local std::vector<std::unique_ptr<Stack>> stacks;

// One launch. Arguments are copied, as a launch copies them.
template <class... Params, class... Args>
void launch_clusters(void (*kernel)(Params...), unsigned clusters, unsigned cluster, unsigned threads, int shared_bytes,
                     const Args&... args) {
  using Arguments = std::tuple<std::decay_t<Params>...>;
  struct Call {
    void (*kernel)(Params...);
    Arguments arguments;
  };
  const Call call{kernel, Arguments(static_cast<std::decay_t<Params>>(args)...)};
  while (stacks.size() < std::size_t{cluster} * threads) stacks.emplace_back(new Stack);

  for (unsigned c = 0; c < clusters; ++c) {
    std::vector<Block> blocks(cluster);
    for (unsigned b = 0; b < cluster; ++b) {
      Block& current = blocks[b];
      current.grid = dim3(clusters * cluster);
      current.size = dim3(threads);
      current.index = {c * cluster + b, 0, 0};
      current.cluster = &blocks;
      current.late_copies = c % 2 == 1;
      current.kernel = &call;
      current.run = [](const void* c) {
        const auto& call = *static_cast<const Call*>(c);
        std::apply(call.kernel, call.arguments);
      };
      if (shared_bytes) {
        void* shared = nullptr;
        if (posix_memalign(&shared, 128, static_cast<std::size_t>(shared_bytes))) std::abort();
        std::memset(shared, 0xff, static_cast<std::size_t>(shared_bytes));
        current.shared.reset(static_cast<char*>(shared));
        current.shared_bytes = static_cast<std::size_t>(shared_bytes);
      }
      current.threads.assign(threads, {});
      for (unsigned i = 0; i < threads; ++i) {
        Thread& t = current.threads[i];
        t.index = {i, 0, 0};
        t.lane = static_cast<int>(i % kWarp);
        t.warp = static_cast<int>(i / kWarp);
        t.stack = stacks[b * threads + i]->bytes;
        make_context(t.context, t.stack, enter);
      }
    }
    run_cluster(blocks, c % 2 == 1);
    clusters_run += shared_bytes > 0;
  }
  block = nullptr;
}

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), unsigned grid, unsigned threads, const Args&... args) {
  launch_clusters(kernel, grid, 1, threads, 0, args...);
}

inline char* dynamic_shared() { return block->shared.get(); }

// Offset of p in the block's dynamic shared memory, which must hold `bytes` from there on.
inline std::size_t shared_offset(const void* p, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(block->shared.get()), at = reinterpret_cast<std::uintptr_t>(p);
  if (at < begin || at + bytes > begin + block->shared_bytes) stop("an address outside the block's shared memory");
  return at - begin;
}

inline void cluster_sync() {
  self->state = State::at_cluster;
  yield();
}

template <class T>
void store_async(T* own, unsigned rank, const T& value, std::uint64_t* at) {
  if (rank >= block->cluster->size()) stop("a store in a block outside the cluster");
  Block& peer = (*block->cluster)[rank];
  if (!peer.begun) stop("a store in the shared memory of a block that has not begun");
  bool left = true;
  for (const Thread& t : peer.threads) left &= t.state == State::done;
  if (left) stop("a store in the shared memory of a block that has returned");
  const std::size_t offset = shared_offset(own, sizeof(T));
  if (offset % sizeof(T)) stop("misaligned vector access");
  const auto found = peer.mbarriers.find(peer.shared.get() + shared_offset(at, 8));
  if (found == peer.mbarriers.end()) stop("an mbarrier of another block is not initialized");
  Copy copy{peer.shared.get() + offset, nullptr, sizeof(T)};
  std::memcpy(copy.values, &value, sizeof(T));
  if (block->late_copies)
    found->second.waiting.push_back(copy);
  else
    found->second.make(copy);
}

inline void mbarrier_init(std::uint64_t* at) {
  if (shared_offset(at, 8) % 8) stop("a misaligned mbarrier");
  if (!block->mbarriers.emplace(at, Mbarrier{}).second) stop("an mbarrier is initialized twice");
}
inline Mbarrier& mbarrier(const std::uint64_t* at) {
  const auto found = block->mbarriers.find(at);
  if (found == block->mbarriers.end()) stop("an mbarrier is not initialized");
  return found->second;
}
inline void mbarrier_expect(std::uint64_t* at, std::uint32_t bytes) {
  Mbarrier& barrier = mbarrier(at);
  if (barrier.arrived) stop("an mbarrier gets more arrivals than it waits for");
  barrier.arrived = true;
  barrier.missing += bytes;
  barrier.advance();
}
inline void copy_bulk(void* to, const void* from, std::uint32_t bytes, std::uint64_t* at) {
  if (bytes == 0 || bytes % 16 || shared_offset(to, bytes) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16)
    stop("a bulk copy is not of whole aligned vectors");
  Mbarrier& barrier = mbarrier(at);
  if (!barrier.arrived) stop("a bulk copy is started before its bytes are announced");
  if (block->late_copies)
    barrier.waiting.push_back({to, from, bytes});
  else
    barrier.make({to, from, bytes});
}
inline void mbarrier_wait(std::uint64_t* at, unsigned parity) {
  Mbarrier& barrier = mbarrier(at);
  if (barrier.passed(parity)) return;
  self->awaited = &barrier;
  self->parity = parity;
  self->state = State::at_mbarrier;
  yield();
}

inline const std::uint64_t* collective(std::uint32_t mask, std::uint64_t value) {
  if (!(mask >> self->lane & 1)) stop("a *_sync is called by a lane that is not in its mask");
  self->given = value;
  self->mask = mask;
  self->state = State::at_collective;
  yield();
  return self->taken;
}

template <class T>
T from_lane(std::uint32_t mask, T value, int lane) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const std::uint64_t* taken = collective(mask, bits);
  if (!(mask >> lane & 1)) stop("a shuffle reads a lane outside its mask");
  std::memcpy(&value, &taken[lane], sizeof(T));
  return value;
}

template <class T>
void check_aligned(const T* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T)) stop("misaligned vector access");
}

// y, moved by up to `ulps` units in the last place.
inline float off_by(float y, int ulps) {
  if (!std::isnormal(y)) return y;
  std::uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  const std::uint32_t hash = bits * 2654435761u >> 16;
  bits += hash % (2 * ulps + 1) - ulps;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

}  // namespace emulator

#define threadIdx (::emulator::self->index)
#define blockIdx (::emulator::block->index)
#define blockDim (::emulator::block->size)
#define gridDim (::emulator::block->grid)

inline void __syncthreads() {
  emulator::self->state = emulator::State::at_barrier;
  emulator::yield();
}
inline void __syncwarp() { emulator::collective(0xffffffffu, 0); }
template <class T>
T __shfl_xor_sync(std::uint32_t mask, T value, int lanes) {
  return emulator::from_lane(mask, value, emulator::self->lane ^ lanes);
}
template <class T>
T __ldcs(const T* p) {
  emulator::check_aligned(p);
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  emulator::check_aligned(p);
  *p = value;
}
template <class To, class From>
To emulator_bits(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From));
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __uint_as_float(std::uint32_t x) { return emulator_bits<float>(x); }
inline std::uint32_t __float_as_uint(float x) { return emulator_bits<std::uint32_t>(x); }
inline double __hiloint2double(int high, int low) {
  return emulator_bits<double>(static_cast<std::uint64_t>(static_cast<std::uint32_t>(high)) << 32 |
                               static_cast<std::uint32_t>(low));
}
inline int __double2loint(double x) { return static_cast<int>(emulator_bits<std::uint64_t>(x)); }
inline int __double2hiint(double x) { return static_cast<int>(emulator_bits<std::uint64_t>(x) >> 32); }
inline std::uint32_t __funnelshift_r(std::uint32_t low, std::uint32_t high, std::uint32_t bits) {
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(high) << 32 | low) >> (bits & 31));
}
