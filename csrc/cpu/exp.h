// The exponential function for arguments that are not positive, as in a softmax or the normal distribution's density.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../portable.h"

namespace dcvit {

// exp(x) for x in [-87, 0], with a relative error of 1e-7. It has no branch, so that loops over it can be vectorised.
// The result for NaN may be any number.
DCVIT_HD float exp_nonpositive(float x) {
  // exp(x) = 2^n exp(r) with |r| <= log(2) / 2. Adding 1.5 * 2^23 leaves n in the low bits.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float power = 1.0f / 5040.0f;
  power = power * r + 1.0f / 720.0f;
  power = power * r + 1.0f / 120.0f;
  power = power * r + 1.0f / 24.0f;
  power = power * r + 1.0f / 6.0f;
  power = power * r + 0.5f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  uint32_t bits, exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &power, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&power, &bits, sizeof power);
  return power;
}

DCVIT_HD double exp_nonpositive(double x) { return std::exp(x); }

}  // namespace dcvit
