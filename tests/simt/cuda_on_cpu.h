// Runs CUDA kernels on a CPU: the same source compiled by g++, with one fiber per CUDA thread.
//
// This tests the results of the kernels on machines without a GPU. The threads of a block take turns: each runs until
// it reaches a barrier or a warp operation. A missing barrier, or blocks that depend on each other's order, cause
// results that change with the order (`simt_order`): 0 is ascending, 1 descending; any other number is the seed of a
// random schedule. If it is even, the order of threads changes between any two barriers or warp operations, and warps
// overtake each other; if it is odd, a random warp runs until it waits for the others. Not covered: speed, and code that
// only nvcc rejects (other tests compile the same source with NVRTC).
//
// Shared memory is filled with NaN before each block. Of memory ordering, only the ticket of the last block
// (`atomicInc`) is checked: the thread must execute a fence of the device between its last barrier and the ticket, so
// that other blocks see the writes before the ticket, and another one after it.
//
// If a thread returns from a kernel while another of its block waits at a barrier, the process is aborted with a
// message; on a GPU this hangs or is undefined.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <functional>
#include <numeric>
#include <ucontext.h>
#include <utility>
#include <vector>
#include <algorithm>
#include <random>

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __shared__ static __attribute__((section("simt_shared")))
#define __constant__ static
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 { unsigned x, y, z; };
typedef uint3 dim3;
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// The first and last byte of all variables in shared memory; null in a source without any.
extern "C" char __start_simt_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_simt_shared[] __attribute__((weak, visibility("hidden")));

