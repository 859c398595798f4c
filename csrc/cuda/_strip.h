// The pixels that a thread keeps while it walks down a strip of an image, and the prior's gradient at them.
#pragma once

#include "_device.h"
#include "tv_prior.h"

namespace dcvit {

// The strip's columns of one row, with one more column on either side.
struct StripRow {
  float x[kStrip + 2];
};

// `row` is the row's first element.
DCVIT_D StripRow load_row(View<const float> images, int64_t row, int64_t column, int64_t width, bool wide) {
  StripRow result;
  const Vec<float, kStrip> own = load_upto<kStrip>(images, row + column, row + width, wide);
  result.x[0] = column > 0 ? load(images, row + column - 1) : 0.0f;
#pragma unroll
  for (int j = 0; j < kStrip; ++j) result.x[j + 1] = own[j];
  result.x[kStrip + 1] = column + kStrip < width ? load(images, row + column + kStrip) : 0.0f;
  return result;
}

struct Slopes {
  float right, down, diagonal, antidiagonal, pixel;
};

DCVIT_D Slopes load_slopes(View<const float> slopes, int64_t image) {
  return {load(slopes, 0), load(slopes, 1), load(slopes, 2), load(slopes, 3), load(slopes, 4 + image)};
}

// The prior's gradient in column j of the strip. Each pixel is the end of one difference per direction and the start of
// another, if those neighbours exist.
DCVIT_D float gradient_at(const Slopes& s, const StripRow& above, const StripRow& own, const StripRow& below, int j,
                          bool has_left, bool has_right, bool has_above, bool has_below) {
  const float x = own.x[j + 1];
  const float right = (has_left ? x - own.x[j] : 0.0f) - (has_right ? own.x[j + 2] - x : 0.0f);
  const float down = (has_above ? x - above.x[j + 1] : 0.0f) - (has_below ? below.x[j + 1] - x : 0.0f);
  const float diagonal =
      (has_above && has_left ? x - above.x[j] : 0.0f) - (has_below && has_right ? below.x[j + 2] - x : 0.0f);
  const float antidiagonal =
      (has_above && has_right ? x - above.x[j + 2] : 0.0f) - (has_below && has_left ? below.x[j] - x : 0.0f);
  return s.pixel * x + s.right * right + s.down * down + s.diagonal * diagonal + s.antidiagonal * antidiagonal;
}

inline bool wide_rows(const Images& shape) { return shape.width % kStrip == 0; }

}  // namespace dcvit
