#include <cmath>

#include "_device.h"
#include "dropped_mlp.h"

namespace dcvit {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// The exact GELU of a pre-activation and its slope. erff is fast enough on a GPU.
struct Gelu {
  float value, slope;
};

DCVIT_D float normal_cdf(float u) { return 0.5f * (1.0f + erff(u * 0.70710678118654752440f)); }

DCVIT_D float gelu(float u) { return u * normal_cdf(u); }

DCVIT_D Gelu gelu_with_slope(float u) {
  const float cdf = normal_cdf(u);
  return {u * cdf, cdf + u * (0.39894228040143267794f * expf(-0.5f * u * u))};
}

// --- elements --------------------------------------------------------------------------------------------------------

template <class T>
__global__ __launch_bounds__(kThreads) void activate_kernel(int64_t count, bool wide, View<const T> pre,
                                                            View<T> activation) {
  constexpr int W = kWide<T>;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * W;
  if (i >= count) return;
  Vec<T, W> values = load_upto<W>(pre, i, count, wide);
#pragma unroll
  for (int j = 0; j < W; ++j) values[j] = static_cast<T>(gelu(static_cast<float>(values[j])));
  store_upto(activation, i, count, wide, values);
}

// --- rows ------------------------------------------------------------------------------------------------------------
//
// Each warp processes one row.

DCVIT_D int64_t own_row() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

struct Stats {
  float mean, rstd;
};

template <class T>
DCVIT_D Stats stats_of(View<const T> x, int64_t base, int64_t width, double eps, bool wide) {
  constexpr int W = kWide<T>;
  const int64_t end = base + width;
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  for (int64_t i = base + lane * W; i < end; i += kWarp * W) {
    const Vec<T, W> values = load_upto<W>(x, i, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) sum += static_cast<float>(values[j]);
  }
  const float mean = static_cast<float>(warp_sum(sum) / static_cast<double>(width));
  float squares = 0;  // of differences to the mean, because the difference of two large sums would lose digits
  for (int64_t i = base + lane * W; i < end; i += kWarp * W) {
    const Vec<T, W> values = load_upto<W>(x, i, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float centred = i + j < end ? static_cast<float>(values[j]) - mean : 0.0f;
      squares += centred * centred;
    }
  }
  const double variance = warp_sum(squares) / static_cast<double>(width);
  return {mean, static_cast<float>(1.0 / sqrt(variance + eps))};
}

template <class T>
__global__ __launch_bounds__(kThreads) void normalise_kernel(int64_t rows, int64_t width, double eps, bool wide,
                                                             View<const T> x, View<const T> weight, View<const T> bias,
                                                             View<const float> known, View<float> stats, View<T> out) {
  constexpr int W = kWide<T>;
  const int64_t row = own_row();
  if (row >= rows) return;
  const int64_t base = row * width, end = base + width;
  const int lane = threadIdx.x % kWarp;
  const Stats s =
      known.given() ? Stats{load(known, 2 * row), load(known, 2 * row + 1)} : stats_of(x, base, width, eps, wide);
  if (stats.given() && lane == 0) {
    store(stats, 2 * row, s.mean);
    store(stats, 2 * row + 1, s.rstd);
  }
  for (int64_t c = lane * W; c < width; c += kWarp * W) {
    Vec<T, W> values = load_upto<W>(x, base + c, end, wide);
    const Vec<T, W> factor = load_upto<W>(weight, c, width, wide);
    Vec<T, W> shift;
    if (bias.given()) shift = load_upto<W>(bias, c, width, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float normal = (static_cast<float>(values[j]) - s.mean) * s.rstd * static_cast<float>(factor[j]);
      values[j] = static_cast<T>(bias.given() ? normal + static_cast<float>(shift[j]) : normal);
    }
    store_upto(out, base + c, end, wide, values);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void finish_kernel(int64_t rows, int64_t width, bool wide, View<const T> z,
                                                          View<const T> bias, View<const T> scale,
                                                          View<const T> residual, View<T> out) {
  constexpr int W = kWide<T>;
  const int64_t row = own_row();
  if (row >= rows) return;
  const int64_t base = row * width, end = base + width;
  for (int64_t c = threadIdx.x % kWarp * W; c < width; c += kWarp * W) {
    Vec<T, W> values = load_upto<W>(z, base + c, end, wide), shift, factor, past;
    if (bias.given()) shift = load_upto<W>(bias, c, width, wide);
    if (scale.given()) factor = load_upto<W>(scale, c, width, wide);
    if (residual.given()) past = load_upto<W>(residual, base + c, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      float value = static_cast<float>(values[j]);
      if (bias.given()) value += static_cast<float>(shift[j]);
      if (scale.given()) value *= static_cast<float>(factor[j]);
      if (residual.given()) value += static_cast<float>(past[j]);
      values[j] = static_cast<T>(value);
    }
    store_upto(out, base + c, end, wide, values);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void norm_gradient_kernel(int64_t rows, int64_t width, bool wide,
                                                                 View<const T> grad, View<const T> x,
                                                                 View<const float> stats, View<const T> norm_weight,
                                                                 View<const T> residual, View<T> gradient) {
  constexpr int W = kWide<T>;
  const int64_t row = own_row();
  if (row >= rows) return;
  const int64_t base = row * width, end = base + width;
  const int lane = threadIdx.x % kWarp;
  const float mean = load(stats, 2 * row), rstd = load(stats, 2 * row + 1);
  float sum = 0, product = 0;
  for (int64_t c = lane * W; c < width; c += kWarp * W) {
    const Vec<T, W> g = load_upto<W>(grad, base + c, end, wide), values = load_upto<W>(x, base + c, end, wide);
    const Vec<T, W> weight = load_upto<W>(norm_weight, c, width, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float slope = static_cast<float>(g[j]) * static_cast<float>(weight[j]);
      sum += slope;
      product += slope * ((static_cast<float>(values[j]) - mean) * rstd);
    }
  }
  const float sum_mean = static_cast<float>(warp_sum(sum) / static_cast<double>(width));
  const float product_mean = static_cast<float>(warp_sum(product) / static_cast<double>(width));
  for (int64_t c = lane * W; c < width; c += kWarp * W) {
    const Vec<T, W> g = load_upto<W>(grad, base + c, end, wide), values = load_upto<W>(x, base + c, end, wide);
    const Vec<T, W> weight = load_upto<W>(norm_weight, c, width, wide);
    Vec<T, W> result, past;
    if (residual.given()) past = load_upto<W>(residual, base + c, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float slope = static_cast<float>(g[j]) * static_cast<float>(weight[j]);
      const float normal = (static_cast<float>(values[j]) - mean) * rstd;
      const float value = rstd * (slope - sum_mean - normal * product_mean);
      result[j] = static_cast<T>(residual.given() ? value + static_cast<float>(past[j]) : value);
    }
    store_upto(gradient, base + c, end, wide, result);
  }
}

// --- kept hidden units -----------------------------------------------------------------------------------------------
//
// Each warp processes one row of the packed matrix [rows, columns]. The rows of the full matrix are `stride` apart.

// The position of the i-th kept row or column, of `count` rows or columns.
DCVIT_D int64_t at(View<const int64_t> index, int64_t i, int64_t count) {
  if (!index.given()) return i;
  const int64_t place = load(index, i);
  DCVIT_DEVICE_ASSERT(place >= 0 && place < count);
  return place;
}

template <class T>
__global__ __launch_bounds__(kThreads) void pack_kernel(int64_t rows, int64_t columns, int64_t stride, int64_t hidden,
                                                        View<const int64_t> row_index, View<const int64_t> column_index,
                                                        View<const T> factor, View<const T> from, View<T> packed) {
  const int64_t row = own_row();
  if (row >= rows) return;
  const int64_t start = at(row_index, row, hidden) * stride;
  const float times = factor.given() ? static_cast<float>(load(factor, row)) : 1.0f;
  for (int64_t c = threadIdx.x % kWarp; c < columns; c += kWarp)
    store(packed, row * columns + c,
          static_cast<T>(times * static_cast<float>(load(from, start + at(column_index, c, hidden)))));
}

template <class T>
__global__ __launch_bounds__(kThreads) void unpack_kernel(int64_t rows, int64_t columns, int64_t stride, int64_t hidden,
                                                          View<const int64_t> row_index,
                                                          View<const int64_t> column_index, View<const T> factor,
                                                          View<const T> packed, View<const T> other, View<T> out,
                                                          View<double> sums) {
  const int64_t row = own_row();
  if (row >= rows) return;
  const int64_t start = at(row_index, row, hidden) * stride;
  const float times = factor.given() ? static_cast<float>(load(factor, row)) : 1.0f;
  double sum = 0;
  for (int64_t c = threadIdx.x % kWarp; c < columns; c += kWarp) {
    const int64_t place = start + at(column_index, c, hidden);
    const float value = static_cast<float>(load(packed, row * columns + c));
    if (sums.given()) sum += static_cast<double>(value) * static_cast<float>(load(other, place));
    if (out.given()) store(out, place, static_cast<T>(times * value));
  }
  if (!sums.given()) return;
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) store(sums, row, sum);
}

// --- columns ---------------------------------------------------------------------------------------------------------
//
// The warps of a block share kSummedRows rows. The block has as many columns as the vectors of one warp hold.

template <class T>
struct ColumnTile {
  static constexpr int W = kWide<T>, kOwn = kWarp * W;  // columns of a block
  int64_t rows, columns, chunk, first, column, last;

  DCVIT_D ColumnTile(int64_t rows, int64_t columns) : rows(rows), columns(columns) {
    const int64_t tiles = (columns + kOwn - 1) / kOwn;
    chunk = blockIdx.x / tiles;
    first = blockIdx.x % tiles * kOwn;
    column = first + threadIdx.x % kWarp * W;
    last = (chunk + 1) * kSummedRows < rows ? (chunk + 1) * kSummedRows : rows;
  }

  // Calls visit(row, first element, end of the row) for each row that belongs to the warp.
  template <class Visit>
  DCVIT_D void each_row(const Visit& visit) const {
    if (column >= columns) return;
    for (int64_t row = chunk * kSummedRows + threadIdx.x / kWarp; row < last; row += kWarps)
      visit(row, row * columns + column, (row + 1) * columns);
  }

  // Adds up the warps' sums of the columns.
  DCVIT_D void gather(View<float> shared, const float (&own)[W], View<double> partials) const {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int j = 0; j < W; ++j) store(shared, warp * kOwn + j * kWarp + lane, own[j]);  // avoids bank conflicts
    __syncthreads();
    for (int c = threadIdx.x; c < kOwn && first + c < columns; c += kThreads) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += load(shared, w * kOwn + c % W * kWarp + c / W);
      store(partials, chunk * columns + first + c, total);
    }
    __syncthreads();  // the memory is used again afterwards
  }
};

template <class T>
__global__ __launch_bounds__(kThreads) void column_sums_kernel(int64_t rows, int64_t columns, bool wide,
                                                               View<const T> values, View<const T> x,
                                                               View<const float> stats, View<double> plain,
                                                               View<double> normalised) {
  constexpr int W = kWide<T>;
  DCVIT_SHARED(float, shared, kWarps* ColumnTile<T>::kOwn);
  const ColumnTile<T> tile(rows, columns);
  float own[W] = {}, products[W] = {};
  tile.each_row([&](int64_t row, int64_t i, int64_t end) {
    const Vec<T, W> terms = load_upto<W>(values, i, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) own[j] += static_cast<float>(terms[j]);
    if (!normalised.given()) return;
    const float mean = load(stats, 2 * row), rstd = load(stats, 2 * row + 1);
    const Vec<T, W> numbers = load_upto<W>(x, i, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j)
      products[j] += static_cast<float>(terms[j]) * ((static_cast<float>(numbers[j]) - mean) * rstd);
  });
  if (plain.given()) tile.gather(shared, own, plain);
  if (normalised.given()) tile.gather(shared, products, normalised);
}

template <class T>
__global__ __launch_bounds__(kThreads) void hidden_gradient_kernel(int64_t rows, int64_t columns, bool wide,
                                                                   View<const T> pre, View<T> grad, View<T> activation,
                                                                   View<double> sums) {
  constexpr int W = kWide<T>;
  DCVIT_SHARED(float, shared, kWarps* ColumnTile<T>::kOwn);
  const ColumnTile<T> tile(rows, columns);
  float own[W] = {};
  tile.each_row([&](int64_t, int64_t i, int64_t end) {
    Vec<T, W> values = load_upto<W>(pre, i, end, wide), slopes = load_upto<W>(grad, i, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const Gelu node = gelu_with_slope(static_cast<float>(values[j]));
      slopes[j] = static_cast<T>(static_cast<float>(slopes[j]) * node.slope);
      values[j] = static_cast<T>(node.value);
      own[j] += static_cast<float>(slopes[j]);
    }
    store_upto(grad, i, end, wide, slopes);
    if (activation.given()) store_upto(activation, i, end, wide, values);
  });
  if (sums.given()) tile.gather(shared, own, sums);
}

template <class T>
__global__ __launch_bounds__(kThreads) void finish_sums_kernel(int64_t columns, View<const double> partials,
                                                               View<const T> factor, View<const double> row_partials,
                                                               View<const int64_t> index, View<T> out) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = 0;
  for (int64_t i = column; i < partials.size; i += columns) sum += load(partials, i);
  if (factor.given()) sum *= static_cast<float>(load(factor, column));
  const int64_t parts = row_partials.size / columns;
  for (int64_t i = 0; i < parts; ++i) sum += load(row_partials, column * parts + i);
  store(out, index.given() ? load(index, column) : column, static_cast<T>(static_cast<float>(sum)));
}

int64_t blocks_of_rows(int64_t rows) { return ceil_div(rows, kWarps); }

template <class T>
int64_t strips(int64_t rows, int64_t columns) {
  return ceil_div(rows, kSummedRows) * ceil_div(columns, ColumnTile<T>::kOwn);
}

// Whether contiguous rows of this width can be moved in vectors, in all these views.
template <class T, class... Views>
bool wide_rows(int64_t width, Views... views) {
  return width % kWide<T> == 0 && (aligned(views) && ...);
}

}  // namespace

