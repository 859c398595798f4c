// Launches of the image prior. The formulas are in ../prior.h.
#pragma once

#include "_view.h"

namespace dcvit {

// A thread owns kStrip columns of kBand rows of a plane, and walks down the rows.
constexpr int kStrip = 4, kBand = 16;
// The sums of squares per image: of its pixels, and of its right, down, diagonal and antidiagonal differences.
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

// The number of blocks that share an image in the first pass.
int64_t prior_chunks(const Images& shape);

// First pass: partial sums [B, chunks, kSums]. The optional `halo` [planes, bands, 2, W] saves the rows above and below
// each band, for a second pass that changes the images.
void launch_prior_sums(Images shape, View<const float> images, View<double> partials, View<float> halo, void* stream);

// Computes the sums of each image [B, kSums] from the partial sums, and from those value [], norms [4] and
// image_norms [B]. The optional `slopes` [4 + B] gets the factors of differences and pixels in the gradient.
void launch_prior_value(Images shape, PriorSettings settings, View<const double> partials, View<double> image_sums,
                        View<float> value, View<float> norms, View<float> image_norms, View<float> slopes,
                        void* stream);

// Computes the same slopes from saved norms, times `grad` [].
void launch_prior_slopes(PriorSettings settings, View<const float> grad, View<const float> norms,
                         View<const float> image_norms, View<float> slopes, void* stream);

void launch_prior_gradient(Images shape, View<const float> images, View<const float> slopes, View<float> gradient,
                           void* stream);

}  // namespace dcvit
