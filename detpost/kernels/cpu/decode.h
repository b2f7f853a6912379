// The decode: scores, the k best, their boxes.
// Included by decode.cpp in the namespace of each instruction set.

#include "arithmetic.h"
#include "best_of_row.h"
#include "softmax.h"

DETPOST_INLINE float size_element(const DecodeArguments& of, int64_t i) {
  if (of.size_type == kSizesFloat32) return static_cast<const float*>(of.sizes)[i];
  if (of.size_type == kSizesInt32) return static_cast<float>(static_cast<const int32_t*>(of.sizes)[i]);
  return static_cast<float>(static_cast<const int64_t*>(of.sizes)[i]);
}

typedef float Box __attribute__((vector_size(16)));

DETPOST_INLINE Box decode_box(const DecodeArguments& of, const float* box, const Box& image) {
  Box sides;
  std::memcpy(&sides, box, sizeof sides);
  if (of.box_format == kCxcywh || of.box_format == kSidesNotNegative) {
    Box extent = {sides[2], sides[3], sides[2], sides[3]};
    if (of.box_format == kSidesNotNegative) extent = extent < 0.0f ? (Box){} : extent;
    const Box centre = {sides[0], sides[1], sides[0], sides[1]}, outwards = {-0.5f, -0.5f, 0.5f, 0.5f};
    sides = centre + extent * outwards;  // an exact product
    if (of.out_format == kXywh) sides[2] = extent[2], sides[3] = extent[3];
  } else if (of.box_format == kXywh) {
    sides[2] = box[0] + box[2], sides[3] = box[1] + box[3];
  }
  if (of.size_type != kNoSizes) sides *= image;
  if (of.clip) {  // as torch: a NaN stays one
    sides = sides < 0.0f ? (Box){} : sides;
    sides = sides > image || image != image ? image : sides;
  }
  return sides;
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

// What the detections of an image are chosen by: numbers, NaN for what is never chosen ahead of one, and never valid.
struct Keys {
  const float* values;
  int64_t count;           // one for each pair of query and class, or for each query
  const uint32_t* labels;  // of each query, or null
};

// A copy in which the channel of the background is NaN.
static const float* without_background(const DecodeArguments& of, const float* logits) {
  const int64_t width = of.queries * of.classes;
  float* foreground = scratch.take<float>(0, width);
  if (foreground != logits) std::memcpy(foreground, logits, width * sizeof *logits);
  for (int64_t i = of.background; i < width; i += of.classes) foreground[i] = std::numeric_limits<float>::quiet_NaN();
  return foreground;
}

// The softmax of every pair.
static const float* all_probabilities(const DecodeArguments& of, const float* logits) {
  const Limbs limbs(of.classes);
  float* scores = scratch.take<float>(4, of.queries * of.classes);
  for (int64_t query = 0; query < of.queries; ++query) {
    const float* row = logits + query * of.classes;
    float* out = scores + query * of.classes;
    const Greatest peak = greatest_of(row, of.classes);
    const float inverse = 1.0f / total_weight(row, of.classes, peak.value, limbs, out, kInfinity);
    for (int64_t i = 0; i < of.classes; ++i) out[i] *= inverse;
    if (peak.has_nan) {
      for (int64_t i = 0; i < of.classes; ++i) out[i] = std::numeric_limits<float>::quiet_NaN();
    }
    if (of.background >= 0) out[of.background] = std::numeric_limits<float>::quiet_NaN();
  }
  return scores;
}

// From how far the best logit of each query lies below the greatest, and what its weights sum up to: its probability.
static void probabilities_of_best(const float* gaps, const float* totals, int64_t padded, float* scores) {
  Floats weight, total;
  for (int64_t i = 0; i < padded; i += kLanes) {
    load(weight, gaps + i);
    load(total, totals + i);
    weights_of<1>(&weight);
    store(scores + i, weight * (1.0f / total));
  }
}

// What the weights of a query sum up to; or any part of it that leaves the best class below the threshold, by whose slot
// nobody can tell. Most queries of a trained head see nothing: for them one pass over their logits is all.
DETPOST_INLINE float total_of(const DecodeArguments& of, const float* row, float peak, float gap, const Limbs& limbs) {
  float enough = kInfinity;
  if (of.has_threshold && of.threshold > 1e-6f) {
    const double weight = exponential(gap < 64.0f ? -static_cast<double>(gap) : -64.0);
    enough = static_cast<float>(1.001 * weight / of.threshold);  // more than what the weight rounds by
    if (enough <= 1.0f) return 1.0f;  // the weight of the greatest logit alone
    if (of.classes <= kMostCheap && peak > -kInfinity && peak < kInfinity) {
      const float least = least_sum(row, of.classes, peak, enough);
      if (least >= enough) return least;
    }
  }
  return total_weight(row, of.classes, peak, limbs, nullptr, enough);
}

// The best class of each query, by its logits: far below the background all its probabilities are 0.
static Keys best_classes(const DecodeArguments& of, const float* logits) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const int64_t padded = (of.queries + kLanes - 1) / kLanes * kLanes;
  float* keys = scratch.take<float>(4, 4 * padded);
  float *gaps = keys + padded, *totals = gaps + padded;
  uint32_t* labels = reinterpret_cast<uint32_t*>(totals + padded);
  const Limbs limbs(of.classes);
  const int64_t first = of.background == 0, last = of.classes - (of.background > 0);
  for (int64_t query = 0; query < padded; ++query) {
    gaps[query] = 0.0f, totals[query] = 1.0f;
    if (query >= of.queries) continue;
    const float* row = logits + query * of.stride;
    Greatest best = greatest_of(row + first, last - first), peak = best;
    const int64_t label = first_place(row, first, last, best.value);
    labels[query] = static_cast<uint32_t>(label);
    keys[query] = label < last ? best.value : kNaN;
    if (of.activation != kSoftmax) continue;
    if (of.background >= 0) {
      const float background = row[of.background];
      peak.value = background > peak.value ? background : peak.value;
      peak.has_nan = peak.has_nan || background != background;
    }
    gaps[query] = best.value == -kInfinity ? kInfinity : best.value == peak.value ? 0.0f : peak.value - best.value;
    totals[query] = peak.has_nan || label == last ? kNaN : total_of(of, row, peak.value, gaps[query], limbs);
  }
  if (of.activation == kSoftmax) probabilities_of_best(gaps, totals, padded, keys);
  return {keys, of.queries, labels};
}

