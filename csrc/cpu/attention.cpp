// Self-attention of few tokens: out = softmax(q k^T / sqrt(E)) v for each image and head.
//
// The products of a head are too small for BLAS calls, so they are computed here, in tiles that stay in registers.
// Scores are stored transposed, keys by queries, so that the softmax sums over rows and each lane has its own query.
// This needs a transposed copy of the queries (in the backward, of the output's gradients). All other inputs and
// outputs of a head are read and written in place, between those of the other heads.

#include <cmath>
#include <tuple>

#include "exp.h"
#include "support.h"

namespace dcvit::cpu {
namespace {

template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);  // numbers in an AVX-512 register; the compiler splits it for smaller ones

constexpr int64_t kGroup = 32;  // terms that are summed before they are added to a longer sum, for accuracy

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(64), aligned(alignof(T)), may_alias));
};

// --- a head ------------------------------------------------------------------------------------------------------

// A matrix with strides `row` and `column`, in numbers.
template <typename T>
struct Strided {
  const T* data;
  int64_t row, column;
};

template <int kRows, typename T>
DCVIT_HD void multiply_tile(const Strided<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t inner) {
  using V = typename Vector<T>::type;
  V sums[kRows] = {};
  for (int64_t first = 0; first < inner; first += kGroup) {
    V group[kRows] = {};
    for (int64_t k = first; k < std::min(inner, first + kGroup); ++k) {
      const V values = *reinterpret_cast<const V*>(b + k * b_row);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) group[row] += a.data[row * a.row + k * a.column] * values;
    }
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) sums[row] += group[row];
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) *reinterpret_cast<V*>(c + row * c_row) = sums[row];
}

// multiply_tile for `rows` rows, at most kRows.
template <int kRows, typename T>
DCVIT_HD void multiply_rest(const Strided<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows,
                            int64_t inner) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      multiply_tile<kRows>(a, b, b_row, c, c_row, inner);
    } else {
      multiply_rest<kRows - 1>(a, b, b_row, c, c_row, rows, inner);
    }
  }
}

// c = a b, where `columns` is a multiple of the vector length; rows of b and c are b_row and c_row apart.
template <typename T>
DCVIT_HD void multiply(const Strided<T>& a, const T* b, int64_t b_row, T* c, int64_t c_row, int64_t rows, int64_t inner,
                       int64_t columns) {
  constexpr int kTile = 6;  // takes 12 of AVX2's 16 registers, which hold half a vector each
  for (int64_t column = 0; column < columns; column += kLanes<T>) {
    int64_t row = 0;
    for (; row + kTile <= rows; row += kTile) {
      multiply_tile<kTile>(Strided<T>{a.data + row * a.row, a.row, a.column}, b + column, b_row,
                           c + row * c_row + column, c_row, inner);
    }
    multiply_rest<kTile - 1>(Strided<T>{a.data + row * a.row, a.row, a.column}, b + column, b_row,
                             c + row * c_row + column, c_row, rows - row, inner);
  }
}

// Transposes [rows, columns] to [columns, padded], with zeros after the rows.
template <typename T>
DCVIT_HD void transpose(const T* from, int64_t from_row, T* to, int64_t rows, int64_t padded, int64_t columns) {
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) to[column * padded + row] = from[row * from_row + column];
    for (int64_t row = rows; row < padded; ++row) to[column * padded + row] = T(0);
  }
}

// s = softmax(scale * s), for each column of s [rows, padded].
template <typename T>
DCVIT_HD void softmax(T* s, int64_t rows, int64_t padded, T scale) {
  for (int64_t column = 0; column < padded; column += kLanes<T>) {
    T largest[kLanes<T>], sums[kLanes<T>] = {};
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) largest[lane] = s[column + lane];
    for (int64_t row = 1; row < rows; ++row) {
      const T* __restrict values = s + row * padded + column;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        largest[lane] = values[lane] > largest[lane] ? values[lane] : largest[lane];
      }
    }
    for (int64_t first = 0; first < rows; first += kGroup) {
      T group[kLanes<T>] = {};
      for (int64_t row = first; row < std::min(rows, first + kGroup); ++row) {
        T* __restrict values = s + row * padded + column;
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
          const T x = (values[lane] - largest[lane]) * scale;
          const T power = exp_nonpositive(x);
          // Below -87, exp(x) is less than float's smallest normal number. An x that is not at most 0 is NaN and stays.
          values[lane] = x < T(-87) ? T(0) : x <= T(0) ? power : x;
          group[lane] += values[lane];
        }
      }
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] += group[lane];
    }
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sums[lane] = T(1) / sums[lane];
    for (int64_t row = 0; row < rows; ++row) {
      T* __restrict values = s + row * padded + column;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) values[lane] *= sums[lane];
    }
  }
}