// --- launches --------------------------------------------------------------------------------------------------------

template <class T>
void launch_normalise(int64_t rows, int64_t width, double eps, View<const T> x, View<const T> weight,
                      View<const T> bias, View<const float> known, View<float> stats, View<T> out, void* stream) {
  if (rows == 0) return;
  launch("normalise_kernel", normalise_kernel<T>, blocks_of_rows(rows), kThreads, stream, rows, width, eps,
         wide_rows<T>(width, x, weight, bias, out), x, weight, bias, known, stats, out);
}

template <class T>
void launch_activate(int64_t count, View<const T> pre, View<T> activation, void* stream) {
  if (count == 0) return;
  launch("activate_kernel", activate_kernel<T>, ceil_div(count, kThreads * kWide<T>), kThreads, stream, count,
         aligned(pre) && aligned(activation), pre, activation);
}

template <class T>
void launch_finish(int64_t rows, int64_t width, View<const T> z, View<const T> bias, View<const T> scale,
                   View<const T> residual, View<T> out, void* stream) {
  if (rows == 0) return;
  launch("finish_kernel", finish_kernel<T>, blocks_of_rows(rows), kThreads, stream, rows, width,
         wide_rows<T>(width, z, bias, scale, residual, out), z, bias, scale, residual, out);
}

