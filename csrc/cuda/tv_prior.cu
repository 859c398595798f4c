#include "../prior.h"
#include "_device.h"
#include "_strip.h"
#include "tv_prior.h"

namespace dcvit {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads, 2) void prior_sums_kernel(Images shape, int64_t chunks, bool wide,
                                                                 View<const float> images, View<double> partials,
                                                                 View<float> halo) {
  const int64_t image = blockIdx.x / chunks, item = blockIdx.x % chunks * kThreads + threadIdx.x;
  const int64_t strips = shape.strips(), bands = shape.bands(), width = shape.width;
  double sums[kSums] = {};
  if (item < shape.channels * bands * strips) {
    const int64_t column = item % strips * kStrip, band = item / strips % bands;
    const int64_t plane = image * shape.channels + item / (strips * bands);
    const int64_t first = band * kBand, last = first + kBand < shape.height ? first + kBand : shape.height;
    const int64_t base = plane * shape.height * width;
    StripRow own = load_row(images, base + first * width, column, width, wide);
    for (int64_t row = first; row < last; ++row) {
      const bool has_below = row + 1 < shape.height;
      const StripRow below = has_below ? load_row(images, base + (row + 1) * width, column, width, wide) : StripRow{};
      float parts[kSums] = {};
#pragma unroll
      for (int j = 1; j <= kStrip; ++j) {
        const bool inside = column + j <= width, has_right = column + j < width;
        const float right = own.x[j + 1] - own.x[j], down = below.x[j] - own.x[j];
        const float diagonal = below.x[j + 1] - own.x[j], antidiagonal = below.x[j] - own.x[j + 1];
        if (inside) parts[0] += own.x[j] * own.x[j];
        if (has_right) parts[1] += right * right;
        if (has_below && inside) parts[2] += down * down;
        if (has_below && has_right) parts[3] += diagonal * diagonal;
        if (has_below && has_right) parts[4] += antidiagonal * antidiagonal;
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += parts[i];
      if (halo.given() && row == last - 1 && has_below) {
        const int64_t keep = (plane * bands + band) * 2 * width;  // [above, below] of this band, then of the next one
        Vec<float, kStrip> own_row, below_row;
#pragma unroll
        for (int j = 0; j < kStrip; ++j) own_row[j] = own.x[j + 1], below_row[j] = below.x[j + 1];
        store_upto(halo, keep + width + column, keep + 2 * width, wide, below_row);
        store_upto(halo, keep + 2 * width + column, keep + 3 * width, wide, own_row);
      }
      own = below;
    }
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const double sum = block_sum<kThreads>(sums[i]);
    if (threadIdx.x == 0) store(partials, static_cast<int64_t>(blockIdx.x) * kSums + i, sum);
  }
}

// One block per image.
__global__ __launch_bounds__(kThreads) void image_sums_kernel(int64_t chunks, View<const double> partials,
                                                              View<double> image_sums) {
  double sums[kSums] = {};
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads)
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += load(partials, (blockIdx.x * chunks + chunk) * kSums + i);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const double sum = block_sum<kThreads>(sums[i]);
    if (threadIdx.x == 0) store(image_sums, static_cast<int64_t>(blockIdx.x) * kSums + i, sum);
  }
}

// One block for all images.
__global__ __launch_bounds__(kThreads) void prior_value_kernel(Images shape, PriorSettings settings,
                                                               View<const double> image_sums, View<float> value,
                                                               View<float> norms, View<float> image_norms,
                                                               View<float> slopes) {
  double sums[kSums] = {};  // the first one of norms, the others of squares
  for (int64_t image = threadIdx.x; image < shape.batch; image += kThreads) {
    const double norm = sqrt(load(image_sums, image * kSums));
    store(image_norms, image, static_cast<float>(norm));
    if (slopes.given()) store(slopes, 4 + image, static_cast<float>(l2_slope(norm, settings.l2_weight, shape.batch)));
    sums[0] += norm;
    for (int i = 1; i < kSums; ++i) sums[i] += load(image_sums, image * kSums + i);
  }
  double prior = settings.l2_weight * (block_sum<kThreads>(sums[0]) / static_cast<double>(shape.batch));
  for (int i = 1; i < kSums; ++i) {
    const double norm = sqrt(block_sum<kThreads>(sums[i]));
    if (threadIdx.x != 0) continue;
    prior += settings.tv_weight * norm_power(norm, settings.beta);
    store(norms, i - 1, static_cast<float>(norm));
    if (slopes.given()) store(slopes, i - 1, static_cast<float>(norm_slope(norm, settings.tv_weight, settings.beta)));
  }
  if (threadIdx.x == 0) store(value, 0, static_cast<float>(prior));
}

