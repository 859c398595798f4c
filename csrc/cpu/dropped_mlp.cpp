// The MLP of a compressed block: x + scale * (GELU(LayerNorm(x) W1[idx]^T + b1[idx]) W2[:, idx]^T + b2).
//
// The BLAS computes the matrix products. Rows pass through the whole op in blocks, so that values between the products
// stay in the cache and only the pre-activations are saved for the backward. In the forward, and in the backward up to
// the gradients of the weights, each thread processes its own blocks, with products on one thread, so that no thread
// waits for another. The gradients of the weights are summed over larger blocks, with products on all threads.
//
// The kept rows of the weights are packed once per call, because the BLAS needs them contiguous. This copy costs M
// times less than a product.

#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "gelu.h"
#include "support.h"

namespace dcvit::cpu {
namespace {

constexpr int64_t kRows = 1024;   // rows of a block, with 12 MB of activations for 3072 hidden units
constexpr int64_t kFewRows = 64;  // the fewest rows of a thread
constexpr int kLanes = 32;
constexpr int64_t kGroup = 8;  // rows that are summed in T before they are added to a column's sum in double

// --- rows: the steps between the products ------------------------------------------------------------------------

// Adds lanes pairwise until one is left. For so few numbers, this is as exact as a sum in double.
template <typename W>
DCVIT_HD double sum_lanes(W* __restrict lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return double(lanes[0]);
}

// Computes a row's mean and 1/std.
template <typename T, typename W = Wide<T>>
DCVIT_HD void row_stats(const T* __restrict x, int64_t width, double eps, W* __restrict stats) {
  W sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += W(x[i + lane]);
  }
  double total = sum_lanes(sums);
  for (; i < width; ++i) total += double(x[i]);
  const W mean = W(total / double(width));

  W squares[kLanes] = {};
  double variance = 0;
  for (i = 0; i + kLanes <= width; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const W centred = W(x[i + lane]) - mean;
      squares[lane] += centred * centred;
    }
  }
  for (; i < width; ++i) variance += double(W(x[i]) - mean) * double(W(x[i]) - mean);
  variance += sum_lanes(squares);
  stats[0] = mean;
  stats[1] = W(1 / std::sqrt(variance / double(width) + eps));
}

template <typename T, typename W = Wide<T>>
DCVIT_HD void normalise_rows(const T* x, W* out, int64_t rows, int64_t width, const W* stats, const W* weight,
                             const W* bias) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict from = x + row * width;
    W* __restrict to = out + row * width;
    const W mean = stats[2 * row], rstd = stats[2 * row + 1];
    if (bias) {
      for (int64_t i = 0; i < width; ++i) to[i] = (W(from[i]) - mean) * rstd * weight[i] + bias[i];
    } else {
      for (int64_t i = 0; i < width; ++i) to[i] = (W(from[i]) - mean) * rstd * weight[i];
    }
  }
}

template <typename T, typename W = Wide<T>>
DCVIT_HD void stats_rows(const T* x, W* stats, int64_t rows, int64_t width, double eps) {
  for (int64_t row = 0; row < rows; ++row) row_stats(x + row * width, width, eps, stats + 2 * row);
}

// out = GELU(u); saves u in `pre` unless that is null. `out` may be u.
template <typename T, typename W = Wide<T>>
DCVIT_HD void gelu_all(const W* u, W* out, T* pre, int64_t count) {
  if (pre) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      pre[i] = T(u[i]);
      out[i] = gelu(u[i]);
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = gelu(u[i]);
  }
}

// y = x + scale * z, where x may be null and z may be y.
template <typename T, typename W = Wide<T>>
DCVIT_HD void finish_rows(const W* z, const W* scale, const T* x, T* y, int64_t rows, int64_t out) {
  for (int64_t row = 0; row < rows; ++row) {
    const W* from = z + row * out;
    T* to = y + row * out;
    const T* skip = x ? x + row * out : nullptr;
    if (skip) {
#pragma GCC ivdep
      for (int64_t e = 0; e < out; ++e) to[e] = T(W(skip[e]) + scale[e] * from[e]);
    } else {
#pragma GCC ivdep
      for (int64_t e = 0; e < out; ++e) to[e] = T(scale[e] * from[e]);
    }
  }
}

template <typename T, typename W = Wide<T>>
DCVIT_HD void widen(const T* from, W* to, int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) to[i] = W(from[i]);
}

