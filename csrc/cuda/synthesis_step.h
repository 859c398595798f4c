// Launch of the synthesis step's second pass; tv_prior.h has the first.
#pragma once

#include "../adam.h"
#include "tv_prior.h"

namespace dcvit {

// Rows as wide as this are owned by one block, whose threads see the old neighbours although the images change in
// place.
constexpr int64_t kWidestInPlace = 512 * kStrip;

// Adam on `grad` plus the prior's gradient, and the clip. The neighbours come from `source` and, for the rows beyond a
// band, from `halo`; without a halo all come from `source`, which must then be a copy of `images`.
void launch_synthesis_step(Images shape, Adam<float> adam, View<const float> source, View<const float> halo,
                           View<const float> slopes, View<float> images, View<const float> grad, View<float> exp_avg,
                           View<float> exp_avg_sq, View<const float> low, View<const float> high, void* stream);

}  // namespace dcvit
