// One step of the synthesis in two passes over memory, which is the minimum. The first pass computes the norms; the
// second adds the prior's gradient, which depends on them, to the network's, applies Adam and clips.

#include "../adam.h"
#include "stencil.h"

namespace dcvit::cpu {
namespace {

template <typename T>
struct Plane {
  T* images;
  const T* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T low, high;
};

template <typename T>
DCVIT_HD void step_row(const T* __restrict above, const T* __restrict row, const T* __restrict below,
                       const Plane<T>& plane, int64_t at, int64_t width, const Slopes<T>& slopes, const Adam<T>& adam) {
  T* __restrict x = plane.images + at;
  const T* __restrict grad = plane.grad + at;
  T* __restrict exp_avg = plane.exp_avg + at;
  T* __restrict exp_avg_sq = plane.exp_avg_sq + at;
  const T low = plane.low, high = plane.high;
  const auto step = [&](int64_t j, bool left, bool right) __attribute__((always_inline)) {
    const T gradient = grad[j] + gradient_at(above, row, below, j, slopes, left, right);
    T pixel = row[j], m = exp_avg[j], v = exp_avg_sq[j];
    adam.apply(pixel, m, v, gradient, low, high);
    x[j] = pixel;
    exp_avg[j] = m;
    exp_avg_sq[j] = v;
  };
  step(0, false, width > 1);
  for (int64_t j = 1; j < width - 1; ++j) step(j, true, true);
  if (width > 1) step(width - 1, true, false);
}

// `rows` holds copies of two rows from before the step, because gradients need the old neighbours and the images change
// in place.
template <typename T>
DCVIT_HD void step_plane(const Plane<T>& plane, int64_t height, int64_t width, const std::array<double, 4>& kinds,
                         double self, const Adam<T>& adam, T* rows) {
  T* above = rows;
  T* row = rows + width;
  for (int64_t i = 0; i < height; ++i) {
    const bool first = i == 0, last = i + 1 == height;
    const T* current = plane.images + i * width;
    std::copy(current, current + width, row);
    step_row<T>(first ? row : above, row, last ? row : current + width, plane, i * width, width,
                slopes_of_row<T>(kinds, self, first, last), adam);
    std::swap(above, row);
  }
}

DCVIT_CLONES void step(const Plane<float>& plane, int64_t height, int64_t width, const std::array<double, 4>& kinds,
                       double self, const Adam<float>& adam, float* rows) {
  step_plane(plane, height, width, kinds, self, adam, rows);
}
DCVIT_CLONES void step(const Plane<double>& plane, int64_t height, int64_t width, const std::array<double, 4>& kinds,
                       double self, const Adam<double>& adam, double* rows) {
  step_plane(plane, height, width, kinds, self, adam, rows);
}

Tensor synthesis_step(Tensor images_out, const Tensor& grad_in, Tensor exp_avg_out, Tensor exp_avg_sq_out,
                      int64_t step_number, double lr, double beta1, double beta2, double eps, double beta,
                      double tv_weight, double l2_weight, const Tensor& low_in, const Tensor& high_in) {
  STD_TORCH_CHECK(images_out.dim() == 4, "synthesis_step: expected images [B, C, H, W], got ", images_out.dim(),
                  " dimensions");
  for (const Tensor& tensor : {grad_in, exp_avg_out, exp_avg_sq_out}) {
    STD_TORCH_CHECK(tensor.dim() == 4, "synthesis_step: expected 4 dimensions as in images, got ", tensor.dim());
    for (int64_t i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(tensor.size(i) == images_out.size(i), "synthesis_step: expected size ", images_out.size(i),
                      " in dimension ", i, " as in images, got ", tensor.size(i));
    }
  }
  for (const Tensor& tensor : {low_in, high_in}) {
    STD_TORCH_CHECK(tensor.numel() == images_out.size(1), "synthesis_step: expected ", images_out.size(1),
                    " limits, one for each channel, got ", tensor.numel());
  }
  for (const Tensor& tensor : {grad_in, exp_avg_out, exp_avg_sq_out, low_in, high_in}) {
    STD_TORCH_CHECK(tensor.scalar_type() == images_out.scalar_type(), "synthesis_step: expected the dtype of images, ",
                    static_cast<int>(images_out.scalar_type()), ", got ", static_cast<int>(tensor.scalar_type()));
  }
  Tensor images = dense(images_out), exp_avg = dense(exp_avg_out), exp_avg_sq = dense(exp_avg_sq_out);
  const Tensor grad = dense(grad_in), low = dense(low_in), high = dense(high_in);
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  Tensor value = make(images, {});
  dispatch_full("synthesis_step", images.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Norms norms = measure(data<T>(images), batch, channels, height, width);
    *data<T>(value) = T(prior_value(norms, beta, tv_weight, l2_weight));
    const int64_t size = height * width;
    if (size == 0) return;
    std::array<double, 4> kinds{};
    for (int kind = 0; kind < 4; ++kind) kinds[kind] = norm_slope(norms.differences[kind], tv_weight, beta);
    const Adam<T> adam = Adam<T>::make(step_number, lr, beta1, beta2, eps);
    parallel(batch * channels, ceil_div(16384, size), [&](int64_t begin, int64_t end) {
      std::vector<T> rows(2 * width);
      // Backwards, because the first pass left the last planes in the cache.
      for (int64_t p = end - 1; p >= begin; --p) {
        const int64_t at = p * size;
        const Plane<T> plane{data<T>(images) + at,     data<T>(grad) + at,         data<T>(exp_avg) + at,
                             data<T>(exp_avg_sq) + at, data<T>(low)[p % channels], data<T>(high)[p % channels]};
        step(plane, height, width, kinds, l2_slope(norms.images[p / channels], l2_weight, batch), adam, rows.data());
      }
    });
  });
  for (auto [changed, out] :
       {std::pair(&images, &images_out), {&exp_avg, &exp_avg_out}, {&exp_avg_sq, &exp_avg_sq_out}}) {
    if (changed->data_ptr() != out->data_ptr()) copy_into(*out, *changed);
  }
  return value;
}

}  // namespace

DCVIT_LIBRARY_IMPL(dcvit, CPU, m) { m.impl("synthesis_step", DCVIT_KERNEL(&synthesis_step)); }

}  // namespace dcvit::cpu