// Replaces the gradient of the activations by that of the pre-activations, adds its column sums to `sums`, and writes
// the activations if kActivate is set.
template <bool kActivate, typename T, typename W = Wide<T>>
DCVIT_HD void activation_gradient_rows(const T* pre, W* grad, W* activation, double* sums, int64_t rows, int64_t kept) {
  for (int64_t first = 0; first < rows; first += kGroup) {
    const int64_t last = std::min(rows, first + kGroup);
    int64_t k = 0;
    for (; k + kLanes <= kept; k += kLanes) {
      W columns[kLanes] = {};
      for (int64_t row = first; row < last; ++row) {
        const T* __restrict u = pre + row * kept + k;
        W* __restrict g = grad + row * kept + k;
        W* __restrict a = kActivate ? activation + row * kept + k : nullptr;
        for (int lane = 0; lane < kLanes; ++lane) {
          const Gelu<W> value = gelu_with_slope(W(u[lane]));
          const W product = g[lane] * value.slope;
          g[lane] = product;
          columns[lane] += product;
          if constexpr (kActivate) a[lane] = value.value;
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) sums[k + lane] += double(columns[lane]);
    }
    for (; k < kept; ++k) {
      for (int64_t row = first; row < last; ++row) {
        const Gelu<W> value = gelu_with_slope(W(pre[row * kept + k]));
        grad[row * kept + k] *= value.slope;
        sums[k] += double(grad[row * kept + k]);
        if constexpr (kActivate) activation[row * kept + k] = value.value;
      }
    }
  }
}

template <typename T>
DCVIT_HD void add_column_sums(const T* values, double* sums, int64_t rows, int64_t width) {
  for (int64_t first = 0; first < rows; first += kGroup) {
    const int64_t last = std::min(rows, first + kGroup);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      Wide<T> columns[kLanes] = {};
      for (int64_t row = first; row < last; ++row) {
        for (int lane = 0; lane < kLanes; ++lane) columns[lane] += Wide<T>(values[row * width + i + lane]);
      }
      for (int lane = 0; lane < kLanes; ++lane) sums[i + lane] += double(columns[lane]);
    }
    for (; i < width; ++i) {
      for (int64_t row = first; row < last; ++row) sums[i] += double(values[row * width + i]);
    }
  }
}

// Adds the gradients of the LayerNorm's weight and bias, which are sum grad * normalised(x) and sum grad.
template <typename T, typename W = Wide<T>>
DCVIT_HD void add_norm_sums(const W* grad, const T* x, const W* stats, double* weight, double* bias, int64_t rows,
                            int64_t width) {
  for (int64_t first = 0; first < rows; first += kGroup) {
    const int64_t last = std::min(rows, first + kGroup);
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      W products[kLanes] = {}, columns[kLanes] = {};
      for (int64_t row = first; row < last; ++row) {
        const W mean = stats[2 * row], rstd = stats[2 * row + 1];
        for (int lane = 0; lane < kLanes; ++lane) {
          const W g = grad[row * width + i + lane];
          products[lane] += g * ((W(x[row * width + i + lane]) - mean) * rstd);
          columns[lane] += g;
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        weight[i + lane] += double(products[lane]);
        bias[i + lane] += double(columns[lane]);
      }
    }
    for (; i < width; ++i) {
      for (int64_t row = first; row < last; ++row) {
        const W g = grad[row * width + i];
        weight[i] += double(g * ((W(x[row * width + i]) - stats[2 * row]) * stats[2 * row + 1]));
        bias[i] += double(g);
      }
    }
  }
}

// out = the LayerNorm's gradient, plus the residual's if `skip` is not null. `grad` may be `out`.
template <typename T, typename W = Wide<T>>
DCVIT_HD void norm_gradient_rows(const W* grad, const T* x, const W* stats, const W* weight, const T* skip, T* out,
                                 int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    const W* g = grad + row * width;
    const T* from = x + row * width;
    const W mean = stats[2 * row], rstd = stats[2 * row + 1];
    W sums[kLanes] = {}, products[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const W scaled = g[i + lane] * weight[i + lane];
        sums[lane] += scaled;
        products[lane] += scaled * ((W(from[i + lane]) - mean) * rstd);
      }
    }
    double sum = 0, product = 0;
    for (; i < width; ++i) {
      const W scaled = g[i] * weight[i];
      sum += double(scaled);
      product += double(scaled * ((W(from[i]) - mean) * rstd));
    }
    sum += sum_lanes(sums);
    product += sum_lanes(products);
    const W average = W(sum / double(width)), projection = W(product / double(width));
    T* to = out + row * width;
    const T* residual = skip ? skip + row * width : nullptr;
    if (residual) {
#pragma GCC ivdep
      for (i = 0; i < width; ++i) {
        const W normalised = (W(from[i]) - mean) * rstd;
        to[i] = T(rstd * (g[i] * weight[i] - average - normalised * projection) + W(residual[i]));
      }
    } else {
#pragma GCC ivdep
      for (i = 0; i < width; ++i) {
        const W normalised = (W(from[i]) - mean) * rstd;
        to[i] = T(rstd * (g[i] * weight[i] - average - normalised * projection));
      }
    }
  }
}

