// Value and gradient of the image prior.

#include <tuple>

#include "stencil.h"

namespace dcvit::cpu {
namespace {

template <typename T>
DCVIT_HD void gradient_row(const T* __restrict above, const T* __restrict row, const T* __restrict below,
                           T* __restrict out, int64_t width, const Slopes<T>& slopes) {
  out[0] = gradient_at(above, row, below, 0, slopes, false, width > 1);
  for (int64_t j = 1; j < width - 1; ++j) out[j] = gradient_at(above, row, below, j, slopes, true, true);
  if (width > 1) out[width - 1] = gradient_at(above, row, below, width - 1, slopes, true, false);
}

template <typename T>
DCVIT_HD void gradient_plane(const T* plane, T* out, int64_t height, int64_t width, const std::array<double, 4>& kinds,
                             double self) {
  for (int64_t i = 0; i < height; ++i) {
    const bool first = i == 0, last = i + 1 == height;
    const T* row = plane + i * width;
    gradient_row(first ? row : row - width, row, last ? row : row + width, out + i * width, width,
                 slopes_of_row<T>(kinds, self, first, last));
  }
}

DCVIT_CLONES void gradient(const float* plane, float* out, int64_t height, int64_t width,
                           const std::array<double, 4>& kinds, double self) {
  gradient_plane(plane, out, height, width, kinds, self);
}
DCVIT_CLONES void gradient(const double* plane, double* out, int64_t height, int64_t width,
                           const std::array<double, 4>& kinds, double self) {
  gradient_plane(plane, out, height, width, kinds, self);
}

std::tuple<Tensor, Tensor, Tensor> tv_prior(const Tensor& images_in, double beta, double tv_weight, double l2_weight) {
  STD_TORCH_CHECK(images_in.dim() == 4, "tv_prior: expected images [B, C, H, W], got ", images_in.dim(), " dimensions");
  const Tensor images = dense(images_in);
  Tensor value = make(images, {}), differences = make(images, {4}), image_norms = make(images, {images.size(0)});
  dispatch_full("tv_prior", images.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Norms norms = measure(data<T>(images), images.size(0), images.size(1), images.size(2), images.size(3));
    *data<T>(value) = T(prior_value(norms, beta, tv_weight, l2_weight));
    std::copy(norms.differences.begin(), norms.differences.end(), data<T>(differences));
    std::copy(norms.images.begin(), norms.images.end(), data<T>(image_norms));
  });
  return {value, differences, image_norms};
}

Tensor tv_prior_backward(const Tensor& grad, const Tensor& images_in, const Tensor& norms_in,
                         const Tensor& image_norms_in, double beta, double tv_weight, double l2_weight) {
  STD_TORCH_CHECK(images_in.dim() == 4, "tv_prior_backward: expected images [B, C, H, W], got ", images_in.dim(),
                  " dimensions");
  STD_TORCH_CHECK(norms_in.numel() == 4 && image_norms_in.numel() == images_in.size(0),
                  "tv_prior_backward: expected 4 norms and ", images_in.size(0), " of images, got ", norms_in.numel(),
                  " and ", image_norms_in.numel());
  for (const Tensor& tensor : {grad, norms_in, image_norms_in}) {
    STD_TORCH_CHECK(tensor.scalar_type() == images_in.scalar_type(),
                    "tv_prior_backward: expected grad and norms in the dtype of images, got ",
                    static_cast<int>(tensor.scalar_type()));
  }
  STD_TORCH_CHECK(grad.numel() == 1, "tv_prior_backward: expected one number as grad, got ", grad.numel());
  const Tensor images = dense(images_in), norms = dense(norms_in), image_norms = dense(image_norms_in);
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  Tensor out = make_huge(images, {batch, channels, height, width});
  dispatch_full("tv_prior_backward", images.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = height * width;
    if (size == 0) return;
    const double factor = *data<T>(grad);
    std::array<double, 4> kinds{};
    for (int kind = 0; kind < 4; ++kind) kinds[kind] = factor * norm_slope(data<T>(norms)[kind], tv_weight, beta);
    parallel(batch * channels, ceil_div(16384, size), [&](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const double self = factor * l2_slope(data<T>(image_norms)[plane / channels], l2_weight, batch);
        gradient(data<T>(images) + plane * size, data<T>(out) + plane * size, height, width, kinds, self);
      }
    });
  });
  return out;
}

}  // namespace

DCVIT_LIBRARY_IMPL(dcvit, CPU, m) {
  m.impl("tv_prior", DCVIT_KERNEL(&tv_prior));
  m.impl("tv_prior_backward", DCVIT_KERNEL(&tv_prior_backward));
}

}  // namespace dcvit::cpu
