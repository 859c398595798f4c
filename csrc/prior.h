// The image prior: how norms of the images and of their differences to four neighbours give its value and gradient.
//
// R(x) = tv_weight sum_d ||D_d x||^beta + l2_weight mean_b ||x_b||, d = right, down, diagonal, antidiagonal.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace dcvit {

// d(weight ||v||^beta)/dv = slope * v. A zero norm contributes no gradient.
DCVIT_HD double norm_slope(double norm, double weight, double beta) {
  return norm > 0 ? weight * beta * std::pow(norm, beta - 2) : 0.0;
}

// beta is positive, so 0^beta is 0.
DCVIT_HD double norm_power(double norm, double beta) { return norm > 0 ? std::pow(norm, beta) : 0.0; }

// d(l2_weight mean_b ||x_b||)/dx_b = slope * x_b.
DCVIT_HD double l2_slope(double norm, double l2_weight, int64_t images) {
  return norm > 0 ? l2_weight / (norm * static_cast<double>(images)) : 0.0;
}

}  // namespace dcvit