// out = grad + skip, in T; without a residual `skip` is null. `grad` may be `out`.
template <typename T, typename W = Wide<T>>
DCVIT_HD void narrow(const W* grad, const T* skip, T* out, int64_t count) {
  if (skip) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = T(grad[i] + W(skip[i]));
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = T(grad[i]);
  }
}

#define DCVIT_DEFINE(T)                                                                                               \
  DCVIT_CLONES void take_stats(const T* x, Wide<T>* stats, int64_t rows, int64_t width, double eps) {                 \
    stats_rows(x, stats, rows, width, eps);                                                                           \
  }                                                                                                                   \
  DCVIT_CLONES void normalise(const T* x, Wide<T>* out, int64_t rows, int64_t width, const Wide<T>* stats,            \
                              const Wide<T>* weight, const Wide<T>* bias) {                                           \
    normalise_rows(x, out, rows, width, stats, weight, bias);                                                         \
  }                                                                                                                   \
  DCVIT_CLONES void activate(const Wide<T>* u, Wide<T>* out, T* pre, int64_t count) { gelu_all(u, out, pre, count); } \
  DCVIT_CLONES void finish(const Wide<T>* z, const Wide<T>* scale, const T* x, T* y, int64_t rows, int64_t out) {     \
    finish_rows(z, scale, x, y, rows, out);                                                                           \
  }                                                                                                                   \
  DCVIT_CLONES void activation_gradient(const T* pre, Wide<T>* grad, Wide<T>* activation, double* sums, int64_t rows, \
                                        int64_t kept) {                                                               \
    if (activation) {                                                                                                 \
      activation_gradient_rows<true>(pre, grad, activation, sums, rows, kept);                                        \
    } else {                                                                                                          \
      activation_gradient_rows<false>(pre, grad, activation, sums, rows, kept);                                       \
    }                                                                                                                 \
  }                                                                                                                   \
  DCVIT_CLONES void column_sums(const T* values, double* sums, int64_t rows, int64_t width) {                         \
    add_column_sums(values, sums, rows, width);                                                                       \
  }                                                                                                                   \
  DCVIT_CLONES void norm_sums(const Wide<T>* grad, const T* x, const Wide<T>* stats, double* weight, double* bias,    \
                              int64_t rows, int64_t width) {                                                          \
    add_norm_sums(grad, x, stats, weight, bias, rows, width);                                                         \
  }                                                                                                                   \
  DCVIT_CLONES void norm_gradient(const Wide<T>* grad, const T* x, const Wide<T>* stats, const Wide<T>* weight,       \
                                  const T* skip, T* out, int64_t rows, int64_t width) {                               \
    norm_gradient_rows(grad, x, stats, weight, skip, out, rows, width);                                               \
  }                                                                                                                   \
  DCVIT_CLONES void to_narrow(const Wide<T>* grad, const T* skip, T* out, int64_t count) {                            \
    narrow(grad, skip, out, count);                                                                                   \
  }                                                                                                                   \
  DCVIT_CLONES void to_wide(const T* from, Wide<T>* to, int64_t count) { widen(from, to, count); }
DCVIT_DEFINE(float)
DCVIT_DEFINE(double)
DCVIT_DEFINE(Half)
DCVIT_DEFINE(BFloat16)
#undef DCVIT_DEFINE

// --- products ----------------------------------------------------------------------------------------------------

template <typename W>
constexpr ScalarType kType = std::is_same_v<W, double> ? ScalarType::Double : ScalarType::Float;

// A matrix in memory, as the BLAS takes it.
template <typename W>
struct Matrix {
  W* data;
  int64_t rows, columns;
  bool transposed = false;  // in memory it is [columns, rows]

  Matrix t() const { return {data, columns, rows, !transposed}; }

  Tensor view() const {
    const int64_t sizes[] = {rows, columns};
    const int64_t strides[] = {transposed ? 1 : std::max<int64_t>(1, columns),
                               transposed ? std::max<int64_t>(1, rows) : 1};
    return matrix_at(data, sizes, strides);
  }
};

// c = a b, or c += a b.
template <typename W>
void multiply(const Matrix<W>& a, const Matrix<W>& b, const Matrix<W>& c, bool add = false) {
  if (c.rows == 0 || c.columns == 0) return;
  if (a.columns == 0) {
    if (!add) std::fill(c.data, c.data + c.rows * c.columns, W(0));
    return;
  }
  const Tensor left = a.view(), right = b.view();
  Tensor out = c.view();
  if (add) {
    addmm_into(out, out, left, right);
  } else {
    mm_into(out, left, right);
  }
}

