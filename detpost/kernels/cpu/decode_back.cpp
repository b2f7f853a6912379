// From gradients of scores and corners back to raw logits and boxes.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "decode_call.h"

using namespace detpost;

namespace {

struct BackArguments {
  const float* logits;                // (batch, queries, classes)
  const int64_t *labels, *chosen;     // (batch, kept), the chosen queries
  const uint8_t* valid;               // likewise
  const float *of_scores, *of_boxes;  // (batch, kept) and (batch, kept, 4), or null
  const float* sides;                 // (batch, 2), height and width, or null
  int box_format;
  int64_t queries, classes, kept;
  float *back_logits, *back_boxes;  // (batch, queries, classes) and (batch, queries, 4), or null
};

// The derivative of a sigmoid, in double: in float its distance from 1 is lost.
double slope_of(double logit) {
  const double weight = std::exp(-std::fabs(logit));
  return weight / ((1.0 + weight) * (1.0 + weight));
}

void add_box(const BackArguments& of, const float* corners, float height, float width, float* box) {
  const float sides[2] = {width, height};
  for (int axis = 0; axis < 2; ++axis) {
    const float first = corners[axis] * sides[axis], second = corners[axis + 2] * sides[axis];
    if (of.box_format == kXyxy) {
      box[axis] += first, box[axis + 2] += second;
    } else {
      box[axis] += first + second;
      box[axis + 2] += of.box_format == kXywh ? second : 0.5f * (second - first);
    }
  }
}

void back_through_image(const void* data, int64_t image) {
  const BackArguments& of = *static_cast<const BackArguments*>(data);
  const int64_t pairs = of.queries * of.classes;
  if (of.back_logits) std::memset(of.back_logits + image * pairs, 0, pairs * sizeof(float));
  if (of.back_boxes) std::memset(of.back_boxes + image * of.queries * 4, 0, of.queries * 4 * sizeof(float));
  const float height = of.sides ? of.sides[2 * image] : 1.0f, width = of.sides ? of.sides[2 * image + 1] : 1.0f;
  for (int64_t slot = image * of.kept; slot < (image + 1) * of.kept; ++slot) {
    if (!of.valid[slot]) continue;
    const int64_t query = image * of.queries + of.chosen[slot], place = query * of.classes + of.labels[slot];
    if (of.back_logits) of.back_logits[place] += static_cast<float>(of.of_scores[slot] * slope_of(of.logits[place]));
    if (of.back_boxes) add_box(of, of.of_boxes + 4 * slot, height, width, of.back_boxes + 4 * query);
  }
}

}  // namespace

// `back_logits` and `back_boxes` are null where nobody asks; then their gradients may be null, too.
DETPOST_EXPORT int detpost_decode_back(const float* logits, const int64_t* labels, const int64_t* chosen,
                                       const uint8_t* valid, const float* of_scores, const float* of_boxes,
                                       const float* sides, int box_format, int64_t batch, int64_t queries,
                                       int64_t classes, int64_t kept, float* back_logits, float* back_boxes,
                                       int threads) {
  return outcome_of([&] {
    const BackArguments arguments{logits,     labels,  chosen,  valid, of_scores,   of_boxes,  sides,
                                  box_format, queries, classes, kept,  back_logits, back_boxes};
    start(back_through_image, arguments, batch, batch * queries * classes < (1 << 16) ? 1 : threads);
  });
}