// s = p (s - sum(p s)) scale, the softmax's gradient, for each column of s [rows, padded].
template <typename T>
DCVIT_HD void softmax_gradient(const T* p, T* s, int64_t rows, int64_t padded, T scale) {
  for (int64_t column = 0; column < padded; column += kLanes<T>) {
    T means[kLanes<T>] = {};
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t at = row * padded + column;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) means[lane] += p[at + lane] * s[at + lane];
    }
    for (int64_t row = 0; row < rows; ++row) {
      const T* __restrict weights = p + row * padded + column;
      T* __restrict values = s + row * padded + column;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        values[lane] = weights[lane] * (values[lane] - means[lane]) * scale;
      }
    }
  }
}

// The sizes of the tensors.
struct Shape {
  int64_t batch, tokens, heads, size;
  int64_t padded;  // tokens, rounded up to whole vectors

  int64_t width() const { return heads * size; }
};

// `queries` [E, padded] and `p` [N, padded] are work memory; `saved` [N, N] may be null.
template <typename T>
DCVIT_HD void head_forward(const T* qkv, T* out, T* saved, T* queries, T* p, const Shape& shape, T scale) {
  const int64_t n = shape.tokens, size = shape.size, padded = shape.padded, width = shape.width(), row = 3 * width;
  const T *q = qkv, *k = qkv + width, *v = qkv + 2 * width;
  transpose(q, row, queries, n, padded, size);
  multiply(Strided<T>{k, row, 1}, queries, padded, p, padded, n, size, padded);
  softmax(p, n, padded, scale);
  for (int64_t j = 0; saved && j < n; ++j) {
    for (int64_t i = 0; i < n; ++i) saved[j * n + i] = p[j * padded + i];
  }
  multiply(Strided<T>{p, 1, padded}, v, row, out, width, n, n, size);
}

// `grads` [E, padded], `p` and `s` [N, padded] are work memory.
template <typename T>
DCVIT_HD void head_backward(const T* grad, const T* qkv, const T* saved, T* out, T* grads, T* p, T* s,
                            const Shape& shape, T scale) {
  const int64_t n = shape.tokens, size = shape.size, padded = shape.padded, width = shape.width(), row = 3 * width;
  const T *q = qkv, *k = qkv + width, *v = qkv + 2 * width;
  T *grad_q = out, *grad_k = out + width, *grad_v = out + 2 * width;
  transpose(grad, width, grads, n, padded, size);
  multiply(Strided<T>{v, row, 1}, grads, padded, s, padded, n, size, padded);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < n; ++i) p[j * padded + i] = saved[j * n + i];
    for (int64_t i = n; i < padded; ++i) p[j * padded + i] = T(0);
  }
  softmax_gradient(p, s, n, padded, scale);
  multiply(Strided<T>{s, 1, padded}, k, row, grad_q, row, n, n, size);
  multiply(Strided<T>{s, padded, 1}, q, row, grad_k, row, n, n, size);
  multiply(Strided<T>{p, padded, 1}, grad, width, grad_v, row, n, n, size);
}

#define DCVIT_DEFINE(T)                                                                                      \
  DCVIT_CLONES void forward(const T* qkv, T* out, T* saved, T* queries, T* p, const Shape& shape, T scale) { \
    head_forward(qkv, out, saved, queries, p, shape, scale);                                                 \
  }                                                                                                          \
  DCVIT_CLONES void backward(const T* grad, const T* qkv, const T* saved, T* out, T* grads, T* p, T* s,      \
                             const Shape& shape, T scale) {                                                  \
    head_backward(grad, qkv, saved, out, grads, p, s, shape, scale);                                         \
  }
DCVIT_DEFINE(float)
DCVIT_DEFINE(double)
#undef DCVIT_DEFINE

// --- the op ------------------------------------------------------------------------------------------------------

constexpr int64_t kFewHeads = 32;  // the fewest heads of a thread

