// Launches of the feature distillation loss, with C candidates of `numbers` = B * N * D values each.
#pragma once

#include "_view.h"

namespace dcvit {

struct DistillationShape {
  int64_t candidates, batch, tokens, width;
  DCVIT_HD int64_t numbers() const { return batch * tokens * width; }
};

// The number of blocks in a pass over all candidates. Each block writes one partial sum per candidate.
template <class T>
int64_t distillation_blocks(const DistillationShape& shape);

// weight_sum [1] = sum_n weight_n
void launch_weight_sum(View<const float> weight, View<double> weight_sum, void* stream);

// Reads the teacher once for all candidates. `partials` [C, distillation_blocks] and `gradient` [C, B, N, D] are
// optional outputs; without the optional `grad` [C], all losses have the gradient 1.
template <class T>
void launch_distillation_pass(DistillationShape shape, View<const T> student, View<const T> teacher,
                              View<const float> weight, View<const double> weight_sum, View<const float> grad,
                              View<double> partials, View<T> gradient, void* stream);

// Computes the losses [C] from `partials` [C, blocks].
void launch_distillation_losses(DistillationShape shape, int64_t blocks, View<const double> partials,
                                View<const double> weight_sum, View<float> losses, void* stream);

// gradient[c] *= grad[c], in place; skipped where grad[c] is 1.
template <class T>
void launch_distillation_rescale(int64_t candidates, View<T> gradient, View<const float> grad, void* stream);

}  // namespace dcvit
