#include "_tensor.h"
#include "dropped_mlp.h"

namespace dcvit {
namespace {

using Optional = std::optional<Tensor>;

struct Sizes {
  int64_t rows, width, hidden, kept, out;
};

Sizes check(const char* op, const Tensor& x, const Tensor& w1, const Tensor& w2, const Optional& b2,
            const Optional& idx, const Optional& norm_weight, const Optional& norm_bias, const Optional& scale,
            bool residual) {
  expect_dims(op, "x", x, 2);
  expect_dims(op, "w1", w1, 2);
  expect_dims(op, "w2", w2, 2);
  if (idx) expect_dims(op, "idx", *idx, 1);
  const Sizes sizes{x.size(0), x.size(1), w1.size(0), idx ? idx->size(0) : w1.size(0), w2.size(0)};
  const ScalarType dtype = x.scalar_type();
  expect(op, "w1", w1, {sizes.hidden, sizes.width}, dtype, x);
  expect(op, "w2", w2, {sizes.out, sizes.hidden}, dtype, x);
  if (b2) expect(op, "b2", *b2, {sizes.out}, dtype, x);
  if (idx) expect(op, "idx", *idx, {sizes.kept}, ScalarType::Long, x);
  if (norm_weight) expect(op, "norm_weight", *norm_weight, {sizes.width}, dtype, x);
  if (norm_bias) expect(op, "norm_bias", *norm_bias, {sizes.width}, dtype, x);
  STD_TORCH_CHECK(norm_weight || !norm_bias, op, ": expected norm_bias only with norm_weight, got it alone");
  if (scale) expect(op, "scale", *scale, {sizes.out}, dtype, x);
  STD_TORCH_CHECK(!residual || sizes.out == sizes.width, op, ": expected as many outputs as x is wide for a residual, ",
                  sizes.width, ", got ", sizes.out);
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> dropped_mlp(Tensor x, Tensor w1, Optional b1, Tensor w2, Optional b2, Optional idx,
                                               Optional norm_weight, Optional norm_bias, double norm_eps,
                                               Optional scale, bool residual, bool save) {
  const Sizes sizes = check("dropped_mlp", x, w1, w2, b2, idx, norm_weight, norm_bias, scale, residual);
  if (b1) expect("dropped_mlp", "b1", *b1, {sizes.hidden}, x.scalar_type(), x);
  const Device device(x);
  void* const stream = device.stream();
  x = dense(x), w1 = dense(w1), b1 = dense(b1), w2 = dense(w2), b2 = dense(b2), idx = dense(idx);
  norm_weight = dense(norm_weight), norm_bias = dense(norm_bias), scale = dense(scale);

  const auto [rows, width, hidden, kept, out] = sizes;
  const bool keep_stats = save && norm_weight;
  Tensor y = empty(x, {rows, out}, x.scalar_type());
  Tensor pre = empty(x, {save ? rows : 0, kept}, x.scalar_type());
  Tensor activation = empty(x, {rows, kept}, x.scalar_type());
  Tensor stats = empty(x, {norm_weight ? rows : 0, 2}, ScalarType::Float);
  dispatch("dropped_mlp", x.scalar_type(),
           [&, rows = rows, width = width, hidden = hidden, kept = kept, out = out](auto number) {
             using T = decltype(number);
             if (norm_weight) launch_row_stats<T>(rows, width, norm_eps, view<const T>(x), view<float>(stats), stream);
             const auto kept_nodes = view<const int64_t>(idx);
             Operand<T> input{view<const T>(x), rows, width, width};
             if (norm_weight) {
               input.stats = view<const float>(stats);
               input.norm_weight = view<const T>(norm_weight);
               input.norm_bias = view<const T>(norm_bias);
             }
             Operand<T> first{view<const T>(w1), kept, width, width, kept_nodes};
             Result<T> nodes;
             if (save) nodes.out = view<T>(pre);
             nodes.activation = view<T>(activation);
             nodes.stride = kept;
             nodes.column_index = kept_nodes;
             nodes.bias = view<const T>(b1);
             launch_hidden<T>(input, first, nodes, stream);

             Operand<T> active{view<const T>(activation), rows, kept, kept};
             Operand<T> second{view<const T>(w2), out, kept, hidden};
             second.column_index = kept_nodes;
             Result<T> outputs;
             outputs.out = view<T>(y);
             outputs.stride = out;
             outputs.bias = view<const T>(b2);
             outputs.scale = view<const T>(scale);
             if (residual) outputs.other = view<const T>(x);
             launch_output<T>(active, second, outputs, stream);
           });
  return {y, pre, keep_stats ? stats : empty(x, {0, 2}, ScalarType::Float)};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients dropped_mlp_backward(Tensor grad, Tensor x, Tensor w1, Tensor w2, Optional b2, Optional idx,
                               Optional norm_weight, Optional norm_bias, Optional scale, bool residual, Tensor pre,
                               Tensor stats, int64_t output_mask) {
  constexpr const char* op = "dropped_mlp_backward";
  const Sizes sizes = check(op, x, w1, w2, b2, idx, norm_weight, norm_bias, scale, residual);
  const auto [rows, width, hidden, kept, out] = sizes;
  const ScalarType dtype = x.scalar_type();
  expect(op, "grad", grad, {rows, out}, dtype, x);
  expect(op, "pre", pre, {rows, kept}, dtype, x);
  expect(op, "stats", stats, {norm_weight ? rows : 0, 2}, ScalarType::Float, x);
  STD_TORCH_CHECK(output_mask >= 0 && output_mask < 256, op, ": expected output_mask to have 8 bits, got ",
                  output_mask);
  const auto wants = [&](int i) { return (output_mask >> i & 1) != 0; };
  const bool wants_x = wants(0), wants_w1 = wants(1), wants_b1 = wants(2), wants_w2 = wants(3), wants_b2 = wants(4);
  const bool wants_weight = wants(5) && norm_weight, wants_bias = wants(6) && norm_weight, wants_scale = wants(7);

  const Device device(x);
  void* const stream = device.stream();
  grad = dense(grad), x = dense(x), w1 = dense(w1), w2 = dense(w2), b2 = dense(b2), idx = dense(idx);
  norm_weight = dense(norm_weight), norm_bias = dense(norm_bias), scale = dense(scale);
  pre = dense(pre), stats = dense(stats);

  // Dropped nodes keep the zeros.
  const auto make = [&](bool wanted, std::initializer_list<int64_t> shape, bool dropped) {
    if (!wanted) return empty(x, {0}, dtype);
    const std::vector<int64_t> full(shape);
    return dropped ? torch::stable::new_zeros(x, {full.data(), full.size()}, dtype) : empty(x, shape, dtype);
  };
  const bool dropped = idx.has_value();
  Tensor grad_x = make(wants_x, {rows, width}, false), grad_w1 = make(wants_w1, {hidden, width}, dropped);
  Tensor grad_b1 = make(wants_b1, {hidden}, dropped), grad_w2 = make(wants_w2, {out, hidden}, dropped);
  Tensor grad_b2 = make(wants_b2, {out}, false), grad_scale = make(wants_scale, {out}, false);
  Tensor grad_weight = make(wants_weight, {width}, false), grad_bias = make(wants_bias, {width}, false);

  const bool needs_input = wants_x || wants_weight || wants_bias;
  const bool needs_nodes = needs_input || wants_w1 || wants_b1;
  const bool needs_normed = needs_input && norm_weight;
  const int64_t chunks = (rows + kSummedRows - 1) / kSummedRows;
  Tensor grad_pre = empty(x, {needs_nodes ? rows : 0, kept}, dtype);
  Tensor grad_normed = empty(x, {needs_normed ? rows : 0, width}, dtype);

  dispatch(op, dtype, [&, rows = rows, width = width, hidden = hidden, kept = kept, out = out](auto number) {
    using T = decltype(number);
    const auto kept_nodes = view<const int64_t>(idx);
    const Operand<T> gradient{view<const T>(grad), rows, out, out};
    // sum over rows of values (times the normalised x), times factor, plus row_partials
    const auto sum_columns = [&](int64_t columns, const Tensor& values, bool normalised, View<const T> factor,
                                 View<const double> row_partials, View<const int64_t> index, Tensor& target) {
      Tensor partials = empty(x, {chunks, columns}, ScalarType::Double);
      launch_column_sums<T>(rows, columns, view<const T>(values), normalised ? view<const T>(x) : View<const T>(),
                            normalised ? view<const float>(stats) : View<const float>(), view<double>(partials),
                            stream);
      launch_finish_sums<T>(columns, view<const double>(partials), factor, row_partials, index, view<T>(target),
                            stream);
    };

    if (needs_nodes) {
      Operand<T> scaled = gradient, second{view<const T>(w2), out, kept, hidden};
      scaled.column_scale = view<const T>(scale);
      second.column_index = kept_nodes;
      Result<T> nodes;
      nodes.out = view<T>(grad_pre);
      nodes.stride = kept;
      nodes.other = view<const T>(pre);
      launch_hidden_gradient<T>(scaled, second, nodes, stream);
    }
    const Operand<T> nodes{view<const T>(grad_pre), rows, kept, kept};
    if (needs_input) {
      const Operand<T> first{view<const T>(w1), kept, width, width, kept_nodes};
      Result<T> inputs;
      inputs.out = view<T>(norm_weight ? grad_normed : grad_x);
      inputs.stride = width;
      if (residual && !norm_weight) inputs.other = view<const T>(grad);
      launch_input_gradient<T>(nodes, first, inputs, stream);
    }
    if (wants_x && norm_weight)
      launch_norm_gradient<T>(rows, width, view<const T>(grad_normed), view<const T>(x), view<const float>(stats),
                              view<const T>(norm_weight), residual ? view<const T>(grad) : View<const T>(),
                              view<T>(grad_x), stream);
    if (wants_w1) {
      Operand<T> input{view<const T>(x), rows, width, width};
      if (norm_weight) {
        input.stats = view<const float>(stats);
        input.norm_weight = view<const T>(norm_weight);
        input.norm_bias = view<const T>(norm_bias);
      }
      Result<T> weights;
      weights.out = view<T>(grad_w1);
      weights.stride = width;
      weights.row_index = kept_nodes;
      launch_first_weight_gradient<T>(nodes, input, weights, stream);
    }
    if (wants_b1) sum_columns(kept, grad_pre, false, {}, {}, kept_nodes, grad_b1);
    if (wants_weight) sum_columns(width, grad_normed, true, {}, {}, {}, grad_weight);
    if (wants_bias) sum_columns(width, grad_normed, false, {}, {}, {}, grad_bias);

    // d loss / d scale_e = sum_m grad_me (sum_k a_mk w2_ek + b2_e), of which the first is the row sum of g * w2 with
    // g = grad^T a, the gradient of w2 without the scale.
    Tensor row_partials = empty(x, {wants_scale ? out : 0, product_columns<T>(kept)}, ScalarType::Double);
    if (wants_w2 || wants_scale) {
      const Operand<T> before{view<const T>(pre), rows, kept, kept};
      Result<T> weights;
      if (wants_w2) weights.out = view<T>(grad_w2);
      weights.stride = hidden;
      weights.column_index = kept_nodes;
      weights.scale = view<const T>(scale);
      if (wants_scale) {
        weights.other = view<const T>(w2);
        weights.partials = view<double>(row_partials);
      }
      launch_second_weight_gradient<T>(gradient, before, weights, stream);
    }
    if (wants_b2) sum_columns(out, grad, false, view<const T>(scale), {}, {}, grad_b2);
    if (wants_scale && b2)
      sum_columns(out, grad, false, view<const T>(b2), view<const double>(row_partials), {}, grad_scale);
    else if (wants_scale)
      launch_finish_sums<T>(out, {}, {}, view<const double>(row_partials), {}, view<T>(grad_scale), stream);
  });
  return {grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_weight, grad_bias, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcvit, DCVIT_KEY, m) {
  m.impl(DCVIT_OP("dropped_mlp"), TORCH_BOX(&dropped_mlp));
  m.impl(DCVIT_OP("dropped_mlp_backward"), TORCH_BOX(&dropped_mlp_backward));
}

}  // namespace dcvit
