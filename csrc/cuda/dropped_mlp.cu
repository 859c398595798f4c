#include "../gelu.h"
#include "_device.h"
#include "_mma.h"
#include "dropped_mlp.h"

namespace dcvit {
namespace {

constexpr int kThreads = 256;

// --- products --------------------------------------------------------------------------------------------------------
//
// A block makes a tile of the product from tiles of both operands. While it multiplies a pair of tiles that lies in
// shared memory, the next pair is on its way into registers. An operand lies in memory with the index that is summed
// over either along its rows (kInner) or across them (kOuter).

enum class Along { kInner, kOuter };
enum class Transform { kNone, kNorm, kScale, kGelu };
enum class Finish { kHidden, kOutput, kHiddenGradient, kInputGradient, kFirstWeight, kSecondWeight };

// Half precision: tensor cores. Eight warps, each with a tile of 64 x 32 out of 128 x 128.
template <class T>
struct Tile {
  static constexpr int kRows = 128, kColumns = 128, kDepth = 32;
  static constexpr int kOwnRows = 8, kOwnColumns = 8;  // of a thread
  static constexpr int kRowLanes = 4, kRowParts = 4;   // lanes, and then warps, that share a row
  // The padding of 16 bytes puts the eight rows that ldmatrix reads into different banks.
  DCVIT_HD static constexpr int stride(Along along, int extent) {
    return (along == Along::kInner ? kDepth : extent) + 8;
  }
  DCVIT_HD static constexpr int size(Along along, int extent) {
    return stride(along, extent) * (along == Along::kInner ? extent : kDepth);
  }

  float sums[kOwnRows / 2][kOwnColumns / 2][4];

  DCVIT_D static int row(int i) { return threadIdx.x / 128 * 64 + i / 2 * 16 + i % 2 * 8 + threadIdx.x % 32 / 4; }
  DCVIT_D static int column(int j) { return threadIdx.x / 32 % 4 * 32 + j / 2 * 8 + threadIdx.x % 4 * 2 + j % 2; }
  DCVIT_D static int row_part() { return threadIdx.x / 32 % 4; }
  DCVIT_D float sum(int i, int j) const { return sums[i / 2][j / 2][i % 2 * 2 + j % 2]; }

  template <Along kAlong>
  DCVIT_D static void put(View<T> shared, int extent, int outer, int depth, const Vec<T, kWide<T>>& values) {
    store_vec(shared,
              kAlong == Along::kInner ? outer * stride(kAlong, extent) + depth : depth * stride(kAlong, extent) + outer,
              values);
  }

  // 16 of the outer index times 16 of the depth.
  template <Along kAlong>
  DCVIT_D static Fragments get(View<T> shared, int extent, int outer, int depth) {
    if constexpr (kAlong == Along::kInner)
      return load_matrices<false>(shared, outer * stride(kAlong, extent) + depth);
    else
      return load_matrices<true>(shared, depth * stride(kAlong, extent) + outer);
  }

  template <Along kA, Along kB>
  DCVIT_D void multiply(View<T> a, View<T> b) {
    const int lane = threadIdx.x % 32, in_matrix = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
    const int first_row = threadIdx.x / 128 * 64, first_column = threadIdx.x / 32 % 4 * 32;
#pragma unroll
    for (int depth = 0; depth < kDepth; depth += 16) {
      // The matrices' order is that of the instruction's registers: rows first for a, depth first for b. Where the
      // depth is across the rows of the tile, a lane names a row of it by depth.
      Fragments left[4], right[2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        left[i] = kA == Along::kInner ? get<kA>(a, kRows, first_row + 16 * i + in_matrix + low, depth + high)
                                      : get<kA>(a, kRows, first_row + 16 * i + low, depth + in_matrix + high);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        right[j] = kB == Along::kInner ? get<kB>(b, kColumns, first_column + 16 * j + in_matrix + high, depth + low)
                                       : get<kB>(b, kColumns, first_column + 16 * j + high, depth + in_matrix + low);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          multiply_add<T>(sums[i][j], left[i], right[j / 2].r[j % 2 * 2], right[j / 2].r[j % 2 * 2 + 1]);
    }
  }
};

// Single precision: 16 x 16 threads with 8 x 4 sums each. Each pair of tiles is summed for itself first, which keeps
// rounding errors at sqrt(kDepth + K / kDepth) instead of sqrt(K).
template <>
struct Tile<float> {
  static constexpr int kRows = 128, kColumns = 64, kDepth = 16;
  static constexpr int kOwnRows = 8, kOwnColumns = 4;
  static constexpr int kRowLanes = 16, kRowParts = 1;
  DCVIT_HD static constexpr int stride(Along, int extent) { return extent + 4; }
  DCVIT_HD static constexpr int size(Along along, int extent) { return stride(along, extent) * kDepth; }

