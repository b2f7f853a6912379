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

// The softmax of every pair of some queries.
static void score_pairs(const DecodeArguments& of, const float* logits, int64_t queries, float* scores) {
  const Limbs limbs(of.classes);
  for (int64_t query = 0; query < queries; ++query) {
    const float* row = logits + query * of.classes;
    float* out = scores + query * of.classes;
    const Greatest peak = greatest_of(row, of.classes);
    const float inverse = 1.0f / total_weight(row, of.classes, peak.value, limbs, out);
    for (int64_t i = 0; i < of.classes; ++i) out[i] *= inverse;
    if (peak.has_nan) {
      for (int64_t i = 0; i < of.classes; ++i) out[i] = std::numeric_limits<float>::quiet_NaN();
    }
    if (of.background >= 0) out[of.background] = std::numeric_limits<float>::quiet_NaN();
  }
}

// Of some queries, `kQueriesAtOnce` at the most.
struct Weighed {
  float gaps[kQueriesAtOnce];    // how far the best logit lies below the greatest
  float peaks[kQueriesAtOnce];   // the greatest
  float enough[kQueriesAtOnce];  // a sum of weights for which the best class is below the threshold
  float totals[kQueriesAtOnce];  // what the weights sum up to
};

// The probability of each query's best class.
static void probabilities_of_best(const Weighed& of, int64_t padded, float* scores) {
  Floats weight, total;
  for (int64_t i = 0; i < padded; i += kLanes) {
    load(weight, of.gaps + i);
    load(total, of.totals + i);
    weight *= kStepsOfLogit;
    weights_of<1>(&weight, 1.0f);
    store(scores + i, weight * (1.0f / total));
  }
}

// Without a threshold no sum is.
static void find_enough(const DecodeArguments& of, int64_t padded, Weighed& queries) {
  const bool has_threshold = of.has_threshold && of.threshold > 1e-6f;
  for (int64_t i = 0; i < padded; ++i) {
    const double weight = exponential(queries.gaps[i] < 64.0f ? -static_cast<double>(queries.gaps[i]) : -64.0);
    const float enough = static_cast<float>(1.001 * weight / of.threshold);  // more than what the weight rounds by
    queries.enough[i] = has_threshold ? enough : kInfinity;
  }
}

// What the weights of a query sum up to, or any part of it that is `enough`. Most queries of a trained head see nothing: for
// them one pass over their logits is all.
DETPOST_INLINE float total_of(const float* row, int64_t classes, float peak, float enough, const Limbs& limbs) {
  if (enough <= 1.0f) return 1.0f;  // the weight of the greatest logit alone
  if (enough < kInfinity && classes <= kMostCheap && peak > -kInfinity && peak < kInfinity) {
    const float least = least_sum(row, classes, peak, enough);
    if (least >= enough) return least;
  }
  return total_weight(row, classes, peak, limbs, nullptr);
}

// The best class of some queries, `kQueriesAtOnce` at the most, by their logits: far below the background all the
// probabilities of a query are 0. Writes as many keys as whole registers hold. A query that is seen to be below the
// threshold gets any label: by whose slot it is, nobody can tell.
static void choose_classes(const DecodeArguments& of, const float* logits, int64_t queries, float* keys,
                           uint32_t* labels) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  Weighed weighed;
  float best[kQueriesAtOnce];
  const int64_t padded = (queries + kLanes - 1) / kLanes * kLanes;
  const int64_t first = of.background == 0, last = of.classes - (of.background > 0);
  for (int64_t query = 0; query < padded; ++query) {
    weighed.gaps[query] = 0.0f, weighed.totals[query] = 1.0f;
    if (query >= queries) continue;
    const float* row = logits + query * of.stride;
    const Greatest greatest = greatest_of(row + first, last - first);
    float peak = best[query] = greatest.value;
    bool has_nan = greatest.has_nan;
    if (of.background >= 0) {
      const float background = row[of.background];
      peak = background > peak ? background : peak;
      has_nan = has_nan || background != background;
    }
    weighed.peaks[query] = peak;
    weighed.gaps[query] = best[query] == -kInfinity ? kInfinity : best[query] == peak ? 0.0f : peak - best[query];
    if (has_nan) weighed.totals[query] = kNaN;
  }
  const bool weighs = of.activation == kSoftmax;
  if (weighs) find_enough(of, padded, weighed);
  const Limbs limbs(of.classes);
  for (int64_t query = 0; query < queries; ++query) {
    const float* row = logits + query * of.stride;
    float& total = weighed.totals[query];
    if (weighs && total == total) {
      total = total_of(row, of.classes, weighed.peaks[query], weighed.enough[query], limbs);
      labels[query] = 0;
      if (total >= weighed.enough[query]) continue;
    }
    const int64_t label = first_place(row, first, last, best[query]);
    labels[query] = static_cast<uint32_t>(label);
    keys[query] = label < last ? best[query] : kNaN;
    if (label == last) total = kNaN;
  }
  if (weighs) probabilities_of_best(weighed, padded, keys);
}

// Makes the keys of part `part` of an image: of `kQueriesAtOnce` queries.
static void make_part(const DecodeArguments& of, int64_t image, int64_t part, float* keys, uint32_t* labels) {
  const int64_t first = part * kQueriesAtOnce, left = of.queries - first;
  const int64_t queries = left < kQueriesAtOnce ? left : kQueriesAtOnce;
  const float* logits = as_floats(of.logits, of.dtype, (image * of.queries + first) * of.stride, queries * of.stride);
  if (of.selection == kPerQuery) {
    choose_classes(of, logits, queries, keys + first, labels + first);
  } else {
    score_pairs(of, logits, queries, keys + first * of.classes);
  }
}

[[maybe_unused]] static void make_shared_part(const void* data, int64_t task) {
  const DecodeArguments& of = *static_cast<const DecodeArguments*>(data);
  const int64_t image = task / of.parts;
  make_part(of, image, task % of.parts, of.keys + image * of.keys_stride, of.labels + image * of.labels_stride);
}

static Keys keys_of(const DecodeArguments& of, int64_t image) {
  const int64_t pairs = of.queries * of.classes;
  if (of.parts == 0) {  // the logits themselves
    const float* logits = as_floats(of.logits, of.dtype, image * pairs, pairs);
    return {of.background < 0 ? logits : without_background(of, logits), pairs, nullptr};
  }
  float* keys = of.keys + image * of.keys_stride;
  uint32_t* labels = of.labels + image * of.labels_stride;
  if (!of.keys) {
    keys = scratch.take<float>(4, of.keys_stride + of.labels_stride);
    labels = reinterpret_cast<uint32_t*>(keys + of.keys_stride);
    for (int64_t part = 0; part < of.parts; ++part) make_part(of, image, part, keys, labels);
  }
  if (of.selection == kPerQuery) return {keys, of.queries, labels};
  return {keys, pairs, nullptr};
}

// Exact, and several at a time, which whole numbers are not divided: a quotient of 32 bits never rounds up to the next.
static void divide_all(const uint32_t* numbers, int64_t count, uint32_t by, uint32_t* quotients) {
  const double divisor = by;
  for (int64_t i = 0; i < count; ++i) quotients[i] = static_cast<uint32_t>(static_cast<int32_t>(numbers[i] / divisor));
}

static void decode_image(const void* data, int64_t image) {
  const DecodeArguments& of = *static_cast<const DecodeArguments*>(data);
  const Keys keys = keys_of(of, image);
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
