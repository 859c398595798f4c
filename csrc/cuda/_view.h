// Views of memory for kernels: a pointer and the number of elements that it points to.
//
// On a GPU, only the pointer is used. In the host build (DCVIT_HOST), each access through a view is checked for bounds,
// alignment and races with other threads; see _host_shim.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../portable.h"

namespace dcvit {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

#ifdef DCVIT_HOST
namespace host {
struct Shadow;
inline Shadow* shadow_of(const void* data, int64_t size);
}  // namespace host
#endif

template <class T>
struct View {
  T* data = nullptr;
  int64_t size = 0;
#ifdef DCVIT_HOST
  host::Shadow* shadow = nullptr;
#endif

  View() = default;
#ifdef DCVIT_HOST
  View(T* data, int64_t size) : data(data), size(size), shadow(host::shadow_of(data, size)) {}
  View(T* data, int64_t size, host::Shadow* shadow) : data(data), size(size), shadow(shadow) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  View(View<U> other) : View(other.data, other.size, other.shadow) {}
#else
  DCVIT_HD View(T* data, int64_t size) : data(data), size(size) {}
  template <class U, class = std::enable_if_t<std::is_same_v<const U, T>>>
  DCVIT_HD View(View<U> other) : View(other.data, other.size) {}
#endif

  // Whether an optional tensor was passed; without one, the pointer is null.
  DCVIT_HD bool given() const { return data != nullptr; }
};

// N elements that one load or store moves.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
  DCVIT_HD T& operator[](int i) { return data[i]; }
  DCVIT_HD const T& operator[](int i) const { return data[i]; }
};

// The number of elements in the widest load, which has 16 bytes.
template <class T>
constexpr int kWide = 16 / sizeof(T);

// Whether each vector that starts at a multiple of kWide elements can be moved by one load or store.
template <class T>
bool aligned(View<T> view) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
}

}  // namespace dcvit

#ifdef DCVIT_HOST
#include "_host_shim.h"
#endif
