// Helpers of the CPU kernels: torch's tensors and threads, and code for several generations of x86-64 in one build.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#endif

#include "../portable.h"
#include "torch.h"

// Compiles a function for AVX-512, for AVX2 with FMA and for the baseline; the loader selects the one for the machine.
// The body must be inlined, so the function calls only DCVIT_HD functions. On aarch64, musl and clang, there is only
// the baseline.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DCVIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DCVIT_CLONES
#endif

namespace dcvit::cpu {

// The type in which numbers of type T are computed.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType wide_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  if (!tensor) return std::nullopt;
  return dense(*tensor);
}

// A new tensor for an op that is bound by memory bandwidth, in huge pages if it is large. malloc maps fresh memory for
// it each time. Touching that memory in pages of 4 KB took half of the time of distillation_loss at [1, 64, 197, 768].
// Ops with matrix products do not use this: the gain is small compared with the products, and the operating system may
// first have to make room for huge pages.
inline Tensor make_huge(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor tensor = make(like, sizes);
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (end - begin >= 4 * kHuge) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only a hint
#endif
  return tensor;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs f(begin, end) on torch's threads for parts of [0, count). A thread gets at least `grain` items.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer sees how these threads synchronise, but not torch's threads, which are not instrumented. The grain
  // is ignored, because the tests' tensors are small.
  (void)grain;
  std::vector<std::thread> threads;
  const int64_t part = ceil_div(count, std::max<int64_t>(1, num_threads()));
  for (int64_t begin = 0; begin < count; begin += part)
    threads.emplace_back([&f, begin, part, count] { f(begin, std::min(count, begin + part)); });
  for (std::thread& thread : threads) thread.join();
#else
  if (count > 0) parallel_for(0, count, grain < 1 ? 1 : grain, f);
#endif
}

// Calls f with a value of the C++ type of `type`.
template <typename F>
auto dispatch_all(const char* op, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::Half:
      return f(Half());
    case ScalarType::BFloat16:
      return f(BFloat16());
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, float16 or bfloat16, got ", static_cast<int>(type));
  }
}

template <typename F>
auto dispatch_full(const char* op, ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    default:
      STD_TORCH_CHECK(false, op, ": expected float32 or float64, got ", static_cast<int>(type));
  }
}

}  // namespace dcvit::cpu