template <class T>
void launch_hidden_gradient(int64_t rows, int64_t kept, View<const T> pre, View<T> grad, View<T> activation,
                            View<double> sums, void* stream) {
  if (rows == 0 || kept == 0) return;
  launch("hidden_gradient_kernel", hidden_gradient_kernel<T>, strips<T>(rows, kept), kThreads, stream, rows, kept,
         wide_rows<T>(kept, pre, grad, activation), pre, grad, activation, sums);
}

template <class T>
void launch_norm_gradient(int64_t rows, int64_t width, View<const T> grad, View<const T> x, View<const float> stats,
                          View<const T> norm_weight, View<const T> residual, View<T> gradient, void* stream) {
  if (rows == 0) return;
  launch("norm_gradient_kernel", norm_gradient_kernel<T>, blocks_of_rows(rows), kThreads, stream, rows, width,
         wide_rows<T>(width, grad, x, norm_weight, residual, gradient), grad, x, stats, norm_weight, residual,
         gradient);
}

template <class T>
void launch_column_sums(int64_t rows, int64_t columns, View<const T> values, View<const T> x, View<const float> stats,
                        View<double> plain, View<double> normalised, void* stream) {
  if (rows == 0 || columns == 0) return;
  launch("column_sums_kernel", column_sums_kernel<T>, strips<T>(rows, columns), kThreads, stream, rows, columns,
         wide_rows<T>(columns, values, x), values, x, stats, plain, normalised);
}

