// Greedy suppression and merging of boxes that overlap.
//
// Boxes are taken best first, class by class. Each is compared with those kept before it, a register of them at once, until
// one overlaps it: the walk of Neubeck and Van Gool (ICPR 2006) with its loops exchanged, so that what is compared stands
// side by side. An overlap is computed by torchvision's operations in torchvision's order, each rounded by itself.

#ifndef DETPOST_KERNELS

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"
#include "ranking.h"

namespace {

using detpost::Entry;
using detpost::hold;

thread_local detpost::Scratch scratch;
enum Slot : int { kColumns = 0, kKeepers = 1 };

// In the order of nms.py's record.
struct Call {
  detpost::Lists lists;
  int64_t boxes, box_type;  // (batch, count, 4), float32 or float64
  int64_t smaller;          // overlaps are parts of the smaller box and not of the union
  int64_t keep;             // (batch, count), bool, all false
  int64_t merged;           // as boxes, and a copy of them: kept ones grow by what they swallow; none: suppression alone
  double threshold;         // a box is dropped above it
  double grown_threshold;   // ... and swallowed if it overlaps the grown box by this much, too
};

// Detections, float32 and int64, in and out; what is not kept reads as an empty slot.
struct Rows {
  int64_t batch, count, compact;
  int64_t keep, scores, labels, boxes, queries;
  int64_t out_scores, out_labels, out_boxes, out_queries, out_valid;
};

// The boxes of one class, best first.
struct Walk {
  const void* boxes;  // of the image
  const Entry* order;
  int64_t count;
  double threshold, grown_threshold;
  bool smaller;
  void* merged;
  uint8_t* keep;
};

// The greatest number of a type not above one that is at least 0: comparing with it is comparing as doubles.
void not_above(double value, double* found) { *found = value; }
void not_above(double value, float* found) {
  const float near = static_cast<float>(value);
  *found = static_cast<double>(near) > value ? std::nextafter(near, -1.0f) : near;
}

}  // namespace

#define DETPOST_FAMILY "nms.cpp"
#include "levels.h"

namespace {

void visit(const void* data, int64_t image, const Entry* order, int64_t count) {
  const Call& call = *static_cast<const Call*>(data);
  const detpost::TrimAfter after{scratch};
  const bool wide = call.box_type == detpost::kDouble;
  const int64_t first = image * call.lists.count, bytes = first * 4 * (wide ? 8 : 4);
  const Walk walk{reinterpret_cast<const void*>(call.boxes + bytes),
                  order,
                  count,
                  call.threshold,
                  call.grown_threshold,
                  call.smaller != 0,
                  call.merged ? reinterpret_cast<void*>(call.merged + bytes) : nullptr,
                  reinterpret_cast<uint8_t*>(call.keep) + first};
  if (wide) {
    DETPOST_BEST(walk_doubles)(walk);
  } else {
    DETPOST_BEST(walk_floats)(walk);
  }
}

// Writes the detections of an image: what is kept in its slot or at the front.
void write_rows(const Rows& of, int64_t image) {
  const int64_t first = image * of.count;
  const uint8_t* keep = reinterpret_cast<const uint8_t*>(of.keep) + first;
  const float* scores = reinterpret_cast<const float*>(of.scores) + first;
  const int64_t* labels = reinterpret_cast<const int64_t*>(of.labels) + first;
  const int64_t* queries = reinterpret_cast<const int64_t*>(of.queries) + first;
  const float* boxes = reinterpret_cast<const float*>(of.boxes) + first * 4;
  float* out_scores = reinterpret_cast<float*>(of.out_scores) + first;
  int64_t* out_labels = reinterpret_cast<int64_t*>(of.out_labels) + first;
  int64_t* out_queries = reinterpret_cast<int64_t*>(of.out_queries) + first;
  float* out_boxes = reinterpret_cast<float*>(of.out_boxes) + first * 4;
  uint8_t* out_valid = reinterpret_cast<uint8_t*>(of.out_valid) + first;
  int64_t at = 0;
  const auto empty = [&] {
    out_scores[at] = 0.0f;
    out_labels[at] = -1;
    out_queries[at] = -1;
    std::memset(out_boxes + 4 * at, 0, 4 * sizeof *out_boxes);
    out_valid[at++] = 0;
  };
  for (int64_t i = 0; i < of.count; ++i) {
    if (keep[i]) {
      out_scores[at] = scores[i];
      out_labels[at] = labels[i];
      out_queries[at] = queries[i];
      std::memcpy(out_boxes + 4 * at, boxes + 4 * i, 4 * sizeof *boxes);
      out_valid[at++] = 1;
    } else if (!of.compact) {
      empty();
    }
  }
  while (at < of.count) empty();
}

}  // namespace