namespace simt {

constexpr size_t kStack = 128 << 10;
constexpr int kWarp = 32;

struct Warp {
  int live = 0, arrived = 0;
  unsigned generation = 0;
  uint64_t slot[kWarp];
  float a[16][16], b[8][16];  // operands of a matrix product: rows of A, columns of B
};

struct Thread {
  uint3 index;
  Warp* warp = nullptr;
  int lane = 0;
  bool created = false, done = false;
  bool waits = false;     // at a barrier of the block,
  unsigned waits_in = 0;  // whose generation was this
  bool released = false, unacquired = false;  // a fence before the ticket; a ticket without a fence after it
  ucontext_t context;
  jmp_buf where;
  std::vector<char> stack;
};

inline Thread* current;
inline uint3 block_index, block_dim, grid_dim;
inline jmp_buf scheduler;
inline ucontext_t scheduler_context;
inline int live, waiting;
inline unsigned generation;
inline const std::function<void()>* body;
inline unsigned order_seed = 0;
inline const char* problem = nullptr;  // the first use that is undefined on a GPU
inline std::vector<Thread*> pool;

inline void yield() {
  if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}

inline void barrier() {
  current->released = false;
  unsigned mine = generation;
  if (++waiting == live) {
    waiting = 0;
    ++generation;
    return;
  }
  current->waits = true;
  current->waits_in = mine;
  while (mine == generation) yield();
  current->waits = false;
}

inline void warp_barrier() {
  Warp* warp = current->warp;
  unsigned mine = warp->generation;
  if (++warp->arrived == warp->live) {
    warp->arrived = 0;
    ++warp->generation;
    return;
  }
  while (mine == warp->generation) yield();
}

inline void fence() {
  current->released = true;
  current->unacquired = false;
}

inline void take_ticket() {
  if (!current->released) problem = "a ticket is taken without a fence before it";
  current->released = false;
  current->unacquired = true;
}

inline void leave() {
  if (current->unacquired) problem = "a ticket is taken without a fence after it";
  current->done = true;
  --live;
  --current->warp->live;
  if (waiting || current->warp->arrived) {
    std::fprintf(stderr, "cuda_on_cpu: a thread of block (%u,%u,%u) returned while others wait at a barrier\n",
                 block_index.x, block_index.y, block_index.z);
    std::abort();
  }
}

// The function of every fiber, which is used for one thread of each block: creating a context takes system calls.
inline void trampoline() {
  for (;;) {
    (*body)();
    leave();
    yield();
  }
}

// Order numbers as `order_seed` demands.
inline void arrange(std::vector<int>& order, std::mt19937& random) {
  if (order_seed == 1) std::reverse(order.begin(), order.end());
  if (order_seed > 1) std::shuffle(order.begin(), order.end(), random);
}

// `shared` to `shared_end` is the block's shared memory.
inline void run_block(int threads, char* shared, char* shared_end) {
  if (shared) std::memset(shared, 0xff, shared_end - shared);
  static std::vector<Warp> warps;
  warps.assign((threads + kWarp - 1) / kWarp, Warp{});
  while ((int)pool.size() < threads) {
    pool.push_back(new Thread);
    pool.back()->stack.resize(kStack);
  }
  live = threads;
  waiting = 0;
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) {
    Thread& thread = *pool[t];
    thread.index = {t % block_dim.x, t / block_dim.x % block_dim.y, t / block_dim.x / block_dim.y};
    thread.warp = &warps[t / kWarp];
    thread.lane = t % kWarp;
    thread.done = thread.waits = thread.released = thread.unacquired = false;
    ++thread.warp->live;
    order[t] = t;
  }
  std::mt19937 random(order_seed + 7919 * block_index.x);
  arrange(order, random);
  const auto can_run = [threads](int warp) {
    for (int t = warp * kWarp; t < std::min(threads, (warp + 1) * kWarp); ++t)
      if (!pool[t]->done && !(pool[t]->waits && pool[t]->waits_in == generation)) return true;
    return false;
  };
  volatile int running = 0;  // warp, if one runs at a time
  while (live) {
    volatile unsigned resting = 0, step = 1, first = 0;  // bit w of `resting`: warp w does not run in this turn
    if (order_seed > 1 && order_seed % 2) {
      while (!can_run(running)) running = random() % warps.size();
      resting = ~(1u << running);
    } else if (order_seed > 1) {
      resting = random(), first = random() % threads;
      do step = random() % threads;
      while (std::gcd(unsigned(step), unsigned(threads)) != 1);
    }
    for (volatile int i = 0; i < threads; i = i + 1) {
      const int number = order[(i * step + first) % threads];
      Thread* thread = pool[number];
      if (thread->done || resting >> number / kWarp & 1) continue;
      current = thread;
      if (_setjmp(scheduler)) continue;
      if (thread->created) _longjmp(thread->where, 1);
      thread->created = true;
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = thread->stack.data();
      thread->context.uc_stack.ss_size = thread->stack.size();
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, trampoline, 0);
      swapcontext(&scheduler_context, &thread->context);
    }
  }
}

inline void run(const unsigned* grid, const unsigned* block, const std::function<void()>& kernel, char* shared,
                char* shared_end) {
  grid_dim = {grid[0], grid[1], grid[2]};
  block_dim = {block[0], block[1], block[2]};
  body = &kernel;
  unsigned blocks = grid[0] * grid[1] * grid[2];
  std::vector<int> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  std::mt19937 random(order_seed);
  arrange(order, random);
  for (unsigned b : order) {
    block_index = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
    run_block(block[0] * block[1] * block[2], shared, shared_end);
  }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}
template <class... A>
void call(void (*kernel)(A...), void** arguments) { call(kernel, arguments, std::index_sequence_for<A...>{}); }

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
  Warp* warp = current->warp;
  std::memcpy(&warp->slot[current->lane], &value, sizeof(T));
  warp_barrier();
  T got;
  std::memcpy(&got, &warp->slot[from & 31], sizeof(T));
  warp_barrier();
  return got;
}

}  // namespace simt