  float sums[kOwnRows][kOwnColumns];

  DCVIT_D static int row(int i) { return i / 4 * 64 + threadIdx.x / 16 * 4 + i % 4; }
  DCVIT_D static int column(int j) { return threadIdx.x % 16 * 4 + j; }
  DCVIT_D static int row_part() { return 0; }
  DCVIT_D float sum(int i, int j) const { return sums[i][j]; }

  template <Along kAlong>
  DCVIT_D static void put(View<float> shared, int extent, int outer, int depth, const Vec<float, 4>& values) {
    if constexpr (kAlong == Along::kOuter) {
      store_vec(shared, depth * stride(kAlong, extent) + outer, values);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) store(shared, (depth + j) * stride(kAlong, extent) + outer, values[j]);
    }
  }

  template <Along kA, Along kB>
  DCVIT_D void multiply(View<float> a, View<float> b) {
    float parts[kOwnRows][kOwnColumns] = {};
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      const int in_a = depth * stride(kA, kRows), in_b = depth * stride(kB, kColumns);
      const Vec<float, 4> upper = load_vec<4>(a, in_a + row(0)), lower = load_vec<4>(a, in_a + row(4));
      const Vec<float, 4> right = load_vec<4>(b, in_b + column(0));
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
        for (int j = 0; j < kOwnColumns; ++j) parts[i][j] += (i < 4 ? upper[i % 4] : lower[i % 4]) * right[j];
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i)
#pragma unroll
      for (int j = 0; j < kOwnColumns; ++j) sums[i][j] += parts[i][j];
  }
};

// A vector of a row of the operand; zeros behind its end.
template <class T, Transform kTransform>
DCVIT_D Vec<T, kWide<T>> load_operand(const Operand<T>& operand, int64_t row, int64_t column) {
  constexpr int W = kWide<T>;
  Vec<T, W> values;
  if (row >= operand.rows || column >= operand.columns) {
#pragma unroll
    for (int j = 0; j < W; ++j) values[j] = T(0.0f);
    return values;
  }
  const int64_t start = (operand.row_index.given() ? load(operand.row_index, row) : row) * operand.stride;
  if (operand.column_index.given()) {
#pragma unroll
    for (int j = 0; j < W; ++j)
      values[j] =
          column + j < operand.columns ? load(operand.data, start + load(operand.column_index, column + j)) : T(0.0f);
  } else {
    values = load_upto<W>(operand.data, start + column, start + operand.columns, operand.wide);
  }
  if constexpr (kTransform == Transform::kNorm) {
    if (!operand.stats.given()) return values;
    const float mean = load(operand.stats, 2 * row), rstd = load(operand.stats, 2 * row + 1);
    const Vec<T, W> weight = load_upto<W>(operand.norm_weight, column, operand.columns, operand.wide);
    Vec<T, W> bias;
    if (operand.norm_bias.given()) bias = load_upto<W>(operand.norm_bias, column, operand.columns, operand.wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float normal = (static_cast<float>(values[j]) - mean) * rstd * static_cast<float>(weight[j]);
      const float value = operand.norm_bias.given() ? normal + static_cast<float>(bias[j]) : normal;
      values[j] = column + j < operand.columns ? static_cast<T>(value) : T(0.0f);
    }
  } else if constexpr (kTransform == Transform::kScale) {
    if (!operand.column_scale.given()) return values;
    const Vec<T, W> scale = load_upto<W>(operand.column_scale, column, operand.columns, operand.wide);
#pragma unroll
    for (int j = 0; j < W; ++j)
      values[j] = static_cast<T>(static_cast<float>(values[j]) * static_cast<float>(scale[j]));
  } else if constexpr (kTransform == Transform::kGelu) {
#pragma unroll
    for (int j = 0; j < W; ++j) values[j] = static_cast<T>(gelu(static_cast<float>(values[j])));
  }
  return values;
}

// A thread's part of the way of an operand's tiles.
template <class T, Along kAlong, Transform kTransform, int kExtent>
struct Carrier {
  static constexpr int W = kWide<T>, kDepth = Tile<T>::kDepth;
  static constexpr int kInRow = (kAlong == Along::kInner ? kDepth : kExtent) / W;  // vectors
  static constexpr int kCount = kExtent * kDepth / W / kThreads;
  Vec<T, W> values[kCount];

