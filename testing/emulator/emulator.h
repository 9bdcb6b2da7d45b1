// CUDA C++ on a CPU, for tests: a kernel's source is compiled by the host's compiler, and each of its threads is a coroutine
// that runs until a barrier or a shuffle. Blocks run one after the other, in no particular order; a block's threads run forwards
// or backwards, so that a kernel which lacks a barrier, or counts on an order, gives other numbers than its composition.
//
// It has what kernels/cuda uses and no more: __syncthreads, shuffles of whole warps, static and dynamic shared memory. What a
// device does otherwise: rounding of expf and its like, and memory that is not coherent between threads without a barrier.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __constant__ static
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(n)
#define __shared__ static  // blocks run one after the other: one copy is enough
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulator::shared())

struct Dim3 {
  unsigned x, y, z;
};

namespace emulator {

constexpr size_t STACK = 64 << 10;

enum Wait { READY, WARP, BLOCK, DONE };

struct Thread {
  jmp_buf at;  // where it waits
  std::unique_ptr<char[]> stack;
  Dim3 index;
  Wait wait;
  bool begun;
};

struct State {
  Dim3 grid, block, block_index;
  std::vector<Thread> threads;
  jmp_buf scheduler;
  size_t now;                         // the thread that runs
  std::vector<uint64_t> lanes;        // what each thread gives to a shuffle
  std::vector<double> dynamic;        // shared memory, at least 16-byte aligned by the allocator
  void (*run)(void*);
  void* argument;
};
inline State state;

inline Thread& me() { return state.threads[state.now]; }
inline void* shared() { return state.dynamic.data(); }

inline void wait(Wait at) {
  Thread& t = me();
  t.wait = at;
  if (!_setjmp(t.at)) _longjmp(state.scheduler, 1);
}

inline void entry() {
  state.run(state.argument);
  me().wait = DONE;
  _longjmp(state.scheduler, 1);
}

// Runs a thread until it waits or ends. A context is only used to begin on a stack of its own: swapcontext asks the system for
// the signals' mask every time.
inline void resume(Thread& t) {
  if (_setjmp(state.scheduler)) return;
  if (t.begun) _longjmp(t.at, 1);
  t.begun = true;
  ucontext_t context;
  getcontext(&context);
  if (!t.stack) t.stack.reset(new char[STACK]);
  context.uc_stack.ss_sp = t.stack.get(), context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  setcontext(&context);
}

// Lets all threads go on that wait for `at` together: those in [from, to) that are not done. False where none does.
inline bool release(Wait at, size_t from, size_t to) {
  bool any = false;
  for (size_t i = from; i < to; i++) {
    if (state.threads[i].wait == DONE) continue;
    if (state.threads[i].wait != at) return false;
    any = true;
  }
  for (size_t i = from; any && i < to; i++)
    if (state.threads[i].wait == at) state.threads[i].wait = READY;
  return any;
}

// False where threads wait for each other at different places.
inline bool run_block(bool backwards) {
  const size_t n = state.threads.size();
  for (size_t i = 0; i < n; i++) {
    Thread& t = state.threads[i];
    const unsigned at = unsigned(i);
    t.index = {at % state.block.x, at / state.block.x % state.block.y, at / (state.block.x * state.block.y)};
    t.wait = READY, t.begun = false;
  }
  for (;;) {
    bool ran = false, all_done = true;
    for (size_t i = 0; i < n; i++) {
      state.now = backwards ? n - 1 - i : i;
      Thread& t = me();
      if (t.wait != READY) continue;
      ran = true;
      resume(t);
    }
    for (const Thread& t : state.threads) all_done &= t.wait == DONE;
    if (all_done) return true;
    bool released = false;
    for (size_t w = 0; w < n; w += 32) released |= release(WARP, w, std::min(n, w + 32));
    released |= release(BLOCK, 0, n);
    if (!ran && !released) return false;
  }
}

template <class F, class... A, size_t... I>
void call(F* f, void** args, void (*)(A...), std::index_sequence<I...>) {
  f(*static_cast<std::remove_reference_t<A>*>(args[I])...);
}

// 0: done. 1: threads of a block wait for each other at different places.
template <class... A>
int launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, size_t shared_bytes, void** args) {
  struct Call {
    void (*kernel)(A...);
    void** args;
  } it{kernel, args};
  state.run = [](void* c) {
    auto* it = static_cast<Call*>(c);
    call(it->kernel, it->args, it->kernel, std::index_sequence_for<A...>());
  };
  state.argument = &it;
  state.grid = {grid[0], grid[1], grid[2]}, state.block = {block[0], block[1], block[2]};
  const size_t n = size_t(block[0]) * block[1] * block[2];
  const uint64_t blocks = uint64_t(grid[0]) * grid[1] * grid[2];
  if (state.threads.size() != n) state.threads = std::vector<Thread>(n);
  state.lanes.assign(n, 0);
  // A step that has no divisor in common with the number of blocks visits them all.
  uint64_t step = blocks * 5 / 8 + 1;
  while (std::__gcd(step, blocks) != 1) step++;
  for (uint64_t i = 0, b = 0; i < blocks; i++, b = (b + step) % blocks) {
    state.block_index = {unsigned(b % grid[0]), unsigned(b / grid[0] % grid[1]), unsigned(b / grid[0] / grid[1])};
    state.dynamic.assign((shared_bytes + 7) / 8, NAN);  // nobody has written it yet
    if (!run_block(i % 2)) return 1;
  }
  return 0;
}

}  // namespace emulator

#define threadIdx (emulator::me().index)
#define blockIdx (emulator::state.block_index)
#define blockDim (emulator::state.block)
#define gridDim (emulator::state.grid)

inline void __syncthreads() { emulator::wait(emulator::BLOCK); }
inline void __syncwarp(unsigned = ~0u) { emulator::wait(emulator::WARP); }

template <class X>
X __shfl_sync(unsigned, X x, int lane) {
  static_assert(sizeof(X) <= 8);
  const size_t me = emulator::state.now;
  memcpy(&emulator::state.lanes[me], &x, sizeof(X));
  __syncwarp();
  const size_t from = me / 32 * 32 + size_t(lane & 31);
  memcpy(&x, &emulator::state.lanes[std::min(from, emulator::state.lanes.size() - 1)], sizeof(X));
  __syncwarp();
  return x;
}

template <class X>
X __shfl_xor_sync(unsigned mask, X x, int by) {
  return __shfl_sync(mask, x, int(emulator::state.now % 32) ^ by);
}

inline float __int_as_float(int x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) {
  int y;
  memcpy(&y, &x, 4);
  return y;
}
// Rounded, never contracted with what comes after.
__attribute__((noinline)) inline float __fmul_rn(float a, float b) { return a * b; }
__attribute__((noinline)) inline float __fadd_rn(float a, float b) { return a + b; }

inline int atomicMax(int* at, int x) {
  const int before = *at;
  *at = std::max(before, x);
  return before;
}

using std::max;
using std::min;
