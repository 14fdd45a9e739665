// Runs CUDA kernels on the host, one fiber per thread, so that device code is tested without a GPU.
//
// Compile a .cu with g++ -x c++ -DSPKFAST_SIMT. Blocks run one after another. The threads of a
// block run one at a time, in ascending or descending order, each until it waits at a barrier or a
// warp collective. A missing barrier therefore shows in one order or the other, dynamic shared
// memory starts as NaN, and misuse that a GPU would answer with garbage is an error that names the
// line. Not modelled: static shared memory is not poisoned, memory ordering, timing, tensor cores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define __align__(bytes) alignas(bytes)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct int2 {
  int x, y;
};
struct alignas(8) short4 {
  short x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }

using cudaStream_t = void*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};

namespace simt {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedLimit = 48 * 1024;  // What CUDA grants without an opt-in.
constexpr size_t kCanaryBytes = 64;

enum class State { kReady, kBarrier, kCollective, kDone };

struct Thread {
#if defined(__x86_64__)
  void* context;
#else
  ucontext_t context;
#endif
  State state;
  uint3 index;
  unsigned number;
  const char* file;  // Where the thread waits.
  int line;
  unsigned mask;
  unsigned source;
  uint64_t value;
  uint64_t result;
};

inline std::vector<Thread> threads;
inline std::unique_ptr<char[]> stacks;
inline size_t num_stacks = 0;
inline Thread scheduler;
inline Thread* current = nullptr;
inline std::function<void()> body;
inline uint3 block_index;
inline dim3 grid_dim, block_dim;
inline std::vector<std::max_align_t> shared_memory;
inline std::map<const void*, size_t> opted_in;  // Shared memory by kernel.
inline int processors = 1;
inline size_t opt_in_limit = 227 * 1024;  // That of sm_90; 99 KiB is the least since sm_80.
inline bool descending = false;
inline std::string message;
inline cudaError_t last_error = cudaSuccess;

inline bool same_place(const Thread& a, const Thread& b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline std::string place(const Thread& t) {
  return std::string(t.file) + ":" + std::to_string(t.line);
}

inline std::string name(const Thread& t) { return "thread " + std::to_string(t.number); }

#if defined(__x86_64__)
// swapcontext would make a system call at every switch.
[[maybe_unused]] __attribute__((naked, noinline)) static void switch_stack(void**, void*) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
inline void switch_to(Thread& from, Thread& to) { switch_stack(&from.context, to.context); }
#else
inline void switch_to(Thread& from, Thread& to) { swapcontext(&from.context, &to.context); }
#endif

inline void yield() { switch_to(*current, scheduler); }

inline void enter() {
  body();
  current->state = State::kDone;
  yield();
}

inline void prepare(Thread& t) {
  char* stack = stacks.get() + t.number * kStackBytes;
#if defined(__x86_64__)
  // Six saved registers, the entry point, and a slot that leaves the stack aligned as after a call.
  auto top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) / 16 * 16;
  auto* frame = reinterpret_cast<void**>(top) - 8;
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(&enter);
  t.context = frame;
#else
  getcontext(&t.context);
  t.context.uc_stack = {stack, 0, kStackBytes};
  makecontext(&t.context, enter, 0);
#endif
}

inline void wait(State state, const char* file, int line) {
  current->state = state;
  current->file = file;
  current->line = line;
  yield();
}

// The thread never runs again: the scheduler gives up on the launch.
[[noreturn]] inline void fail(const std::string& text) {
  message = text;
  for (;;) yield();
}

inline uint64_t collective(unsigned mask, uint64_t value, unsigned source, const char* file,
                           int line) {
  Thread& t = *current;
  t.file = file;
  t.line = line;
  const unsigned lane = t.number % kWarp;
  if (!(mask >> lane & 1))
    fail(place(t) + ": lane " + std::to_string(lane) + " calls but is not in the mask");
  if (!(mask >> source & 1)) {
    fail(place(t) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
         ", which is not in the mask");
  }
  t.mask = mask;
  t.value = value;
  t.source = source;
  wait(State::kCollective, file, line);
  return t.result;
}

// Lets the lanes of one warp that have all arrived at the same collective go on.
inline bool release_warp(unsigned begin) {
  const unsigned end = std::min<size_t>(begin + kWarp, threads.size());
  bool progress = false;
  for (unsigned i = begin; i < end; ++i) {
    Thread& t = threads[i];
    if (t.state != State::kCollective) continue;
    bool complete = true;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(t.mask >> lane & 1)) continue;
      if (begin + lane >= end || threads[begin + lane].state == State::kDone) {
        message = place(t) + ": lane " + std::to_string(lane) + " is in the mask but has exited";
        return false;
      }
      const Thread& other = threads[begin + lane];
      complete &= other.state == State::kCollective && other.mask == t.mask && same_place(other, t);
    }
    if (!complete) continue;
    for (unsigned lane = 0; lane < kWarp; ++lane) {
      if (!(t.mask >> lane & 1)) continue;
      Thread& other = threads[begin + lane];
      other.result = threads[begin + other.source].value;
      other.state = State::kReady;
    }
    progress = true;
  }
  return progress;
}