  DCVIT_D void fetch(const Operand<T>& operand, int64_t outer, int64_t depth) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int item = v * kThreads + threadIdx.x, row = item / kInRow, column = item % kInRow * W;
      values[v] = kAlong == Along::kInner ? load_operand<T, kTransform>(operand, outer + row, depth + column)
                                          : load_operand<T, kTransform>(operand, depth + row, outer + column);
    }
  }

  DCVIT_D void put(View<T> shared) const {
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int item = v * kThreads + threadIdx.x, row = item / kInRow, column = item % kInRow * W;
      if constexpr (kAlong == Along::kInner)
        Tile<T>::template put<kAlong>(shared, kExtent, row, column, values[v]);
      else
        Tile<T>::template put<kAlong>(shared, kExtent, column, row, values[v]);
    }
  }
};

template <class T>
DCVIT_D float at(View<const T> view, int64_t i) {
  return static_cast<float>(load(view, i));
}

// Two neighbouring columns of a finished row. `partial` gathers what Result::partials wants.
template <class T, Finish kFinish>
DCVIT_D void finish_pair(const Result<T>& result, int64_t row, int64_t column, int64_t columns, float first,
                         float second, float& partial) {
  float value[2] = {first, second};
  const int count = column + 1 < columns ? 2 : 1;
  const int64_t start = (result.row_index.given() ? load(result.row_index, row) : row) * result.stride;
  const int64_t i = start + column, end = start + columns;
  if constexpr (kFinish == Finish::kSecondWeight) {
    for (int j = 0; j < count; ++j) {
      const int64_t place = start + (result.column_index.given() ? load(result.column_index, column + j) : column + j);
      if (result.partials.given()) partial += value[j] * at(result.other, place);
      if (!result.out.given()) continue;
      store(result.out, place, static_cast<T>(result.scale.given() ? value[j] * at(result.scale, row) : value[j]));
    }
    return;
  }
  Vec<T, 2> out, activation, other;
  if (result.other.given()) other = load_upto<2>(result.other, i, end, result.pairs);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (j == count) break;
    if constexpr (kFinish == Finish::kHidden) {
      if (result.bias.given())
        value[j] += at(result.bias, result.column_index.given() ? load(result.column_index, column + j) : column + j);
      out[j] = static_cast<T>(value[j]);
      activation[j] = static_cast<T>(gelu(static_cast<float>(out[j])));
      continue;
    } else if constexpr (kFinish == Finish::kOutput) {
      if (result.bias.given()) value[j] += at(result.bias, column + j);
      if (result.scale.given()) value[j] *= at(result.scale, column + j);
      if (result.other.given()) value[j] += static_cast<float>(other[j]);
    } else if constexpr (kFinish == Finish::kHiddenGradient) {
      value[j] *= gelu_with_slope(static_cast<float>(other[j])).slope;
    } else if constexpr (kFinish == Finish::kInputGradient) {
      if (result.other.given()) value[j] += static_cast<float>(other[j]);
    }
    out[j] = static_cast<T>(value[j]);
  }
  if (result.out.given()) store_upto(result.out, i, end, result.pairs, out);
  if constexpr (kFinish == Finish::kHidden) store_upto(result.activation, i, end, result.pairs, activation);
}