// c = a b with the bias added to each row. Writing the bias first costs the BLAS no more than writing zeros.
template <typename W>
void multiply(const Matrix<W>& a, const Matrix<W>& b, const std::vector<W>& bias, const Matrix<W>& c) {
  for (int64_t row = 0; row < c.rows; ++row) std::copy(bias.begin(), bias.end(), c.data + row * c.columns);
  multiply(a, b, c, true);
}

// --- the op ------------------------------------------------------------------------------------------------------

struct Arguments {
  Tensor x, w1, w2;
  std::optional<Tensor> b1, b2, idx, norm_weight, norm_bias, scale;
  int64_t rows, width, hidden, kept, out;
};

void check_vector(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t size,
                  ScalarType type) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size, op, ": expected ", name, " [", size, "], got ",
                  tensor->numel(), " numbers in ", tensor->dim(), " dimensions");
  STD_TORCH_CHECK(tensor->scalar_type() == type, op, ": expected ", name, " in the dtype of x, ",
                  static_cast<int>(type), ", got ", static_cast<int>(tensor->scalar_type()));
}

Arguments check(const char* op, const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1, const Tensor& w2,
                const std::optional<Tensor>& b2, const std::optional<Tensor>& idx,
                const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
                const std::optional<Tensor>& scale, bool residual) {
  STD_TORCH_CHECK(x.dim() == 2 && w1.dim() == 2 && w2.dim() == 2, op,
                  ": expected x [M, D], w1 [H, D] and w2 [E, H], got ", x.dim(), ", ", w1.dim(), " and ", w2.dim(),
                  " dimensions");
  const int64_t rows = x.size(0), width = x.size(1), hidden = w1.size(0), out = w2.size(0);
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(w1.size(1) == width, op, ": expected w1 [H, ", width, "], got ", w1.size(1), " columns");
  STD_TORCH_CHECK(w2.size(1) == hidden, op, ": expected w2 [E, ", hidden, "], got ", w2.size(1), " columns");
  STD_TORCH_CHECK(w1.scalar_type() == type && w2.scalar_type() == type, op, ": expected weights in the dtype of x, ",
                  static_cast<int>(type), ", got ", static_cast<int>(w1.scalar_type()), " and ",
                  static_cast<int>(w2.scalar_type()));
  STD_TORCH_CHECK(!residual || out == width, op, ": expected E = D = ", width, " with a residual, got E = ", out);
  STD_TORCH_CHECK(!norm_bias || norm_weight, op, ": expected norm_weight with norm_bias, got norm_bias alone");
  check_vector(op, "b1", b1, hidden, type);
  check_vector(op, "b2", b2, out, type);
  check_vector(op, "norm_weight", norm_weight, width, type);
  check_vector(op, "norm_bias", norm_bias, width, type);
  check_vector(op, "scale", scale, out, type);
  Arguments a{dense(x),         dense(w1),    dense(w2), dense(b1), dense(b2), dense(idx), dense(norm_weight),
              dense(norm_bias), dense(scale), rows,      width,     hidden,    hidden,     out};
  if (idx) {
    STD_TORCH_CHECK(idx->dim() == 1 && idx->scalar_type() == ScalarType::Long, op, ": expected idx [K] in int64, got ",
                    idx->dim(), " dimensions of dtype ", static_cast<int>(idx->scalar_type()));
    a.kept = idx->size(0);
    const int64_t* nodes = data<int64_t>(*a.idx);
    for (int64_t k = 0; k < a.kept; ++k) {
      STD_TORCH_CHECK(nodes[k] >= 0 && nodes[k] < hidden, op, ": expected idx in [0, ", hidden, "), got ", nodes[k],
                      " at ", k);
    }
  }
  return a;
}

// The kept weights and all vectors, in W. Weights are copied only if hidden units are dropped, W differs from T, or the
// LayerScale is multiplied in.
template <typename T, typename W = Wide<T>>
struct Weights {
  std::optional<Tensor> packed1, packed2;
  const W *w1, *w2;  // [K, D], [E, K]
  std::vector<W> b1, b2, scale, norm_weight, norm_bias;

