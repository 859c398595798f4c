// Launches of the MLP with dropped nodes. M rows, D wide; K kept nodes; E outputs.
#pragma once

#include "_view.h"

namespace dcvit {

// A matrix [rows, columns] that a product reads, with all that happens to it on the way to shared memory.
template <class T>
struct Operand {
  View<const T> data;
  int64_t rows, columns;            // as the product sees it
  int64_t stride;                   // from row to row of `data`
  View<const int64_t> row_index{};  // which row of `data` stands there
  View<const int64_t> column_index{};
  View<const float> stats{};  // LayerNorm: mean and 1/std of each row, and its weight and bias
  View<const T> norm_weight{}, norm_bias{};
  View<const T> column_scale{};
  bool wide = false;  // set by the launch: rows can be read in vectors
};

// What becomes of a product [m, n]; which of it is used is said at each launch.
template <class T>
struct Result {
  View<T> out{}, activation{};
  int64_t stride = 0;               // from row to row of `out`
  View<const int64_t> row_index{};  // where the row stands in `out`
  View<const int64_t> column_index{};
  View<const T> bias{}, scale{}, other{};
  View<double> partials{};  // [m, product_columns]
  bool pairs = false;       // set by the launch: two columns can be moved at once
};

// act = GELU(u) and, if `out` is given, out = u, for u = LayerNorm(a) b^T + bias[column_index].
template <class T>
void launch_hidden(Operand<T> a, Operand<T> b, Result<T> result, void* stream);

// out = other + scale * (a b^T + bias); scale by column.
template <class T>
void launch_output(Operand<T> a, Operand<T> b, Result<T> result, void* stream);

// out = (scale * a) b * GELU'(other); scale by column of a.
template <class T>
void launch_hidden_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream);

// out = a b + other.
template <class T>
void launch_input_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream);

// out[row_index] = a^T LayerNorm(b).
template <class T>
void launch_first_weight_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream);

// g = a^T GELU(b): out[:, column_index] = scale * g if `out` is given, scale by row; and if `partials` is given, parts
// of the sums over each row of g * other[:, column_index].
template <class T>
void launch_second_weight_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream);

// Columns of the partial sums that the product above leaves for n columns.
template <class T>
int64_t product_columns(int64_t n);

// Mean and 1/std of each row of x [M, D], into stats [M, 2].
template <class T>
void launch_row_stats(int64_t rows, int64_t width, double eps, View<const T> x, View<float> stats, void* stream);

// The gradient of x through LayerNorm from that of LayerNorm's output, plus `residual` if it is given; all [M, D].
template <class T>
void launch_norm_gradient(int64_t rows, int64_t width, View<const T> grad, View<const T> x, View<const float> stats,
                          View<const T> norm_weight, View<const T> residual, View<T> gradient, void* stream);

// Rows whose sum is one partial sum of a column.
constexpr int64_t kSummedRows = 256;

// Partial sums [ceil(rows / kSummedRows), columns] of values, times x normalised by `stats` if that is given.
template <class T>
void launch_column_sums(int64_t rows, int64_t columns, View<const T> values, View<const T> x, View<const float> stats,
                        View<double> partials, void* stream);

// out[index[c]] = factor[c] * sum_i partials[i, c] + sum_j row_partials[c, j]
template <class T>
void launch_finish_sums(int64_t columns, View<const double> partials, View<const T> factor,
                        View<const double> row_partials, View<const int64_t> index, View<T> out, void* stream);

}  // namespace dcvit
