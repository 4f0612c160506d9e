// Runs CUDA kernels on the CPU, one fiber a CUDA thread, one block at a time: for tests of csrc/cuda without a GPU.
//
// It models blocks, warps, barriers, shuffles, shared memory and vector loads. A thread runs until it waits for others;
// warps take turns only then, forwards in even blocks and backwards in odd ones, so that a result that needs a barrier
// that is not there comes out wrong in one order or the other. It stops the program at what a GPU may answer with a
// hang or garbage: a barrier that some threads never reach, a shuffle of lanes that are not there, a misaligned vector.
// It does not model data races within those turns, or anything that takes time. Approximate instructions go
// through off_by(): up or down by a hash of the result, always the same for the same result.
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
#define __shared__ static thread_local  // one block at a time on a thread
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace emulator {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 128 * 1024;

// A stack and where execution left it.
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
  constexpr int kSaved = 6;  // the registers that the switch restores before it returns to `entry`
  auto** top = reinterpret_cast<void**>(stack + kStack - 64);
  *--top = nullptr;  // so that the stack is aligned as after a call
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

enum class State { ready, at_collective, at_barrier, done };

struct Thread {
  uint3 index;
  int lane = 0, warp = 0;
  State state = State::ready;
  std::uint32_t mask = 0;              // of the collective it waits at
  std::uint64_t given = 0, taken[32];  // to the collective, and what every lane gave
  Context context;
  char* stack = nullptr;
};

struct Block {
  dim3 grid, size;
  uint3 index;
  std::vector<Thread> threads;
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

// From a thread to the scheduler, until the thread is ready again.
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

// Every lane of a mask has arrived at a collective: give each what the others gave.
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

inline void run_block(bool backwards) {
  auto& threads = block->threads;
  const int n = static_cast<int>(threads.size()), warps = (n + kWarp - 1) / kWarp;
  for (;;) {
    for (int w = 0; w < warps; ++w) {
      const int warp = backwards ? warps - 1 - w : w, lanes = std::min(kWarp, n - warp * kWarp);
      Thread* first = &threads[warp * kWarp];
      do {
        for (int i = 0; i < lanes; ++i)
          if (first[i].state == State::ready) resume(first[i]);
      } while (release_collective(first, lanes));
    }
    int waiting = 0, done = 0;
    for (const Thread& t : threads) waiting += t.state == State::at_barrier, done += t.state == State::done;
    if (done == n) return;
    if (done) stop("__syncthreads() is not reached by all threads of the block: some have returned");
    if (waiting != n) stop("deadlock");
    for (Thread& t : threads) t.state = State::ready;
  }
}

struct alignas(64) Stack {
  char bytes[kStack];
};
inline thread_local std::vector<std::unique_ptr<Stack>> stacks;

// One launch. Arguments are copied, as a launch copies them.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), unsigned grid, unsigned threads, const Args&... args) {
  using Arguments = std::tuple<std::decay_t<Params>...>;
  struct Call {
    void (*kernel)(Params...);
    Arguments arguments;
  };
  const Call call{kernel, Arguments(static_cast<std::decay_t<Params>>(args)...)};
  while (stacks.size() < threads) stacks.emplace_back(new Stack);

  Block current;
  current.grid = dim3(grid);
  current.size = dim3(threads);
  current.kernel = &call;
  current.run = [](const void* c) {
    const auto& call = *static_cast<const Call*>(c);
    std::apply(call.kernel, call.arguments);
  };
  block = &current;
  for (unsigned b = 0; b < grid; ++b) {
    current.index = {b, 0, 0};
    current.threads.assign(threads, {});
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = current.threads[i];
      t.index = {i, 0, 0};
      t.lane = static_cast<int>(i % kWarp);
      t.warp = static_cast<int>(i / kWarp);
      t.stack = stacks[i]->bytes;
      make_context(t.context, t.stack, enter);
    }
    run_block(b % 2 == 1);
  }
  block = nullptr;
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

// y, moved by up to so many ulp.
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