// `rows`, or null: the detections that the boxes belong to.
DETPOST_EXPORT int detpost_nms(const char* record, const char* rows) {
  return detpost::outcome_of([&] {
    Call call;
    std::memcpy(&call, record, sizeof call);
    detpost::for_each_class(call.lists, &call, visit);
    if (!rows) return;
    Rows of;
    std::memcpy(&of, rows, sizeof of);
    for (int64_t image = 0; image < of.batch; ++image) write_rows(of, image);
  });
}

#else  // the kernels, once per instruction set

typedef float Floats __attribute__((vector_size(DETPOST_REGISTER)));
typedef double Doubles __attribute__((vector_size(DETPOST_REGISTER)));

DETPOST_INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
DETPOST_INLINE void load(Doubles& to, const double* from) { std::memcpy(&to, from, sizeof to); }

// One bit for each lane that is above a number; none for NaN.
DETPOST_INLINE uint32_t lanes_above(const Floats& values, const Floats& limit) {
#if DETPOST_REGISTER == 64
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(values), reinterpret_cast<__m512>(limit), _CMP_GT_OQ);
#elif DETPOST_REGISTER == 32
  return _mm256_movemask_ps(reinterpret_cast<__m256>(values > limit));
#elif defined(__x86_64__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(values > limit));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < 4; ++lane) bits |= uint32_t(values[lane] > limit[lane]) << lane;
  return bits;
#endif
}

DETPOST_INLINE uint32_t lanes_above(const Doubles& values, const Doubles& limit) {
#if DETPOST_REGISTER == 64
  return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(values), reinterpret_cast<__m512d>(limit), _CMP_GT_OQ);
#elif DETPOST_REGISTER == 32
  return _mm256_movemask_pd(reinterpret_cast<__m256d>(values > limit));
#elif defined(__x86_64__)
  return _mm_movemask_pd(reinterpret_cast<__m128d>(values > limit));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < 2; ++lane) bits |= uint32_t(values[lane] > limit[lane]) << lane;
  return bits;
#endif
}

// The kept boxes of a class in columns, with room for a register beyond the last.
template <typename T>
struct Columns {
  T *left, *top, *right, *bottom, *area;
};

// The first of `count` kept boxes that overlaps a box by more than the threshold; -1 for none.
template <typename T, typename Lanes, bool kSmaller>
DETPOST_INLINE int64_t first_overlap(const Columns<T>& kept, int64_t count, const T* box, T area, T threshold) {
  constexpr int64_t kLanes = sizeof(Lanes) / sizeof(T);
  const Lanes zero = {};
  const Lanes own_left = box[0] - zero, own_top = box[1] - zero, own_right = box[2] - zero, own_bottom = box[3] - zero;
  const Lanes own_area = area - zero, limit = threshold - zero;
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes left, top, right, bottom, areas;
    load(left, kept.left + i);
    load(top, kept.top + i);
    load(right, kept.right + i);
    load(bottom, kept.bottom + i);
    load(areas, kept.area + i);
    left = left > own_left ? left : own_left;
    top = top > own_top ? top : own_top;
    right = right < own_right ? right : own_right;
    bottom = bottom < own_bottom ? bottom : own_bottom;
    Lanes width = right - left, height = bottom - top;
    width = width > zero ? width : zero;
    height = height > zero ? height : zero;
    Lanes shared = width * height;
    hold(shared);
    // Of a NaN and a number the NaN, if it is a kept one's; with a NaN of its own the box shares nothing with any.
    const Lanes whole = kSmaller ? (areas > own_area ? own_area : areas) : areas + own_area - shared;
    uint32_t found = lanes_above(shared / whole, limit);
    if (count - i < kLanes) found &= (1u << (count - i)) - 1;  // beyond the last there is anything
    if (found) return i + __builtin_ctz(found);
  }
  return -1;
}