template <class T, Along kA, Transform kTransformA, Along kB, Transform kTransformB, Finish kFinish>
__global__ __launch_bounds__(kThreads, 1) void product_kernel(int64_t m, int64_t n, int64_t k, Operand<T> a,
                                                              Operand<T> b, Result<T> result) {
  using Sums = Tile<T>;
  constexpr int kSizeA = Sums::size(kA, Sums::kRows), kSizeB = Sums::size(kB, Sums::kColumns);
  DCVIT_SHARED(T, even_a, kSizeA);
  DCVIT_SHARED(T, even_b, kSizeB);
  DCVIT_SHARED(T, odd_a, kSizeA);
  DCVIT_SHARED(T, odd_b, kSizeB);
  const int64_t tiles = (n + Sums::kColumns - 1) / Sums::kColumns;
  const int64_t first_row = blockIdx.x / tiles * Sums::kRows, first_column = blockIdx.x % tiles * Sums::kColumns;

  Carrier<T, kA, kTransformA, Sums::kRows> carrier_a;
  Carrier<T, kB, kTransformB, Sums::kColumns> carrier_b;
  Sums sums{};
  if (k > 0) {
    carrier_a.fetch(a, first_row, 0);
    carrier_b.fetch(b, first_column, 0);
  }
  bool odd = false;
  for (int64_t depth = 0; depth < k; depth += Sums::kDepth, odd = !odd) {
    const View<T> tile_a = odd ? odd_a : even_a, tile_b = odd ? odd_b : even_b;
    carrier_a.put(tile_a);
    carrier_b.put(tile_b);
    // One barrier per pair of tiles: who comes here has multiplied the pair before, so that the next round may
    // overwrite it.
    __syncthreads();
    if (depth + Sums::kDepth < k) {
      carrier_a.fetch(a, first_row, depth + Sums::kDepth);
      carrier_b.fetch(b, first_column, depth + Sums::kDepth);
    }
    sums.template multiply<kA, kB>(tile_a, tile_b);
  }

#pragma unroll
  for (int i = 0; i < Sums::kOwnRows; ++i) {
    const int64_t row = first_row + Sums::row(i);
    float partial = 0;
#pragma unroll
    for (int j = 0; j < Sums::kOwnColumns; j += 2) {
      const int64_t column = first_column + Sums::column(j);
      if (row < m && column < n)
        finish_pair<T, kFinish>(result, row, column, n, sums.sum(i, j), sums.sum(i, j + 1), partial);
    }
    if constexpr (kFinish == Finish::kSecondWeight) {
      if (!result.partials.given()) continue;
#pragma unroll
      for (int distance = Sums::kRowLanes / 2; distance > 0; distance /= 2)
        partial += __shfl_xor_sync(0xffffffff, partial, distance);
      if (row < m && threadIdx.x % Sums::kRowLanes == 0)
        store(result.partials, row * tiles * Sums::kRowParts + blockIdx.x % tiles * Sums::kRowParts + Sums::row_part(),
              static_cast<double>(partial));
    }
  }
}

template <class T>
void prepare(Operand<T>& operand) {
  operand.wide = operand.stride % kWide<T> == 0 && aligned(operand.data) && aligned(operand.norm_weight) &&
                 aligned(operand.norm_bias) && aligned(operand.column_scale);
}

template <class T, Along kA, Transform kTransformA, Along kB, Transform kTransformB, Finish kFinish>
void launch_product(const char* name, Operand<T> a, Operand<T> b, Result<T> result, void* stream) {
  const int64_t m = kA == Along::kInner ? a.rows : a.columns, k = kA == Along::kInner ? a.columns : a.rows;
  const int64_t n = kB == Along::kInner ? b.rows : b.columns;
  if (m == 0 || n == 0) return;
  prepare(a);
  prepare(b);
  result.pairs = result.stride % 2 == 0 && aligned(result.out) && aligned(result.activation) && aligned(result.other);
  launch(name, product_kernel<T, kA, kTransformA, kB, kTransformB, kFinish>,
         ceil_div(m, Tile<T>::kRows) * ceil_div(n, Tile<T>::kColumns), kThreads, stream, m, n, k, a, b, result);
}

// --- rows ------------------------------------------------------------------------------------------------------------
//
// A warp per row.

