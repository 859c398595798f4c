#include "_tensor.h"
#include "synthesis_step.h"

namespace dcvit {
namespace {

constexpr const char* kOp = "synthesis_step";

Tensor synthesis_step(Tensor images, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, int64_t step, double lr,
                      double beta1, double beta2, double eps, double beta, double tv_weight, double l2_weight,
                      Tensor low, Tensor high) {
  expect_dims(kOp, "images", images, 4);
  const Images shape{images.size(0), images.size(1), images.size(2), images.size(3)};
  for (const auto& [name, tensor] : {std::pair<const char*, Tensor>{"images", images},
                                     {"grad", grad},
                                     {"exp_avg", exp_avg},
                                     {"exp_avg_sq", exp_avg_sq}})
    expect(kOp, name, tensor, {shape.batch, shape.channels, shape.height, shape.width}, ScalarType::Float, images);
  expect(kOp, "low", low, {shape.channels}, ScalarType::Float, images);
  expect(kOp, "high", high, {shape.channels}, ScalarType::Float, images);
  STD_TORCH_CHECK(step >= 1, kOp, ": expected step to be at least 1, got ", step);

  const Device device(images);
  Tensor value = empty(images, {}, ScalarType::Float);
  Tensor norms = empty(images, {4}, ScalarType::Float);
  Tensor image_norms = empty(images, {shape.batch}, ScalarType::Float);
  Tensor slopes = empty(images, {4 + shape.batch}, ScalarType::Float);
  Tensor partials = empty(images, {shape.batch, prior_chunks(shape), kSums}, ScalarType::Double);
  Tensor image_sums = empty(images, {shape.batch, kSums}, ScalarType::Double);
  const bool in_place = shape.width <= kWidestInPlace;
  Tensor x = dense(images), m = dense(exp_avg), v = dense(exp_avg_sq);
  grad = dense(grad);
  low = dense(low);
  high = dense(high);
  Tensor halo = empty(images, {in_place ? shape.planes() * shape.bands() : 0, 2, shape.width}, ScalarType::Float);

  if (images.numel() > 0)
    launch_prior_sums(shape, view<const float>(x), view<double>(partials), in_place ? view<float>(halo) : View<float>(),
                      device.stream());
  launch_prior_value(shape, {beta, tv_weight, l2_weight}, view<const double>(partials), view<double>(image_sums),
                     view<float>(value), view<float>(norms), view<float>(image_norms), view<float>(slopes),
                     device.stream());
  if (images.numel() == 0) return value;
  const Tensor source = in_place ? x : torch::stable::clone(x);
  launch_synthesis_step(shape, Adam<float>::make(step, lr, beta1, beta2, eps), view<const float>(source),
                        in_place ? view<const float>(halo) : View<const float>(), view<const float>(slopes),
                        view<float>(x), view<const float>(grad), view<float>(m), view<float>(v), view<const float>(low),
                        view<const float>(high), device.stream());
  for (const auto& [kept, changed] : {std::pair<Tensor, Tensor>{images, x}, {exp_avg, m}, {exp_avg_sq, v}}) {
    if (kept.data_ptr() == changed.data_ptr()) continue;
    Tensor strided = kept;
    torch::stable::copy_(strided, changed);
  }
  return value;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcvit, DCVIT_KEY, m) { m.impl(DCVIT_OP("synthesis_step"), TORCH_BOX(&synthesis_step)); }

}  // namespace dcvit