  // If `scaled` is set, the rows of w2 are multiplied with the LayerScale.
  Weights(const Arguments& a, bool scaled) {
    const int64_t* nodes = a.idx ? data<int64_t>(*a.idx) : nullptr;
    constexpr bool same = std::is_same_v<T, W>;
    const bool all = !a.idx;
    const auto at = [&](int64_t k) { return all ? k : nodes[k]; };
    scale = vector(a.scale, a.out, W(1));
    const T *from1 = data<T>(a.w1), *from2 = data<T>(a.w2);
    if (same && all) {
      w1 = reinterpret_cast<const W*>(from1);
    } else {
      packed1 = make(a.x, {a.kept, a.width}, kType<W>);
      W* to = data<W>(*packed1);
      w1 = to;
      parallel(a.kept, ceil_div(32768, std::max<int64_t>(1, a.width)), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) to_wide(from1 + at(k) * a.width, to + k * a.width, a.width);
      });
    }
    scaled = scaled && a.scale;
    if (same && all && !scaled) {
      w2 = reinterpret_cast<const W*>(from2);
    } else {
      packed2 = make(a.x, {a.out, a.kept}, kType<W>);
      W* to = data<W>(*packed2);
      w2 = to;
      parallel(a.out, ceil_div(32768, std::max<int64_t>(1, a.kept)), [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
          const W factor = scaled ? scale[e] : W(1);
          const T* row = from2 + e * a.hidden;
          for (int64_t k = 0; k < a.kept; ++k) to[e * a.kept + k] = W(row[at(k)]) * factor;
        }
      });
    }
    b1.assign(a.kept, W(0));
    for (int64_t k = 0; a.b1 && k < a.kept; ++k) b1[k] = W(data<T>(*a.b1)[at(k)]);
    b2 = vector(a.b2, a.out, W(0));
    if (a.norm_weight) norm_weight = vector(a.norm_weight, a.width, W(1));
    if (a.norm_bias) norm_bias = vector(a.norm_bias, a.width, W(0));
  }

  static std::vector<W> vector(const std::optional<Tensor>& tensor, int64_t size, W otherwise) {
    std::vector<W> values(size, otherwise);
    for (int64_t i = 0; tensor && i < size; ++i) values[i] = W(data<T>(*tensor)[i]);
    return values;
  }

  Matrix<W> first(const Arguments& a) const { return {const_cast<W*>(w1), a.kept, a.width}; }
  Matrix<W> second(const Arguments& a) const { return {const_cast<W*>(w2), a.out, a.kept}; }
  const W* norm_bias_or_null() const { return norm_bias.empty() ? nullptr : norm_bias.data(); }
};

// A split of rows into blocks of equal size, with the same number for each thread, so that no thread waits long.
struct Blocks {
  int64_t slots;  // working threads, each with its own memory
  int64_t each;   // blocks per slot
  int64_t rows;   // rows per block

  Blocks(int64_t total, int64_t largest) {
    const int64_t threads = num_threads();
    slots = std::clamp<int64_t>(total / kFewRows, 1, threads);
    each = std::max<int64_t>(1, ceil_div(total, slots * largest));
    rows = std::max<int64_t>(1, ceil_div(total, slots * each));
  }