// Called when no thread can run: frees those whose wait is over, or explains why none is.
inline bool release() {
  bool progress = false;
  for (unsigned begin = 0; begin < threads.size(); begin += kWarp) progress |= release_warp(begin);
  if (progress || !message.empty()) return progress;
  const Thread* waiting = nullptr;
  for (const Thread& t : threads) {
    if (t.state == State::kCollective) {
      message = place(t) + ": " + name(t) + " waits for lanes of its mask that do not arrive";
      return false;
    }
    if (t.state == State::kBarrier && !waiting) waiting = &t;
  }
  for (const Thread& t : threads) {
    if (t.state == State::kDone) {
      message = place(*waiting) + ": " + name(*waiting) + " waits at a barrier but " + name(t) +
                " has exited";
      return false;
    }
    if (!same_place(t, *waiting)) {
      message = "barrier in divergent code: " + name(*waiting) + " at " + place(*waiting) + ", " +
                name(t) + " at " + place(t);
      return false;
    }
  }
  for (Thread& t : threads) t.state = State::kReady;
  return true;
}

inline bool run_block(size_t shared_bytes) {
  std::memset(shared_memory.data(), 0xFF, shared_bytes + kCanaryBytes);
  for (unsigned i = 0; i < threads.size(); ++i) {
    Thread& t = threads[i];
    t.number = i;
    t.state = State::kReady;
    t.index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
    prepare(t);
  }
  const auto done = [](const Thread& t) { return t.state == State::kDone; };
  while (!std::all_of(threads.begin(), threads.end(), done)) {
    bool ran = false;
    for (unsigned i = 0; i < threads.size() && message.empty(); ++i) {
      current = &threads[descending ? threads.size() - 1 - i : i];
      if (current->state != State::kReady) continue;
      switch_to(scheduler, *current);
      ran = true;
    }
    if (!message.empty() || (!ran && !release())) return false;
  }
  const auto* canary = reinterpret_cast<const unsigned char*>(shared_memory.data()) + shared_bytes;
  if (!std::all_of(canary, canary + kCanaryBytes, [](unsigned char c) { return c == 0xFF; })) {
    message =
        "a write past the " + std::to_string(shared_bytes) + " bytes of dynamic shared memory";
  }
  return message.empty();
}

