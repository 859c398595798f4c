#include <algorithm>

#include "_device.h"
#include "distillation_loss.h"

namespace dcvit {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // 16-byte vectors of the teacher, and of each candidate in turn, that a thread holds
constexpr int kGroup = 8;    // candidates processed between two barriers

template <class T>
constexpr int kTile = kThreads * kVectors * kWide<T>;

// 1 / (B D sum_n weight_n); all weights are 1 if none are passed.
DCVIT_D double normaliser(const DistillationShape& shape, View<const double> weight_sum) {
  const double weights = weight_sum.given() ? load(weight_sum, 0) : static_cast<double>(shape.tokens);
  return 1.0 / (static_cast<double>(shape.batch) * static_cast<double>(shape.width) * weights);
}

DCVIT_D int64_t token_of(int64_t i, const DistillationShape& shape) {
  if (i <= 0xffffffff && shape.width <= 0xffffffff && shape.tokens <= 0xffffffff)  // 32-bit divisions are twice as fast
    return static_cast<uint32_t>(i) / static_cast<uint32_t>(shape.width) % static_cast<uint32_t>(shape.tokens);
  return i / shape.width % shape.tokens;
}

__global__ __launch_bounds__(kThreads) void weight_sum_kernel(View<const float> weight, View<double> weight_sum) {
  double sum = 0;
  for (int64_t n = threadIdx.x; n < weight.size; n += kThreads) sum += load(weight, n);
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) store(weight_sum, 0, sum);
}

template <class T>
__global__ __launch_bounds__(kThreads) void distillation_pass_kernel(
    DistillationShape shape, bool wide, View<const T> student, View<const T> teacher, View<const float> weight,
    View<const double> weight_sum, View<const float> grad, View<double> partials, View<T> gradient) {
  constexpr int W = kWide<T>;
  DCVIT_SHARED(double, sums, kGroup*(kThreads / kWarp));
  const int64_t numbers = shape.numbers();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kTile<T> + threadIdx.x * W;

  Vec<T, W> expected[kVectors];
  float weights[kVectors][W];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t i = start + v * kThreads * W;
    expected[v] = load_upto<W>(teacher, i, numbers, wide);
    int64_t token = weight.given() ? token_of(i, shape) : 0;
    int64_t in_token = weight.given() ? i % shape.width : 0;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      weights[v][j] = !weight.given() ? 1.0f : i + j < numbers ? load(weight, token) : 0.0f;
      if (++in_token == shape.width) {
        in_token = 0;
        if (++token == shape.tokens) token = 0;
      }
    }
  }
  const float factor = gradient.given() ? static_cast<float>(2 * normaliser(shape, weight_sum)) : 0.0f;

  for (int64_t first = 0; first < shape.candidates; first += kGroup) {
    const int count = static_cast<int>(shape.candidates - first < kGroup ? shape.candidates - first : kGroup);
    for (int c = 0; c < count; ++c) {
      const int64_t base = (first + c) * numbers;
      Vec<T, W> got[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        got[v] = load_upto<W>(student, base + start + v * kThreads * W, base + numbers, wide);
      const float slope = !gradient.given() ? 0.0f : grad.given() ? factor * load(grad, first + c) : factor;
      float sum = 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float part = 0;
        Vec<T, W> slopes;
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const float difference = static_cast<float>(got[v][j]) - static_cast<float>(expected[v][j]);
          const float weighted = weights[v][j] * difference;
          part += weighted * difference;
          slopes[j] = static_cast<T>(slope * weighted);
        }
        sum += part;
        if (gradient.given()) store_upto(gradient, base + start + v * kThreads * W, base + numbers, wide, slopes);
      }
      if (partials.given()) {
        const double total = warp_sum(sum);
        if (lane == 0) store(sums, c * (kThreads / kWarp) + warp, total);
      }
    }
    if (!partials.given()) continue;
    __syncthreads();
    if (threadIdx.x < count) {
      double total = 0;
      for (int w = 0; w < kThreads / kWarp; ++w) total += load(sums, threadIdx.x * (kThreads / kWarp) + w);
      store(partials, (first + threadIdx.x) * gridDim.x + blockIdx.x, total);
    }
    __syncthreads();  // the next group's sums overwrite these
  }
}

