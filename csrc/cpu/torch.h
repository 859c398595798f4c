// The parts of torch that the CPU kernels use. Only this file depends on the torch version. From torch 2.10 on, it uses
// the stable ABI, whose builds also work with later versions. For older versions, DCVIT_ATEN selects ATen.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#ifdef DCVIT_ATEN
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty_cpu_dispatch.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <torch/library.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <type_traits>

// DCVIT_LIBRARY_IMPL(dcvit, CPU, m) { m.impl("op", DCVIT_KERNEL(&function)); }
#ifdef DCVIT_ATEN
#define DCVIT_LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define DCVIT_KERNEL(function) function
#else
#define DCVIT_LIBRARY_IMPL STABLE_TORCH_LIBRARY_IMPL
#define DCVIT_KERNEL TORCH_BOX
#endif

namespace dcvit::cpu {

#ifdef DCVIT_ATEN

using at::BFloat16;
using at::Half;
using at::ScalarType;
using at::Tensor;

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = {}) {
  return at::cpu::empty(sizes, type.value_or(like.scalar_type()));
}

inline Tensor dense(const Tensor& tensor) { return tensor.contiguous(); }

inline void copy_into(Tensor& to, const Tensor& from) { to.copy_(from); }

inline int64_t num_threads() { return at::get_num_threads(); }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  at::parallel_for(begin, end, grain, f);
}

// A matrix of float or double in memory that it does not own.
template <typename W>
Tensor matrix_at(W* data, const int64_t (&sizes)[2], const int64_t (&strides)[2]) {
  return at::from_blob(data, sizes, strides, c10::CppTypeToScalarType<W>::value);
}

inline void mm_into(Tensor& out, const Tensor& a, const Tensor& b) { at::cpu::mm_out(out, a, b); }

// out = start + a b, where `start` may be `out`.
inline void addmm_into(Tensor& out, const Tensor& start, const Tensor& a, const Tensor& b) {
  at::cpu::addmm_out(out, start, a, b);
}

#else

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Allocates a tensor with the least overhead in the stable ABI, because each call of a small op makes several of them.
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = {}) {
  constexpr size_t kMaxDim = 5;
  STD_TORCH_CHECK(sizes.size() <= kMaxDim, "make: expected at most ", kMaxDim, " dimensions, got ", sizes.size());
  int64_t strides[kMaxDim], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i] < 1 ? 1 : sizes.begin()[i];
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type.value_or(like.scalar_type())));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void copy_into(Tensor& to, const Tensor& from) { torch::stable::copy_(to, from); }

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  torch::stable::parallel_for(begin, end, grain, f);
}

template <typename W>
Tensor matrix_at(W* data, const int64_t (&sizes)[2], const int64_t (&strides)[2]) {
  const int32_t type = std::is_same_v<W, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_create_tensor_from_blob(data, 2, sizes, strides, 0, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void mm_into(Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

inline void addmm_into(Tensor& out, const Tensor& start, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), 1, 1));
}

#endif

}  // namespace dcvit::cpu
