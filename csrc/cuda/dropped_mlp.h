// Launches of the MLP with dropped nodes: what happens between its matrix products, which are the BLAS's. M rows, D
// wide; K kept nodes; E outputs. What is optional may be a view that is not given.
#pragma once

#include "_view.h"

namespace dcvit {

// out = LayerNorm(x) [M, D], with the `known` mean and 1/std of each row [M, 2], or with its own, kept in `stats`.
template <class T>
void launch_normalise(int64_t rows, int64_t width, double eps, View<const T> x, View<const T> weight,
                      View<const T> bias, View<const float> known, View<float> stats, View<T> out, void* stream);

// activation = GELU(pre); both may be the same memory.
template <class T>
void launch_activate(int64_t count, View<const T> pre, View<T> activation, void* stream);

// out = residual + scale * (z + bias); z may be out.
template <class T>
void launch_finish(int64_t rows, int64_t width, View<const T> z, View<const T> bias, View<const T> scale,
                   View<const T> residual, View<T> out, void* stream);

// Rows whose sum is one partial sum of a column.
constexpr int64_t kSummedRows = 128;

// grad *= GELU'(pre), activation = GELU(pre), and partial sums of grad's columns [ceil(M / kSummedRows), K].
template <class T>
void launch_hidden_gradient(int64_t rows, int64_t kept, View<const T> pre, View<T> grad, View<T> activation,
                            View<double> sums, void* stream);

// The gradient of x through LayerNorm from that of LayerNorm's output, plus `residual`; all [M, D].
template <class T>
void launch_norm_gradient(int64_t rows, int64_t width, View<const T> grad, View<const T> x, View<const float> stats,
                          View<const T> norm_weight, View<const T> residual, View<T> gradient, void* stream);

// Partial sums [ceil(rows / kSummedRows), columns] of values, and of values times x as normalised by `stats`.
template <class T>
void launch_column_sums(int64_t rows, int64_t columns, View<const T> values, View<const T> x, View<const float> stats,
                        View<double> plain, View<double> normalised, void* stream);

// out[index[c]] = factor[c] * sum_i partials[i, c] + sum_j row_partials[c, j]
template <class T>
void launch_finish_sums(int64_t columns, View<const double> partials, View<const T> factor,
                        View<const double> row_partials, View<const int64_t> index, View<T> out, void* stream);

// packed[r, c] = factor[r] * from[row_index[r], column_index[c]], of rows that are `stride` apart. The kernel stops the
// device where an index is not in [0, hidden).
template <class T>
void launch_pack(int64_t rows, int64_t columns, int64_t stride, int64_t hidden, View<const int64_t> row_index,
                 View<const int64_t> column_index, View<const T> factor, View<const T> from, View<T> packed,
                 void* stream);

// out[row_index[r], column_index[c]] = factor[r] * packed[r, c], and sums[r], over c, of packed times `other` there.
template <class T>
void launch_unpack(int64_t rows, int64_t columns, int64_t stride, int64_t hidden, View<const int64_t> row_index,
                   View<const int64_t> column_index, View<const T> factor, View<const T> packed, View<const T> other,
                   View<T> out, View<double> sums, void* stream);

}  // namespace dcvit