template <class T>
__global__ __launch_bounds__(kThreads) void row_stats_kernel(int64_t rows, int64_t width, double eps, bool wide,
                                                             View<const T> x, View<float> stats) {
  constexpr int W = kWide<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int64_t base = row * width, end = base + width;
  const int lane = threadIdx.x % kWarp;
  float sum = 0;
  for (int64_t i = base + lane * W; i < end; i += kWarp * W) {
    const Vec<T, W> values = load_upto<W>(x, i, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) sum += static_cast<float>(values[j]);
  }
  const float mean = static_cast<float>(warp_sum(sum) / static_cast<double>(width));
  float squares = 0;  // about the mean, because the difference of two large sums would lose digits
  for (int64_t i = base + lane * W; i < end; i += kWarp * W) {
    const Vec<T, W> values = load_upto<W>(x, i, end, wide);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const float centred = i + j < end ? static_cast<float>(values[j]) - mean : 0.0f;
      squares += centred * centred;
    }
  }
  const double variance = warp_sum(squares) / static_cast<double>(width);
  if (lane != 0) return;
  store(stats, 2 * row, mean);
  store(stats, 2 * row + 1, static_cast<float>(1.0 / sqrt(variance + eps)));
}

template <class T>
__global__ __launch_bounds__(kThreads) void norm_gradient_kernel(int64_t rows, int64_t width, bool wide,
                                                                 View<const T> grad, View<const T> x,
                                                                 View<const float> stats, View<const T> norm_weight,
                                                                 View<const T> residual, View<T> gradient) {
  constexpr int W = kWide<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
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

// --- columns ---------------------------------------------------------------------------------------------------------
//
// The warps of a block share kSummedRows rows of as many columns as the vectors of a warp hold.

template <class T>
__global__ __launch_bounds__(kThreads) void column_sums_kernel(int64_t rows, int64_t columns, bool wide,
                                                               View<const T> values, View<const T> x,
                                                               View<const float> stats, View<double> partials) {
  constexpr int W = kWide<T>, kWarps = kThreads / kWarp, kOwn = kWarp * W;
  DCVIT_SHARED(float, sums, kWarps* kOwn);
  const int64_t tiles = (columns + kOwn - 1) / kOwn, chunk = blockIdx.x / tiles;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = blockIdx.x % tiles * kOwn, column = first + lane * W;
  const int64_t last = (chunk + 1) * kSummedRows < rows ? (chunk + 1) * kSummedRows : rows;
  float own[W] = {};
  if (column < columns)
    for (int64_t row = chunk * kSummedRows + warp; row < last; row += kWarps) {
      const int64_t i = row * columns + column, end = (row + 1) * columns;
      const Vec<T, W> terms = load_upto<W>(values, i, end, wide);
      if (stats.given()) {
        const float mean = load(stats, 2 * row), rstd = load(stats, 2 * row + 1);
        const Vec<T, W> numbers = load_upto<W>(x, i, end, wide);
#pragma unroll
        for (int j = 0; j < W; ++j)
          own[j] += static_cast<float>(terms[j]) * ((static_cast<float>(numbers[j]) - mean) * rstd);
      } else {
#pragma unroll
        for (int j = 0; j < W; ++j) own[j] += static_cast<float>(terms[j]);
      }
    }
#pragma unroll
  for (int j = 0; j < W; ++j) store(sums, warp * kOwn + j * kWarp + lane, own[j]);  // no two lanes in one bank
  __syncthreads();
  for (int c = threadIdx.x; c < kOwn && first + c < columns; c += kThreads) {
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += load(sums, w * kOwn + c % W * kWarp + c / W);
    store(partials, chunk * columns + first + c, total);
  }
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

}  // namespace

// --- launches --------------------------------------------------------------------------------------------------------

template <class T>
void launch_hidden(Operand<T> a, Operand<T> b, Result<T> result, void* stream) {
  launch_product<T, Along::kInner, Transform::kNorm, Along::kInner, Transform::kNone, Finish::kHidden>(
      "hidden_kernel", a, b, result, stream);
}

template <class T>
void launch_output(Operand<T> a, Operand<T> b, Result<T> result, void* stream) {
  launch_product<T, Along::kInner, Transform::kNone, Along::kInner, Transform::kNone, Finish::kOutput>(
      "output_kernel", a, b, result, stream);
}

template <class T>
void launch_hidden_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream) {
  launch_product<T, Along::kInner, Transform::kScale, Along::kOuter, Transform::kNone, Finish::kHiddenGradient>(
      "hidden_gradient_kernel", a, b, result, stream);
}

template <class T>
void launch_input_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream) {
  launch_product<T, Along::kInner, Transform::kNone, Along::kOuter, Transform::kNone, Finish::kInputGradient>(
      "input_gradient_kernel", a, b, result, stream);
}

