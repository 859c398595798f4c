// The norms of the image prior, in one pass over the images.

#include "stencil.h"

namespace dcvit::cpu {
namespace {

// Sums of squares of a plane's right, down, diagonal and antidiagonal differences, then of its pixels.
using Sums = std::array<double, 5>;

constexpr int kStencilLanes = 16;

// Adds a row's squares. `below` is the next row, or null for the last one. A lane's part of a row is summed in T, and
// rows are added in double.
template <typename T>
DCVIT_HD void add_row(const T* __restrict row, const T* __restrict below, int64_t width,
                      double (*totals)[kStencilLanes]) {
  T sums[5][kStencilLanes] = {};
  int64_t j = 0;
  if (below) {
    for (; j + kStencilLanes < width; j += kStencilLanes) {
      for (int lane = 0; lane < kStencilLanes; ++lane) {
        const T x = row[j + lane], right = row[j + lane + 1], down = below[j + lane], diagonal = below[j + lane + 1];
        sums[0][lane] += (right - x) * (right - x);
        sums[1][lane] += (down - x) * (down - x);
        sums[2][lane] += (diagonal - x) * (diagonal - x);
        sums[3][lane] += (down - right) * (down - right);
        sums[4][lane] += x * x;
      }
    }
  }
  for (int lane = 0; j < width; ++j, lane = (lane + 1) % kStencilLanes) {
    const T x = row[j];
    if (j + 1 < width) sums[0][lane] += (row[j + 1] - x) * (row[j + 1] - x);
    if (below) sums[1][lane] += (below[j] - x) * (below[j] - x);
    if (below && j + 1 < width) {
      sums[2][lane] += (below[j + 1] - x) * (below[j + 1] - x);
      sums[3][lane] += (below[j] - row[j + 1]) * (below[j] - row[j + 1]);
    }
    sums[4][lane] += x * x;
  }
  for (int kind = 0; kind < 5; ++kind) {
    for (int lane = 0; lane < kStencilLanes; ++lane) totals[kind][lane] += double(sums[kind][lane]);
  }
}

template <typename T>
DCVIT_HD void add_plane(const T* plane, int64_t height, int64_t width, Sums& sums) {
  double totals[5][kStencilLanes] = {};
  for (int64_t i = 0; i < height; ++i) {
    const T* row = plane + i * width;
    add_row(row, i + 1 < height ? row + width : nullptr, width, totals);
  }
  for (int kind = 0; kind < 5; ++kind) {
    double sum = 0;
    for (double lane : totals[kind]) sum += lane;
    sums[kind] = sum;
  }
}

DCVIT_CLONES void plane_sums(const float* plane, int64_t height, int64_t width, Sums& sums) {
  add_plane(plane, height, width, sums);
}
DCVIT_CLONES void plane_sums(const double* plane, int64_t height, int64_t width, Sums& sums) {
  add_plane(plane, height, width, sums);
}

// One thread sums each plane, and planes are added in order, so results do not depend on the number of threads.
template <typename T>
Norms measure_all(const T* images, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const int64_t planes = batch * channels, size = height * width;
  std::vector<Sums> sums(planes);
  parallel(planes, ceil_div(16384, std::max<int64_t>(1, size)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) plane_sums(images + p * size, height, width, sums[p]);
  });
  Norms norms;
  norms.images.resize(batch);
  for (int64_t b = 0; b < batch; ++b) {
    double squares = 0;
    for (int64_t p = b * channels; p < (b + 1) * channels; ++p) {
      for (int kind = 0; kind < 4; ++kind) norms.differences[kind] += sums[p][kind];
      squares += sums[p][4];
    }
    norms.images[b] = std::sqrt(squares);
  }
  for (double& norm : norms.differences) norm = std::sqrt(norm);
  return norms;
}

}  // namespace

Norms measure(const float* images, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return measure_all(images, batch, channels, height, width);
}
Norms measure(const double* images, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return measure_all(images, batch, channels, height, width);
}

}  // namespace dcvit::cpu