#define threadIdx (simt::current->index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_dim)
#define gridDim (simt::grid_dim)

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp(unsigned = ~0u) { simt::warp_barrier(); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() {}
template <class T> T __shfl_sync(unsigned, T value, int lane, int = 32) { return simt::exchange(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return simt::exchange(value, simt::current->lane ^ mask);
}
template <class T> T __shfl_down_sync(unsigned, T value, int by, int = 32) {
  int from = simt::current->lane + by;
  T got = simt::exchange(value, from);
  return from < 32 ? got : value;
}
template <class T> T __shfl_up_sync(unsigned, T value, int by, int = 32) {
  int from = simt::current->lane - by;
  T got = simt::exchange(value, from);
  return from >= 0 ? got : value;
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  simt::Warp* warp = simt::current->warp;
  warp->slot[simt::current->lane] = predicate != 0;
  simt::warp_barrier();
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= unsigned(warp->slot[lane] != 0) << lane;
  simt::warp_barrier();
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T atomicAdd(T* p, T v) { T old = *p; *p = old + v; return old; }
template <class T> T atomicMax(T* p, T v) { T old = *p; *p = std::max(old, v); return old; }
template <class T> T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }
inline unsigned atomicInc(unsigned* p, unsigned top) { simt::take_ticket(); unsigned old = *p; *p = old >= top ? 0 : old + 1; return old; }
inline float __int_as_float(int x) { float f; std::memcpy(&f, &x, 4); return f; }
inline int __float_as_int(float f) { int x; std::memcpy(&x, &f, 4); return x; }
inline float __uint_as_float(unsigned x) { float f; std::memcpy(&f, &x, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned x; std::memcpy(&x, &f, 4); return x; }
inline float __expf(float x) { return std::exp(x); }
using std::isfinite;
using std::isnan;
using std::max;
using std::min;

typedef unsigned long long cudaGraphConditionalHandle;
// Here the handle of a conditional node is the address of an unsigned integer.
inline void cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned value) {
  *reinterpret_cast<unsigned*>(handle) = value;
}

// 16-bit floats stored as bits, and the tensor core product m16n8k16 with the fragment layout of the PTX manual.
inline float simt_half_to_float(unsigned short bits) { _Float16 h; std::memcpy(&h, &bits, 2); return float(h); }
inline unsigned short simt_float_to_half(float f) { _Float16 h = _Float16(f); unsigned short b; std::memcpy(&b, &h, 2); return b; }
inline float simt_bfloat_to_float(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }
inline unsigned short simt_float_to_bfloat(float f) {
  unsigned x = __float_as_uint(f);
  if (f != f) return 0x7fff;
  return (unsigned short)((x + 0x7fff + ((x >> 16) & 1)) >> 16);
}

template <bool kBfloat>
inline void simt_mma_16816(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  simt::Warp* warp = simt::current->warp;
  int lane = simt::current->lane, group = lane / 4, member = lane % 4;
  auto to_float = [](unsigned word, int high) {
    unsigned short bits = (unsigned short)(high ? word >> 16 : word);
    return kBfloat ? simt_bfloat_to_float(bits) : simt_half_to_float(bits);
  };
  // Lane 4g + m holds of a rows g and g + 8, of b column g, both at k = 2m, 2m + 1, 2m + 8, 2m + 9.
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) warp->a[group + 8 * (i % 2)][2 * member + 8 * (i / 2) + half] = to_float(a[i], half);
    for (int i = 0; i < 2; ++i) warp->b[group][2 * member + 8 * i + half] = to_float(b[i], half);
  }
  simt::warp_barrier();
  for (int i = 0; i < 4; ++i) {
    const float *x = warp->a[group + 8 * (i / 2)], *y = warp->b[2 * member + i % 2];
    double sum = d[i];
    for (int k = 0; k < 16; ++k) sum += double(x[k]) * double(y[k]);
    d[i] = float(sum);
  }
  simt::warp_barrier();
}

extern "C" inline __attribute__((used)) void simt_order(unsigned seed) { simt::order_seed = seed; }

// Return the first problem since the last call, or null.
extern "C" inline __attribute__((used)) const char* simt_problem() { return std::exchange(simt::problem, nullptr); }

#define SIMT_ENTRY(name)                                                                          \
  extern "C" __attribute__((used)) void launch_##name(const unsigned* grid, const unsigned* block, void** arguments) { \
    simt::run(grid, block, [&] { simt::call(name, arguments); }, __start_simt_shared, __stop_simt_shared);             \
  }
