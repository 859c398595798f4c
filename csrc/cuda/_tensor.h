// Helpers for the ops' checks and allocations, on torch's stable ABI.
//
// Kernels take contiguous memory, so other tensors are copied first. In the host build, the same functions are
// registered for the CPU, under the overload `.host`.
#pragma once

#if !defined(DCVIT_HOST) && !defined(USE_CUDA)
#define USE_CUDA  // declares aoti_torch_get_current_cuda_stream
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "_view.h"

#ifdef DCVIT_HOST
#define DCVIT_KEY CPU
#define DCVIT_OP(name) name ".host"
#else
#define DCVIT_KEY CUDA
#define DCVIT_OP(name) name
#endif

namespace dcvit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Makes a tensor's device current for the launches of one call, and returns its stream.
class Device {
 public:
#ifdef DCVIT_HOST
  explicit Device(const Tensor&) {}
  ~Device() { host::forget(); }
  void* stream() const { return nullptr; }
#else
  explicit Device(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
#endif
};

inline std::string shape_of(const int64_t* sizes, size_t dims) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < dims; ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

inline std::string shape_of(const Tensor& tensor) { return shape_of(tensor.sizes().data(), tensor.dim()); }

// Raises an error if a tensor has another shape, dtype or device than expected.
inline void expect(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes,
                   ScalarType dtype, const Tensor& like) {
  const auto shape = tensor.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), op, ": expected ", name,
                  " to be ", shape_of(sizes.begin(), sizes.size()), ", got ", shape_of(tensor));
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, op, ": expected ", name, " to be ", torch::headeronly::toString(dtype),
                  ", got ", torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), op,
                  ": expected ", name, " on device ", like.get_device_index(), " (CUDA ", like.is_cuda(), "), got ",
                  tensor.get_device_index(), " (CUDA ", tensor.is_cuda(), ")");
}

inline void expect_dims(const char* op, const char* name, const Tensor& tensor, int64_t dims) {
  STD_TORCH_CHECK(tensor.dim() == dims, op, ": expected ", name, " to have ", dims, " dimensions, got ",
                  shape_of(tensor));
}

// Allocates a tensor with the least overhead in the stable ABI, because each call of an op makes dozens of them.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  constexpr size_t kMaxDim = 5;
  STD_TORCH_CHECK(sizes.size() <= kMaxDim, "empty: expected at most ", kMaxDim, " dimensions, got ", sizes.size());
  int64_t strides[kMaxDim], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t device = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                         type, device, std::max<int32_t>(like.get_device_index(), 0),
                                                         &handle));
  return Tensor(handle);
}

inline Tensor dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes(), tensor.scalar_type());
  return torch::stable::copy_(copy, tensor);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(dense(*tensor)) : std::nullopt;
}

template <class T>
View<T> view(const Tensor& tensor) {
  return View<T>(static_cast<T*>(tensor.data_ptr()), tensor.numel());
}

template <class T>
View<T> view(const std::optional<Tensor>& tensor) {
  return tensor ? view<T>(*tensor) : View<T>();
}

// Raises an error if a product has another dtype than its inputs, as under autocast, where torch casts the inputs.
// Reading such a result in the inputs' dtype would go past its end.
inline Tensor of_same_type(Tensor result, const Tensor& given) {
  STD_TORCH_CHECK(result.scalar_type() == given.scalar_type(), "a matrix product of ",
                  torch::headeronly::toString(given.scalar_type()), " gave ",
                  torch::headeronly::toString(result.scalar_type()), ": turn autocast off around dcvit's ops");
  return result;
}

// Matrix products are torch's, by cuBLAS. Torch's settings control their precision (TF32, sums in half precision).
inline Tensor product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return of_same_type(torch::stable::detail::to<Tensor>(stack[0]), a);
}

// x weight^T + bias
inline Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return of_same_type(torch::stable::detail::to<Tensor>(stack[0]), x);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// Calls `function` with a value of the C++ type of `dtype`.
template <class Function>
void dispatch(const char* op, ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Half:
      return function(Half{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": expected Float, Half or BFloat16, got ", torch::headeronly::toString(dtype));
  }
}

}  // namespace dcvit
