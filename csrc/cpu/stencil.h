// The image prior on planes [H, W]: its norms, and the gradient at a pixel of a row.
#pragma once

#include <array>
#include <cmath>
#include <vector>

#include "../prior.h"
#include "support.h"

namespace dcvit::cpu {

struct Norms {
  std::array<double, 4> differences{};  // right, down, diagonal, antidiagonal
  std::vector<double> images;           // [B]
};

// Returns the norms of images [B, C, H, W]; defined in _stencil.cpp.
Norms measure(const float* images, int64_t batch, int64_t channels, int64_t height, int64_t width);
Norms measure(const double* images, int64_t batch, int64_t channels, int64_t height, int64_t width);

// The value of the prior. For no images, 0 / 0 gives NaN.
inline double prior_value(const Norms& norms, double beta, double tv_weight, double l2_weight) {
  double powers = 0, images = 0;
  for (double norm : norms.differences) powers += norm_power(norm, beta);
  for (double norm : norms.images) images += norm;
  return tv_weight * powers + l2_weight * (images / static_cast<double>(norms.images.size()));
}

// The factor of a pixel's difference to each kind of neighbour; zero above the first and below the last row.
template <typename T>
struct Slopes {
  T right, self;
  T up, up_left, up_right;
  T down, down_right, down_left;
};

// `kinds` are the slopes of the four difference norms.
template <typename T>
DCVIT_HD Slopes<T> slopes_of_row(const std::array<double, 4>& kinds, double self, bool first, bool last) {
  const T down = T(kinds[1]), diagonal = T(kinds[2]), anti = T(kinds[3]), none = T(0);
  return {T(kinds[0]),
          T(self),
          first ? none : down,
          first ? none : diagonal,
          first ? none : anti,
          last ? none : down,
          last ? none : diagonal,
          last ? none : anti};
}

// The prior's gradient at column j of a row. `left` and `right` say which neighbours exist. In place of a row that does
// not exist, any readable row may be passed, because its slopes are zero.
template <typename T>
DCVIT_HD T gradient_at(const T* above, const T* row, const T* below, int64_t j, const Slopes<T>& s, bool left,
                       bool right) {
  const T x = row[j];
  T sum = s.self * x + s.up * (x - above[j]) + s.down * (x - below[j]);
  if (left) sum += s.right * (x - row[j - 1]) + s.up_left * (x - above[j - 1]) + s.down_left * (x - below[j - 1]);
  if (right) sum += s.right * (x - row[j + 1]) + s.up_right * (x - above[j + 1]) + s.down_right * (x - below[j + 1]);
  return sum;
}

}  // namespace dcvit::cpu
