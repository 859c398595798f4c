// The Adam step of one element (Kingma and Ba, arXiv 1412.6980, algorithm 1), with the bias corrections of
// torch.optim.Adam, followed by the clip to the valid range.
#pragma once

#include <cmath>
#include <cstdint>

#include "portable.h"

namespace dcvit {

template <typename T>
struct Adam {
  T beta1;
  T rest1;  // 1 - beta1
  T beta2;
  T rest2;        // 1 - beta2
  T correction2;  // 1 - beta2^step
  T eps;
  T rate;  // lr / (1 - beta1^step)

  // The constants are computed in double precision, as the eager implementation computes them in Python.
  static Adam make(int64_t step, double lr, double beta1, double beta2, double eps) {
    const double count = static_cast<double>(step);
    return {T(beta1),
            T(1 - beta1),
            T(beta2),
            T(1 - beta2),
            T(1 - std::pow(beta2, count)),
            T(eps),
            T(lr / (1 - std::pow(beta1, count)))};
  }

  // Updates x, the first moment m and the second moment v for the gradient g, and clips x to [low, high].
  DCVIT_HD void apply(T& x, T& m, T& v, T g, T low, T high) const {
    m = m * beta1 + rest1 * g;
    v = v * beta2 + rest2 * g * g;
    const T moved = x - rate * m / (std::sqrt(v / correction2) + eps);
    const T raised = moved < low ? low : moved;  // NaN stays NaN, as in torch.clamp
    x = raised > high ? high : raised;
  }
};

}  // namespace dcvit