template <class T>
void launch_first_weight_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream) {
  launch_product<T, Along::kOuter, Transform::kNone, Along::kOuter, Transform::kNorm, Finish::kFirstWeight>(
      "first_weight_gradient_kernel", a, b, result, stream);
}

template <class T>
void launch_second_weight_gradient(Operand<T> a, Operand<T> b, Result<T> result, void* stream) {
  launch_product<T, Along::kOuter, Transform::kNone, Along::kOuter, Transform::kGelu, Finish::kSecondWeight>(
      "second_weight_gradient_kernel", a, b, result, stream);
}

template <class T>
int64_t product_columns(int64_t n) {
  return ceil_div(n, Tile<T>::kColumns) * Tile<T>::kRowParts;
}

template <class T>
void launch_row_stats(int64_t rows, int64_t width, double eps, View<const T> x, View<float> stats, void* stream) {
  if (rows == 0) return;
  launch("row_stats_kernel", row_stats_kernel<T>, ceil_div(rows, kThreads / kWarp), kThreads, stream, rows, width, eps,
         aligned(x) && width % kWide<T> == 0, x, stats);
}

template <class T>
void launch_norm_gradient(int64_t rows, int64_t width, View<const T> grad, View<const T> x, View<const float> stats,
                          View<const T> norm_weight, View<const T> residual, View<T> gradient, void* stream) {
  if (rows == 0) return;
  const bool wide = width % kWide<T> == 0 && aligned(grad) && aligned(x) && aligned(norm_weight) && aligned(residual) &&
                    aligned(gradient);
  launch("norm_gradient_kernel", norm_gradient_kernel<T>, ceil_div(rows, kThreads / kWarp), kThreads, stream, rows,
         width, wide, grad, x, stats, norm_weight, residual, gradient);
}

template <class T>
void launch_column_sums(int64_t rows, int64_t columns, View<const T> values, View<const T> x, View<const float> stats,
                        View<double> partials, void* stream) {
  if (rows == 0 || columns == 0) return;
  launch("column_sums_kernel", column_sums_kernel<T>, ceil_div(rows, kSummedRows) * ceil_div(columns, kWarp * kWide<T>),
         kThreads, stream, rows, columns, columns % kWide<T> == 0 && aligned(values) && aligned(x), values, x, stats,
         partials);
}

template <class T>
void launch_finish_sums(int64_t columns, View<const double> partials, View<const T> factor,
                        View<const double> row_partials, View<const int64_t> index, View<T> out, void* stream) {
  if (columns == 0) return;
  launch("finish_sums_kernel", finish_sums_kernel<T>, ceil_div(columns, kThreads), kThreads, stream, columns, partials,
         factor, row_partials, index, out);
}

#define DCVIT_INSTANTIATE(T)                                                                                           \
  template void launch_hidden(Operand<T>, Operand<T>, Result<T>, void*);                                               \
  template void launch_output(Operand<T>, Operand<T>, Result<T>, void*);                                               \
  template void launch_hidden_gradient(Operand<T>, Operand<T>, Result<T>, void*);                                      \
  template void launch_input_gradient(Operand<T>, Operand<T>, Result<T>, void*);                                       \
  template void launch_first_weight_gradient(Operand<T>, Operand<T>, Result<T>, void*);                                \
  template void launch_second_weight_gradient(Operand<T>, Operand<T>, Result<T>, void*);                               \
  template int64_t product_columns<T>(int64_t);                                                                        \
  template void launch_row_stats(int64_t, int64_t, double, View<const T>, View<float>, void*);                         \
  template void launch_norm_gradient(int64_t, int64_t, View<const T>, View<const T>, View<const float>, View<const T>, \
                                     View<const T>, View<T>, void*);                                                   \
  template void launch_column_sums(int64_t, int64_t, View<const T>, View<const T>, View<const float>, View<double>,    \
                                   void*);                                                                             \
  template void launch_finish_sums(int64_t, View<const double>, View<const T>, View<const double>,                     \
                                   View<const int64_t>, View<T>, void*);
DCVIT_INSTANTIATE(float)
DCVIT_INSTANTIATE(Half)
DCVIT_INSTANTIATE(BFloat16)

}  // namespace dcvit