Shape check(const char* op, const Tensor& qkv) {
  STD_TORCH_CHECK(qkv.dim() == 5 && qkv.size(2) == 3, op, ": expected qkv [B, N, 3, H, E], got ", qkv.dim(),
                  " dimensions and ", qkv.numel(), " numbers");
  STD_TORCH_CHECK(qkv.size(4) > 0 && qkv.size(4) % 16 == 0, op, ": expected E, a multiple of 16, got ", qkv.size(4));
  const int64_t lanes = qkv.scalar_type() == ScalarType::Double ? kLanes<double> : kLanes<float>;
  return {qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4), ceil_div(qkv.size(1), lanes) * lanes};
}

// Calls f(image, head, memory), where `memory` holds `size` numbers of type T and belongs to one thread.
template <typename T, typename F>
void over_heads(const Tensor& like, const Shape& shape, int64_t size, const F& f) {
  const int64_t count = shape.batch * shape.heads;
  const int64_t slots = std::clamp<int64_t>(count / kFewHeads, 1, num_threads()), each = ceil_div(count, slots);
  const Tensor memory = make(like, {slots, size});
  parallel(slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      for (int64_t i = slot * each; i < std::min(count, (slot + 1) * each); ++i) {
        f(i / shape.heads, i % shape.heads, data<T>(memory) + slot * size);
      }
    }
  });
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv_in, bool save) {
  const Shape shape = check("attention", qkv_in);
  const Tensor qkv = dense(qkv_in);
  const int64_t n = shape.tokens, width = shape.width();
  Tensor out = make(qkv, {shape.batch, n, width});
  Tensor probabilities = make(qkv, {save ? shape.batch : 0, shape.heads, n, n});
  dispatch_full("attention", qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T scale = T(1 / std::sqrt(double(shape.size)));
    over_heads<T>(qkv, shape, (shape.size + n) * shape.padded, [&](int64_t image, int64_t head, T* memory) {
      const int64_t at = image * n * width + head * shape.size;
      T* saved = save ? data<T>(probabilities) + (image * shape.heads + head) * n * n : nullptr;
      forward(data<T>(qkv) + at + 2 * image * n * width, data<T>(out) + at, saved, memory,
              memory + shape.size * shape.padded, shape, scale);
    });
  });
  return {out, probabilities};
}

Tensor attention_backward(const Tensor& grad_in, const Tensor& qkv_in, const Tensor& probabilities_in) {
  const char* op = "attention_backward";
  const Shape shape = check(op, qkv_in);
  const int64_t n = shape.tokens, width = shape.width();
  STD_TORCH_CHECK(grad_in.dim() == 3 && grad_in.size(0) == shape.batch && grad_in.size(1) == n &&
                      grad_in.size(2) == width && grad_in.scalar_type() == qkv_in.scalar_type(),
                  op, ": expected grad [", shape.batch, ", ", n, ", ", width, "] in the dtype of qkv, got ",
                  grad_in.numel(), " numbers in ", grad_in.dim(), " dimensions");
  STD_TORCH_CHECK(probabilities_in.dim() == 4 && probabilities_in.numel() == shape.batch * shape.heads * n * n &&
                      probabilities_in.scalar_type() == qkv_in.scalar_type(),
                  op, ": expected probabilities [", shape.batch, ", ", shape.heads, ", ", n, ", ", n,
                  "] in the dtype of qkv, got ", probabilities_in.numel(), " numbers");
  const Tensor grad = dense(grad_in), qkv = dense(qkv_in), probabilities = dense(probabilities_in);
  Tensor out = make(qkv, {shape.batch, n, 3, shape.heads, shape.size});
  dispatch_full(op, qkv.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const T scale = T(1 / std::sqrt(double(shape.size)));
    over_heads<T>(qkv, shape, (shape.size + 2 * n) * shape.padded, [&](int64_t image, int64_t head, T* memory) {
      const int64_t at = image * n * width + head * shape.size, packed = at + 2 * image * n * width;
      const T* saved = data<T>(probabilities) + (image * shape.heads + head) * n * n;
      T* p = memory + shape.size * shape.padded;
      backward(data<T>(grad) + at, data<T>(qkv) + packed, saved, data<T>(out) + packed, memory, p, p + n * shape.padded,
               shape, scale);
    });
  });
  return out;
}

}  // namespace

DCVIT_LIBRARY_IMPL(dcvit, CPU, m) {
  m.impl("attention", DCVIT_KERNEL(&attention));
  m.impl("attention_backward", DCVIT_KERNEL(&attention_backward));
}

}  // namespace dcvit::cpu
