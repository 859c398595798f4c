#include <algorithm>

#include "_device.h"
#include "_strip.h"
#include "synthesis_step.h"

namespace dcvit {
namespace {

// A block owns a band of a plane. Its threads walk down together, so that all have read a row, as their own and as a
// neighbour's, before it is written.
__global__ __launch_bounds__(kWidestInPlace / kStrip) void synthesis_step_kernel(
    Images shape, Adam<float> adam, bool wide, View<const float> source, View<const float> halo,
    View<const float> slopes, View<float> images, View<const float> grad, View<float> exp_avg, View<float> exp_avg_sq,
    View<const float> low, View<const float> high) {
  const int64_t bands = shape.bands(), width = shape.width;
  const int64_t plane = blockIdx.x / bands, band = blockIdx.x % bands;
  const int64_t first = band * kBand, last = first + kBand < shape.height ? first + kBand : shape.height;
  const int64_t base = plane * shape.height * width, kept = blockIdx.x * 2 * width;
  const Slopes s = load_slopes(slopes, plane / shape.channels);
  const float lowest = load(low, plane % shape.channels), highest = load(high, plane % shape.channels);
  for (int64_t start = 0; start < width; start += static_cast<int64_t>(blockDim.x) * kStrip) {
    const int64_t column = start + threadIdx.x * kStrip;
    const bool active = column < width;
    StripRow above{}, own{};
    if (active) {
      if (first > 0)
        above = halo.given() ? load_row(halo, kept, column, width, wide)
                             : load_row(source, base + (first - 1) * width, column, width, wide);
      own = load_row(source, base + first * width, column, width, wide);
    }
    for (int64_t row = first; row < last; ++row) {
      const bool has_below = row + 1 < shape.height;
      StripRow below{};
      if (active && has_below)
        below = row + 1 == last && halo.given() ? load_row(halo, kept + width, column, width, wide)
                                                : load_row(source, base + (row + 1) * width, column, width, wide);
      __syncthreads();  // all threads have read this row
      if (active) {
        const int64_t i = base + row * width + column, end = base + (row + 1) * width;
        const Vec<float, kStrip> slope = load_upto<kStrip>(grad, i, end, wide);
        Vec<float, kStrip> m = load_upto<kStrip>(exp_avg, i, end, wide);
        Vec<float, kStrip> v = load_upto<kStrip>(exp_avg_sq, i, end, wide);
        Vec<float, kStrip> x;
#pragma unroll
        for (int j = 0; j < kStrip; ++j) {
          const float total = slope[j] + gradient_at(s, above, own, below, j, column + j > 0, column + j + 1 < width,
                                                     row > 0, has_below);
          x[j] = own.x[j + 1];
          adam.apply(x[j], m[j], v[j], total, lowest, highest);
        }
        store_upto(images, i, end, wide, x);
        store_upto(exp_avg, i, end, wide, m);
        store_upto(exp_avg_sq, i, end, wide, v);
      }
      above = own;
      own = below;
    }
  }
}

}  // namespace

void launch_synthesis_step(Images shape, Adam<float> adam, View<const float> source, View<const float> halo,
                           View<const float> slopes, View<float> images, View<const float> grad, View<float> exp_avg,
                           View<float> exp_avg_sq, View<const float> low, View<const float> high, void* stream) {
  const bool wide = wide_rows(shape) && aligned(source) && aligned(halo) && aligned(images) && aligned(grad) &&
                    aligned(exp_avg) && aligned(exp_avg_sq);
  const int64_t threads = std::min<int64_t>(ceil_div(shape.strips(), kWarp) * kWarp, kWidestInPlace / kStrip);
  launch("synthesis_step_kernel", synthesis_step_kernel, shape.planes() * shape.bands(), static_cast<int>(threads),
         stream, shape, adam, wide, source, halo, slopes, images, grad, exp_avg, exp_avg_sq, low, high);
}

}  // namespace dcvit