template <class T>
void launch_finish_sums(int64_t columns, View<const double> partials, View<const T> factor,
                        View<const double> row_partials, View<const int64_t> index, View<T> out, void* stream) {
  if (columns == 0) return;
  launch("finish_sums_kernel", finish_sums_kernel<T>, ceil_div(columns, kThreads), kThreads, stream, columns, partials,
         factor, row_partials, index, out);
}

template <class T>
void launch_pack(int64_t rows, int64_t columns, int64_t stride, int64_t hidden, View<const int64_t> row_index,
                 View<const int64_t> column_index, View<const T> factor, View<const T> from, View<T> packed,
                 void* stream) {
  if (rows == 0 || columns == 0) return;
  launch("pack_kernel", pack_kernel<T>, blocks_of_rows(rows), kThreads, stream, rows, columns, stride, hidden,
         row_index, column_index, factor, from, packed);
}

template <class T>
void launch_unpack(int64_t rows, int64_t columns, int64_t stride, int64_t hidden, View<const int64_t> row_index,
                   View<const int64_t> column_index, View<const T> factor, View<const T> packed, View<const T> other,
                   View<T> out, View<double> sums, void* stream) {
  if (rows == 0) return;
  launch("unpack_kernel", unpack_kernel<T>, blocks_of_rows(rows), kThreads, stream, rows, columns, stride, hidden,
         row_index, column_index, factor, packed, other, out, sums);
}

