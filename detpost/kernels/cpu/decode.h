// The decode: scores, the k best, their boxes.
// Included by decode.cpp in the namespace of each instruction set.

#include "arithmetic.h"
#include "best_of_row.h"

DETPOST_INLINE float size_element(const DecodeArguments& of, int64_t i) {
  if (of.size_type == kSizesFloat32) return static_cast<const float*>(of.sizes)[i];
  if (of.size_type == kSizesInt32) return static_cast<float>(static_cast<const int32_t*>(of.sizes)[i]);
  return static_cast<float>(static_cast<const int64_t*>(of.sizes)[i]);
}

// As torch: a NaN stays one.
DETPOST_INLINE float clamp_to(float value, float limit) {
  value = value < 0.0f ? 0.0f : value;
  return value > limit || limit != limit ? limit : value;
}

DETPOST_INLINE void decode_box(const DecodeArguments& of, const float* box, float width, float height, float* out) {
  float x1 = box[0], y1 = box[1], x2 = box[2], y2 = box[3];
  if (of.box_format == kCxcywh) {
    const float half_width = 0.5f * box[2], half_height = 0.5f * box[3];
    x1 = box[0] - half_width, y1 = box[1] - half_height, x2 = box[0] + half_width, y2 = box[1] + half_height;
  } else if (of.box_format == kXywh) {
    x2 = box[0] + box[2], y2 = box[1] + box[3];
  }
  if (of.size_type != kNoSizes) x1 *= width, y1 *= height, x2 *= width, y2 *= height;
  if (of.clip) {
    x1 = clamp_to(x1, width), y1 = clamp_to(y1, height), x2 = clamp_to(x2, width), y2 = clamp_to(y2, height);
  }
  out[0] = x1, out[1] = y1, out[2] = x2, out[3] = y2;
}

// In double, so that equal logits score alike and as in the plain form. `count` is a multiple of 8.
static void sigmoids(const float* logits, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; ++i) {
    double x = -static_cast<double>(logits[i]);
    x = x > 708.0 ? 708.0 : x;
    x = x < -708.0 ? -708.0 : x;
    scores[i] = static_cast<float>(1.0 / (1.0 + exponential(x)));
  }
}

static void decode_image(const void* data, int64_t image) {
  const DecodeArguments& of = *static_cast<const DecodeArguments*>(data);
  const int64_t width = of.queries * of.classes;
  const float* row = as_float_row(of.logits, of.dtype, image, width);
  if (of.background >= 0) {  // NaN is never ahead of a number and never valid
    float* foreground = scratch.take<float>(0, width);
    if (foreground != row) std::memcpy(foreground, row, width * sizeof *row);
    for (int64_t i = of.background; i < width; i += of.classes) foreground[i] = std::numeric_limits<float>::quiet_NaN();
    row = foreground;
  }
  uint32_t* best = scratch.take<uint32_t>(7, of.kept);
  select_best(row, width, of.kept, best);

  const float image_height = of.size_type == kNoSizes ? 1.0f : size_element(of, 2 * image);
  const float image_width = of.size_type == kNoSizes ? 1.0f : size_element(of, 2 * image + 1);
  const float* boxes = of.boxes + image * of.queries * 4;
  const uint32_t classes = static_cast<uint32_t>(of.classes);
  const int64_t padded = (of.kept + 7) / 8 * 8;
  float* logits = scratch.take<float>(1, 2 * padded);
  float* scores = logits + padded;
  for (int64_t i = 0; i < padded; ++i) logits[i] = i < of.kept ? row[best[i]] : 0.0f;
  sigmoids(logits, padded, scores);
  for (int64_t i = 0; i < of.kept; ++i) {
    const int64_t slot = image * of.kept + i;
    const float logit = logits[i], score = scores[i];
    const uint32_t query = best[i] / classes;
    const bool valid = logit == logit && (!of.has_threshold || score > of.threshold);
    float box[4];
    decode_box(of, boxes + 4 * query, image_width, image_height, box);
    of.out_scores[slot] = valid ? score : 0.0f;
    of.out_labels[slot] = valid ? static_cast<int64_t>(best[i] - query * classes) : -1;
    of.out_queries[slot] = valid ? static_cast<int64_t>(query) : -1;
    of.out_valid[slot] = valid;
    for (int side = 0; side < 4; ++side) of.out_boxes[4 * slot + side] = valid ? box[side] : 0.0f;
  }
}
