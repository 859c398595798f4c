#include "_tensor.h"
#include "distillation_loss.h"

namespace dcvit {
namespace {

DistillationShape check(const char* op, const Tensor& student, const Tensor& teacher,
                        const std::optional<Tensor>& weight) {
  expect_dims(op, "student", student, 4);
  const DistillationShape shape{student.size(0), student.size(1), student.size(2), student.size(3)};
  expect(op, "teacher", teacher, {shape.batch, shape.tokens, shape.width}, student.scalar_type(), student);
  if (weight) expect(op, "weight", *weight, {shape.tokens}, ScalarType::Float, student);
  return shape;
}

std::optional<Tensor> sum_of(const std::optional<Tensor>& weight, void* stream) {
  if (!weight) return std::nullopt;
  Tensor sum = empty(*weight, {1}, ScalarType::Double);
  launch_weight_sum(view<const float>(dense(*weight)), view<double>(sum), stream);
  return sum;
}

std::tuple<Tensor, Tensor> distillation_loss(Tensor student, Tensor teacher, std::optional<Tensor> weight,
                                             bool with_unit) {
  const DistillationShape shape = check("distillation_loss", student, teacher, weight);
  const Device device(student);
  student = dense(student);
  teacher = dense(teacher);
  weight = dense(weight);
  Tensor losses = empty(student, {shape.candidates}, ScalarType::Float);
  Tensor unit = with_unit
                    ? empty(student, {shape.candidates, shape.batch, shape.tokens, shape.width}, student.scalar_type())
                    : empty(student, {0}, student.scalar_type());
  if (shape.candidates == 0) return {losses, unit};
  dispatch("distillation_loss", student.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const std::optional<Tensor> weight_sum = sum_of(weight, device.stream());
    const int64_t blocks = distillation_blocks<T>(shape);
    Tensor partials = empty(student, {shape.candidates, blocks}, ScalarType::Double);
    if (blocks > 0)
      launch_distillation_pass<T>(shape, view<const T>(student), view<const T>(teacher), view<const float>(weight),
                                  view<const double>(weight_sum), {}, view<double>(partials),
                                  with_unit ? view<T>(unit) : View<T>(), device.stream());
    launch_distillation_losses(shape, blocks, view<const double>(partials), view<const double>(weight_sum),
                               view<float>(losses), device.stream());
  });
  return {losses, unit};
}

Tensor distillation_loss_backward(Tensor grad, Tensor student, Tensor teacher, std::optional<Tensor> weight) {
  const DistillationShape shape = check("distillation_loss_backward", student, teacher, weight);
  expect("distillation_loss_backward", "grad", grad, {shape.candidates}, ScalarType::Float, student);
  const Device device(student);
  grad = dense(grad);
  student = dense(student);
  teacher = dense(teacher);
  weight = dense(weight);
  Tensor gradient = torch::stable::new_empty(student, student.sizes(), student.scalar_type());
  if (gradient.numel() == 0) return gradient;
  dispatch("distillation_loss_backward", student.scalar_type(), [&](auto number) {
    using T = decltype(number);
    const std::optional<Tensor> weight_sum = sum_of(weight, device.stream());
    launch_distillation_pass<T>(shape, view<const T>(student), view<const T>(teacher), view<const float>(weight),
                                view<const double>(weight_sum), view<const float>(grad), {}, view<T>(gradient),
                                device.stream());
  });
  return gradient;
}

void distillation_loss_rescale(Tensor unit, Tensor grad) {
  expect_dims("distillation_loss_rescale", "unit", unit, 4);
  STD_TORCH_CHECK(unit.is_contiguous(),
                  "distillation_loss_rescale: expected unit to be contiguous, as distillation_loss returned it, "
                  "got strides ",
                  shape_of(unit.strides().data(), unit.dim()));
  expect("distillation_loss_rescale", "grad", grad, {unit.size(0)}, ScalarType::Float, unit);
  if (unit.numel() == 0) return;
  const Device device(unit);
  grad = dense(grad);
  dispatch("distillation_loss_rescale", unit.scalar_type(), [&](auto number) {
    using T = decltype(number);
    launch_distillation_rescale<T>(unit.size(0), view<T>(unit), view<const float>(grad), device.stream());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcvit, DCVIT_KEY, m) {
  m.impl(DCVIT_OP("distillation_loss"), TORCH_BOX(&distillation_loss));
  m.impl(DCVIT_OP("distillation_loss_backward"), TORCH_BOX(&distillation_loss_backward));
  m.impl(DCVIT_OP("distillation_loss_rescale"), TORCH_BOX(&distillation_loss_rescale));
}

}  // namespace dcvit
