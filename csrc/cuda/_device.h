// The building blocks of kernels: loads and stores through views, shared memory, sums over a block, launches.
//
// The same source is compiled by nvcc for a GPU and, with DCVIT_HOST defined, by the host's compiler with _host_shim.h,
// which replaces CUDA.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <string>

#include "_view.h"

#ifndef DCVIT_HOST
#include <cuda_runtime.h>
#endif

namespace dcvit {

constexpr int kWarp = 32;

#ifndef DCVIT_HOST

#define DCVIT_D __device__ __forceinline__

template <class T>
DCVIT_D std::remove_const_t<T> load(View<T> view, int64_t i) {
  return view.data[i];
}

template <class T>
DCVIT_D void store(View<T> view, int64_t i, std::common_type_t<T> value) {
  view.data[i] = value;
}

template <int N, class T>
DCVIT_D Vec<std::remove_const_t<T>, N> load_vec(View<T> view, int64_t i) {
  return *reinterpret_cast<const Vec<std::remove_const_t<T>, N>*>(view.data + i);
}

template <int N, class T>
DCVIT_D void store_vec(View<T> view, int64_t i, Vec<T, N> value) {
  *reinterpret_cast<Vec<T, N>*>(view.data + i) = value;
}

// Stops the device if the condition is false. `assert` would be slower, because registers are saved around its call.
#define DCVIT_DEVICE_ASSERT(condition) \
  if (!(condition)) __trap()

// Declares N elements of memory shared by the threads of the block, as a view.
#define DCVIT_SHARED(T, name, N)                                        \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T) * (N)]; \
  const View<T> name(reinterpret_cast<T*>(name##_bytes), N)

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
            const Arguments&... arguments) {
  STD_TORCH_CHECK(blocks > 0 && blocks <= 0x7fffffff, name, ": expected a grid of 1 to 2147483647 blocks, got ",
                  blocks);
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, name, ": expected a launch of ", blocks, " blocks of ", threads,
                  " threads, got ", cudaGetErrorString(error));
}

#endif

// Returns N elements from i on, with zeros after the end. `wide` says that i is aligned, so that one load is enough.
template <int N, class T>
DCVIT_D Vec<std::remove_const_t<T>, N> load_upto(View<T> view, int64_t i, int64_t end, bool wide) {
  if (wide && i + N <= end) return load_vec<N>(view, i);
  Vec<std::remove_const_t<T>, N> result;
#pragma unroll
  for (int j = 0; j < N; ++j) result[j] = i + j < end ? load(view, i + j) : std::remove_const_t<T>(0);
  return result;
}

template <int N, class T>
DCVIT_D void store_upto(View<T> view, int64_t i, int64_t end, bool wide, Vec<T, N> value) {
  if (wide && i + N <= end) return store_vec(view, i, value);
#pragma unroll
  for (int j = 0; j < N; ++j)
    if (i + j < end) store(view, i + j, value[j]);
}

DCVIT_D double warp_sum(double value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffff, value, distance);
  return value;
}

// Returns, in thread 0 only, the sum over the kThreads threads of the block. The order of summation is fixed.
template <int kThreads>
DCVIT_D double block_sum(double value) {
  DCVIT_SHARED(double, sums, kThreads / kWarp);
  value = warp_sum(value);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % kWarp == 0) store(sums, threadIdx.x / kWarp, value);
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / kWarp; ++warp) total += load(sums, warp);
  return total;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dcvit
