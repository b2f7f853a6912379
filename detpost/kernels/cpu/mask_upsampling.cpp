// Rows of mask logits to rows of booleans at the height of an image.

#include <cstdint>
#include <cstring>

#include "common.h"

using namespace detpost;

namespace {

struct BlendArguments {
  const float* rows;  // (masks, source height, width)
  int64_t source_height, height, width;
  const int32_t *upper, *lower;                // for each row of the output, the two rows that it lies between
  const float *upper_weights, *lower_weights;  // likewise
  float threshold;
  int inclusive;
  uint8_t* masks;  // (masks, height, width)
};

}  // namespace

#define DETPOST_FAMILY "mask_upsampling.h"
#include "levels.h"

DETPOST_EXPORT int detpost_blend_masks(const float* rows, int64_t masks, int64_t source_height, int64_t height,
                                       int64_t width, const int32_t* upper, const int32_t* lower,
                                       const float* upper_weights, const float* lower_weights, float threshold,
                                       int inclusive, uint8_t* out, int threads) {
  return outcome_of([&] {
    const BlendArguments arguments{rows,  source_height, height,        width,     upper, lower, upper_weights,
                                   lower_weights, threshold,     inclusive, out};
    start(DETPOST_BEST(blend_mask), arguments, masks, masks * height * width < (1 << 15) ? 1 : threads);
  });
}