__global__ __launch_bounds__(kThreads) void prior_slopes_kernel(PriorSettings settings, View<const float> grad,
                                                                View<const float> norms, View<const float> image_norms,
                                                                View<float> slopes) {
  const double factor = load(grad, 0);
  if (threadIdx.x < 4)
    store(slopes, threadIdx.x,
          static_cast<float>(factor * norm_slope(load(norms, threadIdx.x), settings.tv_weight, settings.beta)));
  for (int64_t image = threadIdx.x; image < image_norms.size; image += kThreads)
    store(slopes, 4 + image,
          static_cast<float>(factor * l2_slope(load(image_norms, image), settings.l2_weight, image_norms.size)));
}

__global__ __launch_bounds__(kThreads) void prior_gradient_kernel(Images shape, bool wide, View<const float> images,
                                                                  View<const float> slopes, View<float> gradient) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t strips = shape.strips(), bands = shape.bands(), width = shape.width;
  if (item >= shape.planes() * bands * strips) return;
  const int64_t column = item % strips * kStrip, band = item / strips % bands, plane = item / (strips * bands);
  const int64_t first = band * kBand, last = first + kBand < shape.height ? first + kBand : shape.height;
  const int64_t base = plane * shape.height * width;
  const Slopes s = load_slopes(slopes, plane / shape.channels);
  StripRow above = first > 0 ? load_row(images, base + (first - 1) * width, column, width, wide) : StripRow{};
  StripRow own = load_row(images, base + first * width, column, width, wide);
  for (int64_t row = first; row < last; ++row) {
    const bool has_below = row + 1 < shape.height;
    const StripRow below = has_below ? load_row(images, base + (row + 1) * width, column, width, wide) : StripRow{};
    Vec<float, kStrip> result;
#pragma unroll
    for (int j = 0; j < kStrip; ++j)
      result[j] = gradient_at(s, above, own, below, j, column + j > 0, column + j + 1 < width, row > 0, has_below);
    store_upto(gradient, base + row * width + column, base + (row + 1) * width, wide, result);
    above = own;
    own = below;
  }
}

}  // namespace

int64_t prior_chunks(const Images& shape) {
  return ceil_div(shape.channels * shape.bands() * shape.strips(), kThreads);
}

void launch_prior_sums(Images shape, View<const float> images, View<double> partials, View<float> halo, void* stream) {
  const int64_t chunks = prior_chunks(shape);
  launch("prior_sums_kernel", prior_sums_kernel, shape.batch * chunks, kThreads, stream, shape, chunks,
         wide_rows(shape) && aligned(images), images, partials, halo);
}

void launch_prior_value(Images shape, PriorSettings settings, View<const double> partials, View<double> image_sums,
                        View<float> value, View<float> norms, View<float> image_norms, View<float> slopes,
                        void* stream) {
  if (shape.batch > 0)
    launch("image_sums_kernel", image_sums_kernel, shape.batch, kThreads, stream, prior_chunks(shape), partials,
           image_sums);
  launch("prior_value_kernel", prior_value_kernel, 1, kThreads, stream, shape, settings, image_sums, value, norms,
         image_norms, slopes);
}

void launch_prior_slopes(PriorSettings settings, View<const float> grad, View<const float> norms,
                         View<const float> image_norms, View<float> slopes, void* stream) {
  launch("prior_slopes_kernel", prior_slopes_kernel, 1, kThreads, stream, settings, grad, norms, image_norms, slopes);
}

void launch_prior_gradient(Images shape, View<const float> images, View<const float> slopes, View<float> gradient,
                           void* stream) {
  const int64_t items = shape.planes() * shape.bands() * shape.strips();
  launch("prior_gradient_kernel", prior_gradient_kernel, ceil_div(items, kThreads), kThreads, stream, shape,
         wide_rows(shape) && aligned(images) && aligned(gradient), images, slopes, gradient);
}

}  // namespace dcvit
