// Launches of the MLP with dropped hidden units: the steps between its matrix products, which the BLAS computes. There
// are M rows of width D, K kept hidden units and E outputs. Optional arguments may be empty views.
#pragma once

#include "_view.h"

namespace dcvit {

// out = LayerNorm(x) [M, D]. The mean and 1/std of each row [M, 2] are `known`, or are computed and saved in `stats`.
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

// The number of rows in one partial sum of a column.
constexpr int64_t kSummedRows = 128;

// grad *= GELU'(pre), activation = GELU(pre), and partial sums of grad's columns [ceil(M / kSummedRows), K].
template <class T>
void launch_hidden_gradient(int64_t rows, int64_t kept, View<const T> pre, View<T> grad, View<T> activation,
                            View<double> sums, void* stream);

// gradient = the gradient of LayerNorm's input x for the gradient `grad` of its output, plus `residual`; all [M, D].
template <class T>
void launch_norm_gradient(int64_t rows, int64_t width, View<const T> grad, View<const T> x, View<const float> stats,
                          View<const T> norm_weight, View<const T> residual, View<T> gradient, void* stream);

// Partial sums [ceil(rows / kSummedRows), columns]: `plain` of values, `normalised` of values times x normalised by
// `stats`.
template <class T>
void launch_column_sums(int64_t rows, int64_t columns, View<const T> values, View<const T> x, View<const float> stats,
                        View<double> plain, View<double> normalised, void* stream);

// out[index[c]] = factor[c] * sum_i partials[i, c] + sum_j row_partials[c, j]
template <class T>
void launch_finish_sums(int64_t columns, View<const double> partials, View<const T> factor,
                        View<const double> row_partials, View<const int64_t> index, View<T> out, void* stream);

// packed[r, c] = factor[r] * from[row_index[r], column_index[c]], where rows of `from` are `stride` apart. The kernel
// stops the device if an index is not in [0, hidden).
template <class T>
void launch_pack(int64_t rows, int64_t columns, int64_t stride, int64_t hidden, View<const int64_t> row_index,
                 View<const int64_t> column_index, View<const T> factor, View<const T> from, View<T> packed,
                 void* stream);

// With i = row_index[r] and j = column_index[c]: out[i, j] = factor[r] * packed[r, c], and
// sums[r] = sum_c packed[r, c] * other[i, j].
template <class T>
void launch_unpack(int64_t rows, int64_t columns, int64_t stride, int64_t hidden, View<const int64_t> row_index,
                   View<const int64_t> column_index, View<const T> factor, View<const T> packed, View<const T> other,
                   View<T> out, View<double> sums, void* stream);

}  // namespace dcvit
