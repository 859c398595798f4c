// CUDA emulated on the CPU, for tests. Blocks run one after another, and each thread of a block is a fiber.
//
// A fiber runs until it waits for its warp or its block, or ends. What a GPU leaves undefined is an error here:
// - accesses outside of a view's bounds, or vectors that are not aligned;
// - accesses of two threads to the same element, one of them a write, without a barrier between them: each element has
//   a shadow that records which threads read and wrote it, and in which interval between barriers;
// - shared memory that is read before the block wrote it;
// - barriers and shuffles that only some of the threads reach, or that threads reach in different lines;
// - launches that a GPU refuses.
// README.md lists what this emulation cannot show.
#pragma once

#ifndef DCVIT_HOST
#error "for the host build only"
#endif

#include <ucontext.h>

#include <csetjmp>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "_view.h"

#define DCVIT_DEVICE_ASSERT(condition) \
  if (!(condition)) dcvit::host::fail(__builtin_LINE(), "expected " #condition)
#define __global__
#define __device__
#define __launch_bounds__(...)
#define DCVIT_D inline

struct Dimension {
  unsigned x;
};

inline Dimension blockIdx, threadIdx, blockDim, gridDim;

namespace dcvit::host {

// The last access to an element. `run` is the launch for global memory, and the run of one block for shared memory.
// `epoch` counts the block's barriers. Several readers in one epoch are recorded as kSeveral, which no thread has.
struct Access {
  uint64_t run = 0;
  uint32_t block = 0, thread = 0, epoch = 0;
};
constexpr uint32_t kSeveral = ~0u;

struct Cell {
  Access write, read;
};

struct Shadow {
  std::vector<Cell> cells;
  bool shared = false;
};

enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

// The inputs and outputs of a warp's lanes in a collective operation.
struct Exchange {
  alignas(16) unsigned char in[32][32];
  alignas(16) unsigned char out[32][32];
};

struct Fiber {
  jmp_buf context;
  std::unique_ptr<unsigned char[]> stack;
  bool created = false;
  State state = State::kDone;
  int line = 0;
  void (*operation)(Exchange&) = nullptr;
};

struct Machine {
  std::mutex mutex;
  std::vector<Fiber> fibers = std::vector<Fiber>(1024);
  std::vector<Exchange> exchanges = std::vector<Exchange>(32);
  std::map<const void*, std::unique_ptr<Shadow>> shadows;
  std::function<void()> body;
  const char* kernel = "";
  jmp_buf scheduler;
  ucontext_t caller;
  std::string error;
  uint64_t launches = 0, block_runs = 0;
  uint32_t epoch = 0;
  int current = 0;
};

// Each kernel's file is compiled separately, and all share one machine.
inline Machine& machine() {
  static Machine* instance = new Machine;  // never destroyed, because other statics may still use it
  return *instance;
}

// Returns the shadow of some memory, the same one in each call until `forget`, after which the memory may be freed.
inline Shadow* shadow_of(const void* data, int64_t size) {
  if (data == nullptr) return nullptr;
  std::unique_ptr<Shadow>& shadow = machine().shadows[data];
  if (!shadow) shadow = std::make_unique<Shadow>();
  if (shadow->cells.size() < static_cast<size_t>(size)) shadow->cells.resize(size);
  return shadow.get();
}

inline void forget() { machine().shadows.clear(); }

// --- threads ---------------------------------------------------------------------------------------------------------

[[noreturn]] inline void resume_scheduler() { _longjmp(machine().scheduler, 1); }

template <class... Parts>
[[noreturn]] void fail(int line, const Parts&... parts) {
  Machine& m = machine();
  std::ostringstream text;
  text << m.kernel << ", line " << line << ", block " << blockIdx.x << ", thread " << threadIdx.x << ": ";
  (text << ... << parts);
  m.error = text.str();
  resume_scheduler();
}

inline void fiber_main() {
  Machine& m = machine();
  Fiber& self = m.fibers[m.current];
  for (;;) {
    m.body();
    self.state = State::kDone;
    if (_setjmp(self.context) == 0) resume_scheduler();
  }
}

inline void wait_at(State state, int line, void (*operation)(Exchange&) = nullptr) {
  Machine& m = machine();
  Fiber& self = m.fibers[m.current];
  self.state = state;
  self.line = line;
  self.operation = operation;
  if (_setjmp(self.context) == 0) resume_scheduler();
}

// Runs one fiber until it waits or ends.
inline void resume(int thread) {
  Machine& m = machine();
  Fiber& fiber = m.fibers[thread];
  m.current = thread;
  threadIdx.x = thread;
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.created) _longjmp(fiber.context, 1);
  constexpr size_t kStack = 128 << 10;
  if (!fiber.stack) fiber.stack.reset(new unsigned char[kStack]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  fiber.created = true;
  setcontext(&context);
}

// Returns the state in which all threads of a range wait; sets an error if they differ.
inline State common_state(int first, int last) {
  Machine& m = machine();
  const Fiber& one = m.fibers[first];
  for (int thread = first; thread < last; ++thread) {
    const Fiber& other = m.fibers[thread];
    if (other.state == one.state && (one.state == State::kDone || other.line == one.line)) continue;
    const auto place = [](const Fiber& fiber) {
      return fiber.state == State::kDone
                 ? std::string("its end")
                 : std::string(fiber.state == State::kAtBlockBarrier ? "a barrier" : "a warp operation") + " in line " +
                       std::to_string(fiber.line);
    };
    m.error = std::string(m.kernel) + ", block " + std::to_string(blockIdx.x) + ": thread " + std::to_string(first) +
              " is at " + place(one) + ", thread " + std::to_string(thread) + " at " + place(other);
    return State::kDone;
  }
  return one.state;
}

inline void run_warp(int first, int last) {
  Machine& m = machine();
  for (;;) {
    for (int thread = first; thread < last; ++thread) {
      m.fibers[thread].state = State::kReady;
      resume(thread);
      if (!m.error.empty()) return;
    }
    if (common_state(first, last) != State::kAtWarpBarrier || !m.error.empty()) return;
    m.fibers[first].operation(m.exchanges[first / 32]);
  }
}

inline void run_block(int threads) {
  Machine& m = machine();
  ++m.block_runs;
  m.epoch = 0;
  for (;;) {
    for (int first = 0; first < threads; first += 32) {
      run_warp(first, first + 32);
      if (!m.error.empty()) return;
    }
    if (common_state(0, threads) == State::kDone) return;
    ++m.epoch;
  }
}

// --- memory ----------------------------------------------------------------------------------------------------------

inline void touch(Shadow* shadow, int64_t size, int64_t i, int n, bool write, int line) {
  if (shadow == nullptr) fail(line, "an argument that is not given is used");
  if (i < 0 || i + n > size)
    fail(line, "elements ", i, " to ", i + n - 1, " of ", size, " are ", write ? "written" : "read");
  Machine& m = machine();
  const Access now{shadow->shared ? m.block_runs : m.launches, blockIdx.x, threadIdx.x, m.epoch};
  const auto races = [&](const Access& before) {
    return before.run == now.run &&
           (before.block != now.block || (before.thread != now.thread && before.epoch == now.epoch));
  };
  for (int64_t j = i; j < i + n; ++j) {
    Cell& cell = shadow->cells[j];
    const char* memory = shadow->shared ? "shared" : "global";
    if (shadow->shared && !write && cell.write.run != now.run)
      fail(line, "shared element ", j, " is read, but was never written");
    if (races(cell.write))
      fail(line, memory, " element ", j, write ? " is written" : " is read", ", which block ", cell.write.block,
           ", thread ", cell.write.thread, " writes without a barrier between them");
    if (write && races(cell.read))
      fail(line, memory, " element ", j, " is written, which block ", cell.read.block, ", thread ",
           static_cast<int32_t>(cell.read.thread), " (-1: several) reads without a barrier between them");
    if (write) {
      cell.write = now;
    } else if (races(cell.read)) {
      if (cell.read.block != now.block) cell.read.block = kSeveral;
      cell.read.thread = kSeveral;
    } else {
      cell.read = now;
    }
  }
}

template <int N, class T>
void check_alignment(View<T> view, int64_t i, int line) {
  if (reinterpret_cast<uintptr_t>(view.data + i) % (N * sizeof(T)) != 0)
    fail(line, "a vector of ", N * sizeof(T), " bytes is not aligned to them");
}

// Reading shared memory before it is written is an error, because it holds values of an earlier block.
template <class T>
View<T> shared_memory(T* data, int64_t size, Shadow* shadow) {
  if (shadow->cells.empty()) {
    shadow->shared = true;
    shadow->cells.resize(size);
  }
  return View<T>(data, size, shadow);
}

// --- warps -----------------------------------------------------------------------------------------------------------

template <class Out, class In>
Out collective(const In& in, void (*operation)(Exchange&), int line) {
  static_assert(sizeof(In) <= 32 && sizeof(Out) <= 32);
  Exchange& exchange = machine().exchanges[threadIdx.x / 32];
  std::memcpy(exchange.in[threadIdx.x % 32], &in, sizeof(In));
  wait_at(State::kAtWarpBarrier, line, operation);
  Out out;
  std::memcpy(&out, exchange.out[threadIdx.x % 32], sizeof(Out));
  return out;
}

}  // namespace dcvit::host

// --- CUDA's names ----------------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  dcvit::host::wait_at(dcvit::host::State::kAtBlockBarrier, line);
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int distance, int line = __builtin_LINE()) {
  if (lanes != 0xffffffff) dcvit::host::fail(line, "a shuffle of some lanes only");
  struct In {
    T value;
    int distance;
  };
  return dcvit::host::collective<T>(
      In{value, distance},
      [](dcvit::host::Exchange& exchange) {
        for (int lane = 0; lane < 32; ++lane) {
          In in;
          std::memcpy(&in, exchange.in[lane], sizeof(In));
          std::memcpy(&in.value, exchange.in[lane ^ in.distance], sizeof(T));
          std::memcpy(exchange.out[lane], &in.value, sizeof(T));
        }
      },
      line);
}

