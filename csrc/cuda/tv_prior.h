// Launches of the image prior. The formulas are in ../prior.h.
#pragma once

#include "_view.h"

namespace dcvit {

// A thread owns kStrip columns of kBand rows of a plane, and walks down them.
constexpr int kStrip = 4, kBand = 16;
// Sums of squares of an image: of its pixels, and of its differences to the right, down, diagonal and antidiagonal.
constexpr int kSums = 5;

struct Images {
  int64_t batch, channels, height, width;
  DCVIT_HD int64_t planes() const { return batch * channels; }
  DCVIT_HD int64_t bands() const { return (height + kBand - 1) / kBand; }
  DCVIT_HD int64_t strips() const { return (width + kStrip - 1) / kStrip; }
};

struct PriorSettings {
  double beta, tv_weight, l2_weight;
};

// Blocks that share an image in the first pass.
int64_t prior_chunks(const Images& shape);

// First pass: partial sums [B, chunks, kSums]. If `halo` [planes, bands, 2, W] is given, it keeps the row above and the
// row below each band for a second pass that changes the images.
void launch_prior_sums(Images shape, View<const float> images, View<double> partials, View<float> halo, void* stream);

// Then the sums of each image [B, kSums] from the partial ones, and with them value [], norms [4] and image_norms [B].
// `slopes` [4 + B], if given, gets what the gradient multiplies differences and pixels with.
void launch_prior_value(Images shape, PriorSettings settings, View<const double> partials, View<double> image_sums,
                        View<float> value, View<float> norms, View<float> image_norms, View<float> slopes,
                        void* stream);

// The same slopes from norms that were kept, times `grad` [].
void launch_prior_slopes(PriorSettings settings, View<const float> grad, View<const float> norms,
                         View<const float> image_norms, View<float> slopes, void* stream);

void launch_prior_gradient(Images shape, View<const float> images, View<const float> slopes, View<float> gradient,
                           void* stream);

}  // namespace dcvit