// One block per candidate.
__global__ __launch_bounds__(kThreads) void distillation_losses_kernel(DistillationShape shape, int64_t blocks,
                                                                       View<const double> partials,
                                                                       View<const double> weight_sum,
                                                                       View<float> losses) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += load(partials, blockIdx.x * blocks + i);
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) store(losses, blockIdx.x, static_cast<float>(sum * normaliser(shape, weight_sum)));
}

template <class T>
__global__ __launch_bounds__(kThreads) void distillation_rescale_kernel(int64_t blocks, int64_t numbers, bool wide,
                                                                        View<T> gradient, View<const float> grad) {
  constexpr int W = kWide<T>;
  const int64_t candidate = blockIdx.x / blocks, base = candidate * numbers;
  const float factor = load(grad, candidate);
  if (factor == 1) return;
  for (int64_t i = (blockIdx.x % blocks * kThreads + threadIdx.x) * W; i < numbers; i += blocks * kThreads * W) {
    Vec<T, W> values = load_upto<W>(gradient, base + i, base + numbers, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) values[j] = static_cast<T>(factor * static_cast<float>(values[j]));
    store_upto(gradient, base + i, base + numbers, wide, values);
  }
}

}  // namespace

template <class T>
int64_t distillation_blocks(const DistillationShape& shape) {
  return ceil_div(shape.numbers(), kTile<T>);
}

void launch_weight_sum(View<const float> weight, View<double> weight_sum, void* stream) {
  launch("weight_sum_kernel", weight_sum_kernel, 1, kThreads, stream, weight, weight_sum);
}

template <class T>
void launch_distillation_pass(DistillationShape shape, View<const T> student, View<const T> teacher,
                              View<const float> weight, View<const double> weight_sum, View<const float> grad,
                              View<double> partials, View<T> gradient, void* stream) {
  const bool wide = aligned(student) && aligned(teacher) && aligned(gradient) &&
                    (shape.candidates == 1 || shape.numbers() % kWide<T> == 0);
  launch("distillation_pass_kernel", distillation_pass_kernel<T>, distillation_blocks<T>(shape), kThreads, stream,
         shape, wide, student, teacher, weight, weight_sum, grad, partials, gradient);
}

void launch_distillation_losses(DistillationShape shape, int64_t blocks, View<const double> partials,
                                View<const double> weight_sum, View<float> losses, void* stream) {
  launch("distillation_losses_kernel", distillation_losses_kernel, shape.candidates, kThreads, stream, shape, blocks,
         partials, weight_sum, losses);
}

template <class T>
void launch_distillation_rescale(int64_t candidates, View<T> gradient, View<const float> grad, void* stream) {
  const int64_t numbers = gradient.size / candidates;
  // At most 1024 blocks: enough to fill a GPU, and few enough to return quickly if all factors are 1.
  const int64_t blocks = std::min<int64_t>(ceil_div(numbers, kTile<T>), 1024);
  const bool wide = aligned(gradient) && (candidates == 1 || numbers % kWide<T> == 0);
  launch("distillation_rescale_kernel", distillation_rescale_kernel<T>, candidates * blocks, kThreads, stream, blocks,
         numbers, wide, gradient, grad);
}

#define DCVIT_INSTANTIATE(T)                                                                                   \
  template int64_t distillation_blocks<T>(const DistillationShape&);                                           \
  template void launch_distillation_pass(DistillationShape, View<const T>, View<const T>, View<const float>,   \
                                         View<const double>, View<const float>, View<double>, View<T>, void*); \
  template void launch_distillation_rescale(int64_t, View<T>, View<const float>, void*);
DCVIT_INSTANTIATE(float)
DCVIT_INSTANTIATE(Half)
DCVIT_INSTANTIATE(BFloat16)

}  // namespace dcvit
