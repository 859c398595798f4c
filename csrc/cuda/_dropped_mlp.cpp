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

// Returns the kept part of a weight as a contiguous tensor, each row multiplied by its `factor`.
Tensor pack(const Tensor& from, int64_t rows, int64_t columns, const Optional& row_index, const Optional& column_index,
            const Optional& factor, int64_t hidden, void* stream) {
  if (!row_index && !column_index && !factor) return from;
  Tensor packed = empty(from, {rows, columns}, from.scalar_type());
  dispatch("dropped_mlp", from.scalar_type(), [&](auto number) {
    using T = decltype(number);
    launch_pack<T>(rows, columns, from.dim() == 2 ? from.size(1) : 0, hidden, view<const int64_t>(row_index),
                   view<const int64_t>(column_index), view<const T>(factor), view<const T>(from), view<T>(packed),
                   stream);
  });
  return packed;
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
  Tensor stats = empty(x, {save && norm_weight ? rows : 0, 2}, ScalarType::Float);
  Tensor input = norm_weight ? empty(x, {rows, width}, x.scalar_type()) : x;
  if (norm_weight)
    dispatch("dropped_mlp", x.scalar_type(), [&, rows = rows, width = width](auto number) {
      using T = decltype(number);
      launch_normalise<T>(rows, width, norm_eps, view<const T>(x), view<const T>(norm_weight), view<const T>(norm_bias),
                          {}, save ? view<float>(stats) : View<float>(), view<T>(input), stream);
    });
  if (b1 && idx) {
    Tensor packed = pack(*b1, 1, kept, {}, idx, {}, hidden, stream);
    b1 = torch::stable::view(packed, {kept});
  }
  Tensor pre = linear(input, pack(w1, kept, width, idx, {}, {}, hidden, stream), b1);
  Tensor activation = save ? empty(x, {rows, kept}, x.scalar_type()) : pre;
  dispatch("dropped_mlp", x.scalar_type(), [&](auto number) {
    using T = decltype(number);
    launch_activate<T>(pre.numel(), view<const T>(pre), view<T>(activation), stream);
  });
  const bool finish = scale || residual;
  Tensor y = linear(activation, pack(w2, out, kept, {}, idx, {}, hidden, stream), finish ? Optional() : b2);
  if (finish)
    dispatch("dropped_mlp", x.scalar_type(), [&, rows = rows, out = out](auto number) {
      using T = decltype(number);
      launch_finish<T>(rows, out, view<const T>(y), view<const T>(b2), view<const T>(scale),
                       residual ? view<const T>(x) : View<const T>(), view<T>(y), stream);
    });
  return {y, save ? pre : empty(x, {0, kept}, x.scalar_type()), stats};
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

  const auto none = [&] { return empty(x, {0}, dtype); };
  const auto make = [&](bool wanted, std::initializer_list<int64_t> shape) {
    return wanted ? empty(x, shape, dtype) : none();
  };
  const auto zeros = [&](std::initializer_list<int64_t> shape) {
    const std::vector<int64_t> full(shape);
    return torch::stable::new_zeros(x, {full.data(), full.size()}, dtype);
  };
  Tensor grad_x = none(), grad_w1 = none(), grad_w2 = none();
  Tensor grad_b1 = wants_b1 && idx ? zeros({hidden}) : make(wants_b1, {hidden});  // dropped hidden units keep the zeros
  Tensor grad_b2 = make(wants_b2, {out}), grad_scale = make(wants_scale, {out});
  Tensor grad_weight = make(wants_weight, {width}), grad_bias = make(wants_bias, {width});

  const bool needs_input = wants_x || wants_weight || wants_bias;
  const bool needs_nodes = needs_input || wants_w1 || wants_b1;
  const bool needs_activation = wants_w2 || wants_scale;
  const int64_t chunks = (rows + kSummedRows - 1) / kSummedRows;
  const auto partials = [&](bool wanted, int64_t columns) {
    return empty(x, {wanted ? chunks : 0, columns}, ScalarType::Double);
  };

  dispatch(op, dtype, [&, rows = rows, width = width, hidden = hidden, kept = kept, out = out](auto number) {
    using T = decltype(number);
    const auto given = [](bool wanted, const Tensor& sums) { return wanted ? view<double>(sums) : View<double>(); };

    Tensor activation = empty(x, {needs_activation ? rows : 0, kept}, dtype);
    if (needs_nodes) {
      Tensor grad_pre = product(grad, pack(w2, out, kept, {}, idx, scale, hidden, stream));
      Tensor sums = partials(wants_b1, kept);
      launch_hidden_gradient<T>(rows, kept, view<const T>(pre), view<T>(grad_pre),
                                needs_activation ? view<T>(activation) : View<T>(), given(wants_b1, sums), stream);
      if (wants_b1)
        launch_finish_sums<T>(kept, view<const double>(sums), {}, {}, view<const int64_t>(idx), view<T>(grad_b1),
                              stream);
      if (wants_w1) {
        Tensor input = norm_weight ? empty(x, {rows, width}, dtype) : x;
        if (norm_weight)
          launch_normalise<T>(rows, width, 0, view<const T>(x), view<const T>(norm_weight), view<const T>(norm_bias),
                              view<const float>(stats), {}, view<T>(input), stream);
        grad_w1 = product(transposed(grad_pre), input);
        if (idx) {
          const Tensor packed = grad_w1;
          grad_w1 = zeros({hidden, width});
          launch_unpack<T>(kept, width, width, hidden, view<const int64_t>(idx), {}, {}, view<const T>(packed), {},
                           view<T>(grad_w1), {}, stream);
        }
      }
      if (needs_input) {
        Tensor grad_input = product(grad_pre, pack(w1, kept, width, idx, {}, {}, hidden, stream));
        if (wants_weight || wants_bias) {
          Tensor plain = partials(wants_bias, width), normalised = partials(wants_weight, width);
          launch_column_sums<T>(rows, width, view<const T>(grad_input), view<const T>(x), view<const float>(stats),
                                given(wants_bias, plain), given(wants_weight, normalised), stream);
          if (wants_bias)
            launch_finish_sums<T>(width, view<const double>(plain), {}, {}, {}, view<T>(grad_bias), stream);
          if (wants_weight)
            launch_finish_sums<T>(width, view<const double>(normalised), {}, {}, {}, view<T>(grad_weight), stream);
        }
        const auto past = residual ? view<const T>(grad) : View<const T>();
        if (wants_x && norm_weight)
          launch_norm_gradient<T>(rows, width, view<const T>(grad_input), view<const T>(x), view<const float>(stats),
                                  view<const T>(norm_weight), past, view<T>(grad_input), stream);
        else if (wants_x && residual)
          launch_finish<T>(rows, width, view<const T>(grad_input), {}, {}, past, view<T>(grad_input), stream);
        if (wants_x) grad_x = grad_input;
      }
    } else if (needs_activation) {
      launch_activate<T>(pre.numel(), view<const T>(pre), view<T>(activation), stream);
    }

    // d loss / d scale_e = sum_m grad_me (sum_k a_mk w2_ek + b2_e). The first term is the sum of row e of g * w2, where
    // g = grad^T a is the gradient of w2 without the scale.
    Tensor row_sums = empty(x, {wants_scale ? out : 0}, ScalarType::Double);
    if (needs_activation) {
      const Tensor packed = product(transposed(grad), activation);
      const bool placed = wants_w2 && (idx || scale);
      if (placed) grad_w2 = idx ? zeros({out, hidden}) : empty(x, {out, hidden}, dtype);
      if (placed || wants_scale)
        launch_unpack<T>(out, kept, hidden, hidden, {}, view<const int64_t>(idx), view<const T>(scale),
                         view<const T>(packed), view<const T>(w2), placed ? view<T>(grad_w2) : View<T>(),
                         given(wants_scale, row_sums), stream);
      if (wants_w2 && !placed) grad_w2 = packed;
    }
    const bool sums_grad = wants_b2 || (wants_scale && b2);
    Tensor sums = partials(sums_grad, out);
    if (sums_grad) launch_column_sums<T>(rows, out, view<const T>(grad), {}, {}, view<double>(sums), {}, stream);
    if (wants_b2)
      launch_finish_sums<T>(out, view<const double>(sums), view<const T>(scale), {}, {}, view<T>(grad_b2), stream);
    if (wants_scale)
      launch_finish_sums<T>(out, b2 ? view<const double>(sums) : View<const double>(), view<const T>(b2),
                            view<const double>(row_sums), {}, view<T>(grad_scale), stream);
  });
  return {grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_weight, grad_bias, grad_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dcvit, DCVIT_KEY, m) {
  m.impl(DCVIT_OP("dropped_mlp"), TORCH_BOX(&dropped_mlp));
  m.impl(DCVIT_OP("dropped_mlp_backward"), TORCH_BOX(&dropped_mlp_backward));
}

}  // namespace dcvit