namespace dcvit {

template <class T>
std::remove_const_t<T> load(View<T> view, int64_t i, int line = __builtin_LINE()) {
  host::touch(view.shadow, view.size, i, 1, false, line);
  return view.data[i];
}

template <class T>
void store(View<T> view, int64_t i, std::common_type_t<T> value, int line = __builtin_LINE()) {
  host::touch(view.shadow, view.size, i, 1, true, line);
  view.data[i] = value;
}

template <int N, class T>
Vec<std::remove_const_t<T>, N> load_vec(View<T> view, int64_t i, int line = __builtin_LINE()) {
  host::touch(view.shadow, view.size, i, N, false, line);
  host::check_alignment<N>(view, i, line);
  Vec<std::remove_const_t<T>, N> result;
  std::memcpy(&result, view.data + i, sizeof(result));
  return result;
}

template <int N, class T>
void store_vec(View<T> view, int64_t i, Vec<T, N> value, int line = __builtin_LINE()) {
  host::touch(view.shadow, view.size, i, N, true, line);
  host::check_alignment<N>(view, i, line);
  std::memcpy(view.data + i, &value, sizeof(value));
}

#define DCVIT_SHARED(T, name, N)                                  \
  alignas(16) static unsigned char name##_bytes[sizeof(T) * (N)]; \
  static ::dcvit::host::Shadow name##_shadow;                     \
  const ::dcvit::View<T> name = ::dcvit::host::shared_memory(reinterpret_cast<T*>(name##_bytes), N, &name##_shadow)

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, void*,
            const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA takes at most 4 KiB of parameters");
  if (blocks <= 0 || blocks > 0x7fffffff || threads <= 0 || threads > 1024 || threads % 32 != 0)
    throw std::runtime_error(std::string(name) +
                             ": expected 1 to 2147483647 blocks of whole warps, up to 1024 threads, got " +
                             std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads");
  host::Machine& m = host::machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  const std::tuple<Parameters...> values{Parameters(arguments)...};
  m.body = [&] { std::apply(kernel, values); };
  m.kernel = name;
  m.error.clear();
  ++m.launches;
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx.x = block;
    host::run_block(threads);
    if (m.error.empty()) continue;
    for (host::Fiber& fiber : m.fibers) fiber.created = false;  // they are in the middle of the kernel
    throw std::runtime_error(m.error);
  }
}

}  // namespace dcvit