// Whether a box overlaps a grown one by at least as much; as SAHI, in doubles.
template <typename T>
DETPOST_INLINE bool reaches(const T* grown, const T* box, bool smaller, double threshold) {
  const double left = grown[0] > box[0] ? grown[0] : box[0], top = grown[1] > box[1] ? grown[1] : box[1];
  const double right = grown[2] < box[2] ? grown[2] : box[2], bottom = grown[3] < box[3] ? grown[3] : box[3];
  double width = right - left, height = bottom - top;
  width = width > 0 ? width : 0;
  height = height > 0 ? height : 0;
  double shared = width * height;
  double area = (double(grown[2]) - grown[0]) * (double(grown[3]) - grown[1]);
  double own = (double(box[2]) - box[0]) * (double(box[3]) - box[1]);
  hold(shared);
  hold(area);
  hold(own);
  return shared / (smaller ? (area < own ? area : own) : area + own - shared) >= threshold;
}

template <typename T, typename Lanes, bool kSmaller>
DETPOST_INLINE void walk_boxes(const Walk& walk) {
  const int64_t column = walk.count + sizeof(Lanes) / sizeof(T);
  T* memory = scratch.take<T>(kColumns, 5 * column);
  const Columns<T> kept{memory, memory + column, memory + 2 * column, memory + 3 * column, memory + 4 * column};
  int64_t* keepers = walk.merged ? scratch.take<int64_t>(kKeepers, walk.count) : nullptr;
  T threshold;
  not_above(walk.threshold, &threshold);
  int64_t count = 0;
  for (int64_t i = 0; i < walk.count; ++i) {
    const int64_t index = walk.order[i].index;
    const T* box = static_cast<const T*>(walk.boxes) + 4 * index;
    T area = (box[2] - box[0]) * (box[3] - box[1]);
    hold(area);
    const int64_t keeper = first_overlap<T, Lanes, kSmaller>(kept, count, box, area, threshold);
    if (keeper < 0) {
      kept.left[count] = box[0];
      kept.top[count] = box[1];
      kept.right[count] = box[2];
      kept.bottom[count] = box[3];
      kept.area[count] = area;
      if (keepers) keepers[count] = index;
      ++count;
      walk.keep[index] = 1;
    } else if (keepers) {
      T* grown = static_cast<T*>(walk.merged) + 4 * keepers[keeper];
      if (reaches(grown, box, kSmaller, walk.grown_threshold)) {
        for (int side = 0; side < 2; ++side) grown[side] = box[side] < grown[side] ? box[side] : grown[side];
        for (int side = 2; side < 4; ++side) grown[side] = box[side] > grown[side] ? box[side] : grown[side];
      }
    }
  }
}

static void walk_floats(const Walk& walk) {
  if (walk.smaller) {
    walk_boxes<float, Floats, true>(walk);
  } else {
    walk_boxes<float, Floats, false>(walk);
  }
}

static void walk_doubles(const Walk& walk) {
  if (walk.smaller) {
    walk_boxes<double, Doubles, true>(walk);
  } else {
    walk_boxes<double, Doubles, false>(walk);
  }
}

#endif