#define DCVIT_INSTANTIATE(T)                                                                                           \
  template void launch_normalise(int64_t, int64_t, double, View<const T>, View<const T>, View<const T>,                \
                                 View<const float>, View<float>, View<T>, void*);                                      \
  template void launch_activate(int64_t, View<const T>, View<T>, void*);                                               \
  template void launch_finish(int64_t, int64_t, View<const T>, View<const T>, View<const T>, View<const T>, View<T>,   \
                              void*);                                                                                  \
  template void launch_hidden_gradient(int64_t, int64_t, View<const T>, View<T>, View<T>, View<double>, void*);        \
  template void launch_norm_gradient(int64_t, int64_t, View<const T>, View<const T>, View<const float>, View<const T>, \
                                     View<const T>, View<T>, void*);                                                   \
  template void launch_column_sums(int64_t, int64_t, View<const T>, View<const T>, View<const float>, View<double>,    \
                                   View<double>, void*);                                                               \
  template void launch_finish_sums(int64_t, View<const double>, View<const T>, View<const double>,                     \
                                   View<const int64_t>, View<T>, void*);                                               \
  template void launch_pack(int64_t, int64_t, int64_t, int64_t, View<const int64_t>, View<const int64_t>,              \
                            View<const T>, View<const T>, View<T>, void*);                                             \
  template void launch_unpack(int64_t, int64_t, int64_t, int64_t, View<const int64_t>, View<const int64_t>,            \
                              View<const T>, View<const T>, View<const T>, View<T>, View<double>, void*);
DCVIT_INSTANTIATE(float)
DCVIT_INSTANTIATE(Half)
DCVIT_INSTANTIATE(BFloat16)

}  // namespace dcvit