inline void launch(const void* function, std::function<void()> kernel, dim3 grid, dim3 block,
                   size_t shared_bytes) {
  const size_t count = size_t{block.x} * block.y * block.z;
  if (count == 0 || count > 1024 || size_t{grid.x} * grid.y * grid.z == 0) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  if (shared_bytes > std::max(kSharedLimit, opted_in[function])) {
    last_error = cudaErrorInvalidValue;
    return;
  }
  if (num_stacks < count) {
    stacks.reset(new char[count * kStackBytes]);
    num_stacks = count;
  }
  shared_memory.resize((shared_bytes + kCanaryBytes) / sizeof(std::max_align_t) + 1);
  threads.assign(count, Thread{});
  body = std::move(kernel);
  grid_dim = grid;
  block_dim = block;
  message.clear();
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z) {
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y) {
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) {
        if (run_block(shared_bytes)) continue;
        last_error = cudaErrorLaunchFailure;
        return;
      }
    }
  }
}

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* file, int line) {
  const uint64_t bits = collective(mask, pack(value), source, file, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define threadIdx (::simt::current->index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_dim)
#define gridDim (::simt::grid_dim)

#define SPKFAST_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                            \
  ((void)(stream), ::simt::launch(                                                                \
                       reinterpret_cast<const void*>(kernel), [=] { kernel(__VA_ARGS__); }, grid, \
                       block, shared_bytes))
#define SPKFAST_DYNAMIC_SHARED(type, name) \
  type* name = reinterpret_cast<type*>(::simt::shared_memory.data())

// The line of a wait is the caller's.
#define SIMT_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_CALLER) { simt::wait(simt::State::kBarrier, file, line); }

inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_CALLER) {
  simt::collective(mask, 0, simt::current->number % simt::kWarp, file, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, unsigned source, SIMT_CALLER) {
  return simt::shuffle(mask, value, source % simt::kWarp, file, line);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned distance, SIMT_CALLER) {
  return simt::shuffle(mask, value, (simt::current->number ^ distance) % simt::kWarp, file, line);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, SIMT_CALLER) {
  const unsigned lane = simt::current->number % simt::kWarp;
  return simt::shuffle(mask, value, lane + distance < simt::kWarp ? lane + distance : lane, file,
                       line);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, SIMT_CALLER) {
  const unsigned lane = simt::current->number % simt::kWarp;
  return simt::shuffle(mask, value, lane >= distance ? lane - distance : lane, file, line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_CALLER) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < simt::kWarp; ++lane) {
    if (mask >> lane & 1)
      votes |= unsigned{simt::shuffle(mask, predicate, lane, file, line) != 0} << lane;
  }
  return votes;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}

template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int bit = 0; bit < 32; ++bit) out |= (x >> bit & 1u) << (31 - bit);
  return out;
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }

inline void sincospif(float x, float* sine, float* cosine) {
  const double angle = std::fmod(static_cast<double>(x), 2.0) * 3.14159265358979323846;
  *sine = static_cast<float>(std::sin(angle));
  *cosine = static_cast<float>(std::cos(angle));
}

inline float cospif(float x) {
  return static_cast<float>(
      std::cos(std::fmod(static_cast<double>(x), 2.0) * 3.14159265358979323846));
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace simt {

// Rounds to the nearest float of `exponent` and `mantissa` bits, ties to even.
inline uint16_t narrow(float value, int exponent, int mantissa) {
  const int bias = (1 << (exponent - 1)) - 1;
  const uint16_t infinity = static_cast<uint16_t>(((1 << exponent) - 1) << mantissa);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return infinity | 1;
  if (std::isinf(value)) return sign | infinity;
  if (value == 0) return sign;
  int power = 0;
  std::frexp(value, &power);
  const int lowest = std::max(power - 1, 1 - bias) - mantissa;  // Weight of the last bit.
  const double units = std::nearbyint(std::ldexp(std::fabs(static_cast<double>(value)), -lowest));
  // A mantissa that overflows carries into the exponent; the hidden bit counts as one of it.
  const double bits = units + std::ldexp(lowest + mantissa + bias - 1, mantissa);
  return sign | static_cast<uint16_t>(std::min<double>(bits, infinity));
}

}  // namespace simt

inline float __bfloat162float(__nv_bfloat16 value) {
  return __int_as_float(static_cast<int>(static_cast<unsigned>(value.bits) << 16));
}

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  float magnitude = static_cast<float>(
      std::ldexp(mantissa | (exponent ? 1024 : 0), (exponent ? exponent : 1) - 25));
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return value.bits >> 15 ? -magnitude : magnitude;
}

inline __half __float2half_rn(float value) { return {simt::narrow(value, 5, 10)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {simt::narrow(value, 8, 7)}; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = simt::processors;
  if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    *value = static_cast<int>(simt::opt_in_limit);
  if (attribute == cudaDevAttrMaxSharedMemoryPerMultiprocessor)
    *value = static_cast<int>(simt::opt_in_limit + 1024);
  return cudaSuccess;
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F* function, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > simt::opt_in_limit) return cudaErrorInvalidValue;
  simt::opted_in[reinterpret_cast<const void*>(function)] = static_cast<size_t>(bytes);
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = simt::last_error;
  simt::last_error = cudaSuccess;
  return error;
}

// What the Python side reads and sets.
extern "C" {
__attribute__((used)) inline const char* simt_message() { return simt::message.c_str(); }
__attribute__((used)) inline void simt_set_descending(int descending) {
  simt::descending = descending != 0;
}
__attribute__((used)) inline void simt_set_device(int processors, int opt_in_kib) {
  simt::processors = processors;
  simt::opt_in_limit = static_cast<size_t>(opt_in_kib) * 1024;
}
}