  // f(slot, first row, number of rows)
  template <typename F>
  void run(int64_t total, const F& f) const {
    parallel(slots, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) {
        for (int64_t block = slot * each; block < (slot + 1) * each; ++block) {
          const int64_t first = block * rows, count = std::min(total, first + rows) - first;
          if (count > 0) f(slot, first, count);
        }
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> dropped_mlp(const Tensor& x, const Tensor& w1, const std::optional<Tensor>& b1,
                                               const Tensor& w2, const std::optional<Tensor>& b2,
                                               const std::optional<Tensor>& idx,
                                               const std::optional<Tensor>& norm_weight,
                                               const std::optional<Tensor>& norm_bias, double norm_eps,
                                               const std::optional<Tensor>& scale, bool residual, bool save) {
  const Arguments a = check("dropped_mlp", x, w1, b1, w2, b2, idx, norm_weight, norm_bias, scale, residual);
  const ScalarType wide = wide_type(x.scalar_type());
  const bool norm = a.norm_weight.has_value();
  Tensor y = make(a.x, {a.rows, a.out});
  Tensor pre = make(a.x, {save ? a.rows : 0, a.kept});
  Tensor stats = make(a.x, {save && norm ? a.rows : 0, 2}, wide);
  dispatch_all("dropped_mlp", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    constexpr bool same = std::is_same_v<T, W>;
    const Weights<T> weights(a, false);
    const Blocks blocks(a.rows, kRows);
    // Memory for the blocks' inputs, activations and outputs, where these are not in an argument or result.
    const bool own_input = norm || !same;
    const Tensor input = make(a.x, {own_input ? blocks.slots * blocks.rows : 0, a.width}, wide);
    const Tensor activation = make(a.x, {blocks.slots * blocks.rows, a.kept}, wide);
    const Tensor output = make(a.x, {same ? 0 : blocks.slots * blocks.rows, a.out}, wide);
    const Tensor own_stats = make(a.x, {norm && !save ? blocks.slots * blocks.rows : 0, 2}, wide);

    blocks.run(a.rows, [&](int64_t slot, int64_t first, int64_t count) {
      const T* rows = data<T>(a.x) + first * a.width;
      W* h =
          own_input ? data<W>(input) + slot * blocks.rows * a.width : const_cast<W*>(reinterpret_cast<const W*>(rows));
      if (norm) {
        W* row_stats = save ? data<W>(stats) + 2 * first : data<W>(own_stats) + 2 * slot * blocks.rows;
        take_stats(rows, row_stats, count, a.width, norm_eps);
        normalise(rows, h, count, a.width, row_stats, weights.norm_weight.data(), weights.norm_bias_or_null());
      } else if (own_input) {
        to_wide(rows, h, count * a.width);
      }
      W* act = data<W>(activation) + slot * blocks.rows * a.kept;
      T* keep = save ? data<T>(pre) + first * a.kept : nullptr;
      W* u = same && save ? reinterpret_cast<W*>(keep) : act;
      multiply<W>({h, count, a.width}, weights.first(a).t(), weights.b1, {u, count, a.kept});
      activate(u, act, same ? nullptr : keep, count * a.kept);
      T* result = data<T>(y) + first * a.out;
      W* z = same ? reinterpret_cast<W*>(result) : data<W>(output) + slot * blocks.rows * a.out;
      multiply<W>({act, count, a.kept}, weights.second(a).t(), weights.b2, {z, count, a.out});
      if (!same || residual || a.scale) {
        finish(z, weights.scale.data(), residual ? rows : nullptr, result, count, a.out);
      }
    });
  });
  return {y, pre, stats};
}

// Bits of `output_mask`, in the order of the results.
enum Wanted { kX, kW1, kB1, kW2, kB2, kNormWeight, kNormBias, kScale };

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dropped_mlp_backward(
    const Tensor& grad_in, const Tensor& x, const Tensor& w1, const Tensor& w2, const std::optional<Tensor>& b2,
    const std::optional<Tensor>& idx, const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias,
    const std::optional<Tensor>& scale, bool residual, const Tensor& pre_in, const Tensor& stats_in,
    int64_t output_mask) {
  const char* op = "dropped_mlp_backward";
  const Arguments a = check(op, x, w1, std::nullopt, w2, b2, idx, norm_weight, norm_bias, scale, residual);
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  const bool norm = a.norm_weight.has_value();
  STD_TORCH_CHECK(grad_in.dim() == 2 && grad_in.size(0) == a.rows && grad_in.size(1) == a.out, op, ": expected grad [",
                  a.rows, ", ", a.out, "], got ", grad_in.numel(), " numbers in ", grad_in.dim(), " dimensions");
  STD_TORCH_CHECK(pre_in.dim() == 2 && pre_in.size(0) == a.rows && pre_in.size(1) == a.kept, op, ": expected pre [",
                  a.rows, ", ", a.kept, "], got ", pre_in.numel(), " numbers in ", pre_in.dim(), " dimensions");
  STD_TORCH_CHECK(!norm || stats_in.numel() == 2 * a.rows, op, ": expected stats [", a.rows, ", 2], got ",
                  stats_in.numel(), " numbers");
  STD_TORCH_CHECK(grad_in.scalar_type() == type && pre_in.scalar_type() == type && stats_in.scalar_type() == wide, op,
                  ": expected grad and pre in the dtype of x and stats in at least float32, got ",
                  static_cast<int>(grad_in.scalar_type()), ", ", static_cast<int>(pre_in.scalar_type()), " and ",
                  static_cast<int>(stats_in.scalar_type()));
  const Tensor grad = dense(grad_in), pre = dense(pre_in), stats = dense(stats_in);
  const auto wants = [&](Wanted bit) { return (output_mask >> bit & 1) != 0; };
  const auto result = [&](Wanted bit, std::initializer_list<int64_t> sizes) {
    return wants(bit) ? make(a.x, sizes) : make(a.x, {0});
  };
  Tensor gx = result(kX, {a.rows, a.width}), gw1 = result(kW1, {a.hidden, a.width}), gb1 = result(kB1, {a.hidden}),
         gw2 = result(kW2, {a.out, a.hidden}), gb2 = result(kB2, {a.out}), gnw = result(kNormWeight, {a.width}),
         gnb = result(kNormBias, {a.width}), gs = result(kScale, {a.out});

  dispatch_all(op, type, [&](auto zero) {
    using T = decltype(zero);
    using W = Wide<T>;
    constexpr bool same = std::is_same_v<T, W>;
    const bool need_h = wants(kX) || wants(kNormWeight) || wants(kNormBias);
    const bool need_u = need_h || wants(kW1) || wants(kB1);
    const bool need_g = wants(kW2) || wants(kScale);  // G = grad^T activation
    const bool own_grad = !same;
    const int64_t* nodes = a.idx ? data<int64_t>(*a.idx) : nullptr;
    const auto at = [&](int64_t k) { return a.idx ? nodes[k] : k; };
    const Weights<T> weights(a, true);

    // Rows per pass: a block for each thread, within limits for the products over rows and for memory.
    const int64_t threads = num_threads();
    const int64_t pass_rows =
        std::min(std::max<int64_t>(1, a.rows), std::clamp<int64_t>(kRows * threads, kRows, 4 * kRows));
    const int64_t passes = std::max<int64_t>(1, ceil_div(a.rows, pass_rows));
    const int64_t step = std::max<int64_t>(1, ceil_div(a.rows, passes));
    const Blocks blocks(step, kRows);
    const int64_t slots = blocks.slots;

    const Tensor activation = make(a.x, {need_g ? step : 0, a.kept}, wide);
    const Tensor grad_u = make(a.x, {need_u ? step : 0, a.kept}, wide);
    const bool own_h = norm || !same;
    const Tensor input = make(a.x, {own_h && wants(kW1) ? step : 0, a.width}, wide);
    const bool own_grad_h = need_h && !(same && wants(kX));
    const Tensor grad_h = make(a.x, {own_grad_h ? step : 0, a.width}, wide);
    const Tensor wide_grad = make(a.x, {own_grad ? step : 0, a.out}, wide);
    const bool direct = same && !a.idx;  // sums over rows are written to the result if all hidden units are kept
    const Tensor sum1 = make(a.x, {wants(kW1) && !direct ? a.kept : 0, a.width}, wide);
    const Tensor sum2 = make(a.x, {need_g && !(direct && wants(kW2)) ? a.out : 0, a.kept}, wide);
    W* total1 = wants(kW1) && direct ? reinterpret_cast<W*>(data<T>(gw1)) : data<W>(sum1);
    W* total2 = wants(kW2) && direct ? reinterpret_cast<W*>(data<T>(gw2)) : data<W>(sum2);
    // For each slot, column sums for the gradients of pre-activations, outputs, and LayerNorm's weight and bias.
    std::vector<double> sums_u(slots * a.kept), sums_grad(slots * a.out), sums_nw(slots * a.width),
        sums_nb(slots * a.width);

    for (int64_t start = 0; start < a.rows; start += step) {
      const int64_t total = std::min(step, a.rows - start);
      blocks.run(total, [&](int64_t slot, int64_t offset, int64_t count) {
        const int64_t first = start + offset;
        const T* g_rows = data<T>(grad) + first * a.out;
        const T* x_rows = data<T>(a.x) + first * a.width;
        const W* row_stats = norm ? data<W>(stats) + 2 * first : nullptr;
        W* g = own_grad ? data<W>(wide_grad) + offset * a.out : const_cast<W*>(reinterpret_cast<const W*>(g_rows));
        if (own_grad) to_wide(g_rows, g, count * a.out);
        if (wants(kB2) || wants(kScale)) column_sums(g_rows, sums_grad.data() + slot * a.out, count, a.out);
        W* act = need_g ? data<W>(activation) + offset * a.kept : nullptr;
        const T* u = data<T>(pre) + first * a.kept;
        if (need_u) {
          W* gu = data<W>(grad_u) + offset * a.kept;
          multiply<W>({g, count, a.out}, weights.second(a), {gu, count, a.kept});
          activation_gradient(u, gu, act, sums_u.data() + slot * a.kept, count, a.kept);
          if (own_h && wants(kW1)) {
            W* h = data<W>(input) + offset * a.width;
            if (norm) {
              normalise(x_rows, h, count, a.width, row_stats, weights.norm_weight.data(), weights.norm_bias_or_null());
            } else {
              to_wide(x_rows, h, count * a.width);
            }
          }
          if (need_h) {
            T* out = data<T>(gx) + first * a.width;
            W* gh = own_grad_h ? data<W>(grad_h) + offset * a.width : reinterpret_cast<W*>(out);
            multiply<W>({gu, count, a.kept}, weights.first(a), {gh, count, a.width});
            if (norm && (wants(kNormWeight) || wants(kNormBias))) {
              norm_sums(gh, x_rows, row_stats, sums_nw.data() + slot * a.width, sums_nb.data() + slot * a.width, count,
                        a.width);
            }
            const T* skip = residual ? g_rows : nullptr;
            if (wants(kX) && norm) {
              norm_gradient(gh, x_rows, row_stats, weights.norm_weight.data(), skip, out, count, a.width);
            } else if (wants(kX) && (skip || !same)) {
              to_narrow(gh, skip, out, count * a.width);
            }
          }
        } else if (need_g) {
          // Only the activations are needed.
          W* values = act;
          if constexpr (same) {
            std::copy(u, u + count * a.kept, values);
          } else {
            to_wide(u, values, count * a.kept);
          }
          activate(values, values, static_cast<T*>(nullptr), count * a.kept);
        }
      });
      const bool add = start > 0;
      const W* h = own_h ? data<W>(input) : reinterpret_cast<const W*>(data<T>(a.x) + start * a.width);
      const W* g = own_grad ? data<W>(wide_grad) : reinterpret_cast<const W*>(data<T>(grad) + start * a.out);
      if (wants(kW1)) {
        multiply<W>(Matrix<W>{data<W>(grad_u), total, a.kept}.t(), {const_cast<W*>(h), total, a.width},
                    {total1, a.kept, a.width}, add);
      }
      if (need_g) {
        multiply<W>(Matrix<W>{const_cast<W*>(g), total, a.out}.t(), {data<W>(activation), total, a.kept},
                    {total2, a.out, a.kept}, add);
      }
    }
    if (a.rows == 0) {
      if (wants(kW1)) std::fill(total1, total1 + a.kept * a.width, W(0));
      if (need_g) std::fill(total2, total2 + a.out * a.kept, W(0));
    }

    const auto over_slots = [&](const std::vector<double>& sums, int64_t size, int64_t i) {
      double sum = 0;
      for (int64_t slot = 0; slot < slots; ++slot) sum += sums[slot * size + i];
      return sum;
    };
    if (wants(kW1) && !direct) {
      T* to = data<T>(gw1);
      const int64_t grain = ceil_div(32768, std::max<int64_t>(1, a.width));
      parallel(a.hidden, grain,
               [&](int64_t begin, int64_t end) { std::fill(to + begin * a.width, to + end * a.width, T(0)); });
      parallel(a.kept, grain, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          to_narrow(total1 + k * a.width, nullptr, to + at(k) * a.width, a.width);
        }
      });
    }
    if (wants(kB1)) {
      std::fill(data<T>(gb1), data<T>(gb1) + a.hidden, T(0));
      for (int64_t k = 0; k < a.kept; ++k) data<T>(gb1)[at(k)] = T(over_slots(sums_u, a.kept, k));
    }
    // The LayerScale's gradient is sum grad * z with z = W2 a + b2, which follows from G and the column sums of grad.
    parallel(wants(kScale) ? a.out : 0, ceil_div(32768, std::max<int64_t>(1, a.kept)), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
        const T* row = data<T>(a.w2) + e * a.hidden;
        double sum = double(weights.b2[e]) * over_slots(sums_grad, a.out, e);
        for (int64_t k = 0; k < a.kept; ++k) sum += double(total2[e * a.kept + k]) * double(row[at(k)]);
        data<T>(gs)[e] = T(sum);
      }
    });
    if (wants(kW2) && (!direct || a.scale)) {
      T* to = data<T>(gw2);
      parallel(a.out, ceil_div(32768, std::max<int64_t>(1, a.hidden)), [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e) {
          if (!direct) std::fill(to + e * a.hidden, to + (e + 1) * a.hidden, T(0));
          for (int64_t k = 0; k < a.kept; ++k) {
            to[e * a.hidden + at(k)] = T(total2[e * a.kept + k] * weights.scale[e]);
          }
        }
      });
    }
    for (int64_t e = 0; wants(kB2) && e < a.out; ++e) {
      data<T>(gb2)[e] = T(double(weights.scale[e]) * over_slots(sums_grad, a.out, e));
    }
    for (int64_t i = 0; wants(kNormWeight) && i < a.width; ++i) data<T>(gnw)[i] = T(over_slots(sums_nw, a.width, i));
    for (int64_t i = 0; wants(kNormBias) && i < a.width; ++i) data<T>(gnb)[i] = T(over_slots(sums_nb, a.width, i));
  });
  return {gx, gw1, gb1, gw2, gb2, gnw, gnb, gs};
}

}  // namespace

DCVIT_LIBRARY_IMPL(dcvit, CPU, m) {
  m.impl("dropped_mlp", DCVIT_KERNEL(&dropped_mlp));
  m.impl("dropped_mlp_backward", DCVIT_KERNEL(&dropped_mlp_backward));
}

}  // namespace dcvit::cpu
