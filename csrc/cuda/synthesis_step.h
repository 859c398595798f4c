// Launch of the synthesis step's second pass. The first pass is in tv_prior.h.
#pragma once

#include "../adam.h"
#include "tv_prior.h"

namespace dcvit {

// The widest rows that one block can hold. Its threads then read the old neighbours before they change the images in
// place.
constexpr int64_t kWidestInPlace = 512 * kStrip;

// Applies Adam to `grad` plus the prior's gradient, and clips. Neighbours are read from `source`, or from `halo` if
// they are outside of the band. Without a halo, `source` must be a copy of `images`.
void launch_synthesis_step(Images shape, Adam<float> adam, View<const float> source, View<const float> halo,
                           View<const float> slopes, View<float> images, View<const float> grad, View<float> exp_avg,
                           View<float> exp_avg_sq, View<const float> low, View<const float> high, void* stream);

}  // namespace dcvit
