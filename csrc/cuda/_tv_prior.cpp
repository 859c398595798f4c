#include "_tensor.h"
#include "tv_prior.h"

namespace dcvit {
namespace {

Images check(const char* op, const Tensor& images) {
  expect_dims(op, "images", images, 4);
  STD_TORCH_CHECK(images.scalar_type() == ScalarType::Float, op, ": expected images to be Float, got ",
                  torch::headeronly::toString(images.scalar_type()));
  return {images.size(0), images.size(1), images.size(2), images.size(3)};
}

std::tuple<Tensor, Tensor, Tensor> tv_prior(Tensor images, double beta, double tv_weight, double l2_weight) {
  const Images shape = check("tv_prior", images);
  const Device device(images);
  images = dense(images);
  Tensor value = empty(images, {}, ScalarType::Float);
  Tensor norms = empty(images, {4}, ScalarType::Float);
  Tensor image_norms = empty(images, {shape.batch}, ScalarType::Float);
  Tensor partials = empty(images, {shape.batch, prior_chunks(shape), kSums}, ScalarType::Double);
  Tensor image_sums = empty(images, {shape.batch, kSums}, ScalarType::Double);
  if (images.numel() > 0)
    launch_prior_sums(shape, view<const float>(images), view<double>(partials), {}, device.stream());
  launch_prior_value(shape, {beta, tv_weight, l2_weight}, view<const double>(partials), view<double>(image_sums),
                     view<float>(value), view<float>(norms), view<float>(image_norms), {}, device.stream());
  return {value, norms, image_norms};
}

Tensor tv_prior_backward(Tensor grad, Tensor images, Tensor norms, Tensor image_norms, double beta, double tv_weight,
                         double l2_weight) {
  const Images shape = check("tv_prior_backward", images);
  expect("tv_prior_backward", "grad", grad, {}, ScalarType::Float, images);
  expect("tv_prior_backward", "norms", norms, {4}, ScalarType::Float, images);
  expect("tv_prior_backward", "image_norms", image_norms, {shape.batch}, ScalarType::Float, images);
  const Device device(images);
  images = dense(images);
  norms = dense(norms);
  image_norms = dense(image_norms);
  Tensor gradient = torch::stable::new_empty(images, images.sizes(), images.scalar_type());
  if (gradient.numel() == 0) return gradient;
  Tensor slopes = empty(images, {4 + shape.batch}, ScalarType::Float);
  launch_prior_slopes({beta, tv_weight, l2_weight}, view<const float>(grad), view<const float>(norms),
                      view<const float>(image_norms), view<float>(slopes), device.stream());
  launch_prior_gradient(shape, view<const float>(images), view<const float>(slopes), view<float>(gradient),
                        device.stream());
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcvit, DCVIT_KEY, m) {
  m.impl(DCVIT_OP("tv_prior"), TORCH_BOX(&tv_prior));
  m.impl(DCVIT_OP("tv_prior_backward"), TORCH_BOX(&tv_prior_backward));
}

}  // namespace dcvit