static Keys keys_of(const DecodeArguments& of, const float* logits) {
  if (of.selection == kPerQuery) return best_classes(of, logits);
  const int64_t pairs = of.queries * of.classes;
  if (of.activation == kSoftmax) return {all_probabilities(of, logits), pairs, nullptr};
  return {of.background < 0 ? logits : without_background(of, logits), pairs, nullptr};
}

// Exact, and several at a time, which whole numbers are not divided: a quotient of 32 bits never rounds up to the next.
static void divide_all(const uint32_t* numbers, int64_t count, uint32_t by, uint32_t* quotients) {
  const double divisor = by;
  for (int64_t i = 0; i < count; ++i) quotients[i] = static_cast<uint32_t>(static_cast<int32_t>(numbers[i] / divisor));
}

static void decode_image(const void* data, int64_t image) {
  const DecodeArguments& of = *static_cast<const DecodeArguments*>(data);
  const Keys keys = keys_of(of, as_float_row(of.logits, of.dtype, image, of.queries * of.stride));
  uint32_t* best = scratch.take<uint32_t>(7, of.kept);
  select_best(keys.values, keys.count, of.kept, best);

  const float image_height = of.size_type == kNoSizes ? 1.0f : size_element(of, 2 * image);
  const float image_width = of.size_type == kNoSizes ? 1.0f : size_element(of, 2 * image + 1);
  const Box size = {image_width, image_height, image_width, image_height};
  const float* boxes = of.boxes + image * of.queries * of.boxes_stride;
  const uint32_t classes = static_cast<uint32_t>(of.classes);
  uint32_t* queries = scratch.take<uint32_t>(2, of.kept);
  const int64_t padded = (of.kept + 7) / 8 * 8;
  float* chosen = scratch.take<float>(1, 2 * padded);
  float* scores = of.activation == kSigmoid ? chosen + padded : chosen;
  for (int64_t i = 0; i < padded; ++i) chosen[i] = i < of.kept ? keys.values[best[i]] : 0.0f;
  if (of.activation == kSigmoid) sigmoids(chosen, padded, scores);
  if (!keys.labels) divide_all(best, of.kept, classes, queries);
  for (int64_t i = 0; i < of.kept; ++i) {
    const int64_t slot = image * of.kept + i;
    const float key = chosen[i], score = scores[i];
    const uint32_t query = keys.labels ? best[i] : queries[i];
    const uint32_t label = keys.labels ? keys.labels[query] : best[i] - query * classes;
    const bool valid = key == key && (!of.has_threshold || score > of.threshold);
    const Box box = valid ? decode_box(of, boxes + of.boxes_stride * query, size) : (Box){};
    of.out_scores[slot] = valid ? score : 0.0f;
    of.out_labels[slot] = valid ? static_cast<int64_t>(label) : -1;
    of.out_queries[slot] = valid ? static_cast<int64_t>(query) : -1;
    of.out_valid[slot] = valid;
    std::memcpy(of.out_boxes + 4 * slot, &box, sizeof box);
  }
}
