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
constexpr size_t kMostKept = size_t(1) << 24;  // bytes of each slot, between calls
enum Slot : int { kRanking = 0, kRankings = 1, kFirstTasks = 2, kColumns = 3, kKeepers = 4 };

// In the order of nms.py's record; addresses as numbers, 0 for none.
struct Call {
  int64_t batch, count, threads;
  int64_t boxes, box_type;  // (batch, count, 4), float32 or float64
  int64_t scores, score_type;  // (batch, count), float32 or float64; none: best first already
  int64_t labels, valid;       // (batch, count), int64 and bool
  int64_t smaller;             // overlaps are parts of the smaller box and not of the union
  int64_t merged;              // as boxes: the kept boxes with those that they swallowed; none: suppression alone
  int64_t keep;                // (batch, count), bool
  // Detections, float32 and int64: `in` is where boxes and labels above belong to; none of these for plain tensors.
  int64_t in_scores, in_labels, in_queries, compact;
  int64_t out_scores, out_labels, out_boxes, out_queries, out_valid;
  double threshold;    // a box is dropped above it
  double grown_threshold;  // ... and swallowed where it overlaps the grown box by this much, too
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

// The rankings of all images; a task is one class of one image.
struct Plan {
  const Call* call;
  int64_t* memory;
  detpost::Ranking* rankings;
  int64_t* first_tasks;  // of each image, and the end
};

// Boxes to rank, or pairs of one class to compare, below which waking a thread takes longer than they do.
constexpr int64_t kManyBoxes = int64_t(1) << 16, kManyPairs = int64_t(1) << 22;

const void* boxes_of(const Call& call, int64_t image) {
  const int64_t size = call.box_type == detpost::kDouble ? 8 : 4;
  return reinterpret_cast<const void*>(call.boxes + image * call.count * 4 * size);
}

detpost::Ranking rank_image(const Call& call, int64_t image, int64_t* memory) {
  const int64_t first = image * call.count;
  const int64_t size = call.score_type == detpost::kDouble ? 8 : 4;
  const detpost::Ranked of{
      call.scores ? reinterpret_cast<const void*>(call.scores + first * size) : nullptr,
      call.scores ? call.score_type : int64_t(detpost::kNone),
      call.labels ? reinterpret_cast<const int64_t*>(call.labels) + first : nullptr,
      call.valid ? reinterpret_cast<const uint8_t*>(call.valid) + first : nullptr,
      call.count,
  };
  std::memset(reinterpret_cast<uint8_t*>(call.keep) + first, 0, call.count);
  if (call.merged) {
    const size_t bytes = call.count * 4 * (call.box_type == detpost::kDouble ? 8 : 4);
    std::memcpy(reinterpret_cast<char*>(call.merged) + image * bytes, boxes_of(call, image), bytes);
  }
  return detpost::rank(of, memory);
}

void walk_class(const Call& call, int64_t image, const detpost::Ranking& ranking, int64_t number) {
  const bool wide = call.box_type == detpost::kDouble;
  const int64_t first = ranking.starts[number];
  Walk walk{boxes_of(call, image),
            ranking.order + first,
            ranking.starts[number + 1] - first,
            call.threshold,
            call.grown_threshold,
            call.smaller != 0,
            call.merged ? reinterpret_cast<char*>(call.merged) + image * call.count * 4 * (wide ? 8 : 4) : nullptr,
            reinterpret_cast<uint8_t*>(call.keep) + image * call.count};
  if (wide) {
    DETPOST_BEST(walk_doubles)(walk);
  } else {
    DETPOST_BEST(walk_floats)(walk);
  }
}

// Writes the detections of an image: what is kept in its slot or at the front, and elsewhere what an empty slot reads.
void write_detections(const Call& call, int64_t image) {
  const int64_t first = image * call.count;
  const uint8_t* keep = reinterpret_cast<const uint8_t*>(call.keep) + first;
  const float* scores = reinterpret_cast<const float*>(call.in_scores) + first;
  const int64_t* labels = reinterpret_cast<const int64_t*>(call.in_labels) + first;
  const int64_t* queries = reinterpret_cast<const int64_t*>(call.in_queries) + first;
  const float* boxes = reinterpret_cast<const float*>(call.boxes) + first * 4;
  float* out_scores = reinterpret_cast<float*>(call.out_scores) + first;
  int64_t* out_labels = reinterpret_cast<int64_t*>(call.out_labels) + first;
  int64_t* out_queries = reinterpret_cast<int64_t*>(call.out_queries) + first;
  float* out_boxes = reinterpret_cast<float*>(call.out_boxes) + first * 4;
  uint8_t* out_valid = reinterpret_cast<uint8_t*>(call.out_valid) + first;
  int64_t at = 0;
  const auto empty = [&] {
    out_scores[at] = 0.0f;
    out_labels[at] = -1;
    out_queries[at] = -1;
    std::memset(out_boxes + 4 * at, 0, 4 * sizeof *out_boxes);
    out_valid[at++] = 0;
  };
  for (int64_t i = 0; i < call.count; ++i) {
    if (keep[i]) {
      out_scores[at] = scores[i];
      out_labels[at] = labels[i];
      out_queries[at] = queries[i];
      std::memcpy(out_boxes + 4 * at, boxes + 4 * i, 4 * sizeof *boxes);
      out_valid[at++] = 1;
    } else if (!call.compact) {
      empty();
    }
  }
  while (at < call.count) empty();
}

void rank_task(const void* data, int64_t image) {
  const Plan& plan = *static_cast<const Plan*>(data);
  const size_t words = detpost::ranking_words(plan.call->count);
  plan.rankings[image] = rank_image(*plan.call, image, plan.memory + image * words);
}

void class_task(const void* data, int64_t task) {
  const Plan& plan = *static_cast<const Plan*>(data);
  int64_t image = 0;
  while (task >= plan.first_tasks[image + 1]) ++image;
  walk_class(*plan.call, image, plan.rankings[image], task - plan.first_tasks[image]);
}

void output_task(const void* data, int64_t image) { write_detections(*static_cast<const Call*>(data), image); }

// Lays out the tasks of all images; gives the number of pairs that may have to be compared.
int64_t lay_out_tasks(const Plan& plan) {
  int64_t pairs = 0;
  plan.first_tasks[0] = 0;
  for (int64_t image = 0; image < plan.call->batch; ++image) {
    const detpost::Ranking& ranking = plan.rankings[image];
    plan.first_tasks[image + 1] = plan.first_tasks[image] + ranking.classes;
    for (int64_t number = 0; number < ranking.classes; ++number) {
      const int64_t count = ranking.starts[number + 1] - ranking.starts[number];
      pairs += count * (count - 1) / 2;
    }
  }
  return pairs;
}

void suppress(const Call& call) {
  const Plan plan{&call, scratch.take<int64_t>(kRanking, call.batch * detpost::ranking_words(call.count)),
                  scratch.take<detpost::Ranking>(kRankings, call.batch),
                  scratch.take<int64_t>(kFirstTasks, call.batch + 1)};
  const int threads = static_cast<int>(call.threads), threads_of_boxes = call.batch * call.count < kManyBoxes ? 1 : threads;
  detpost::start(rank_task, plan, call.batch, threads_of_boxes);
  const int64_t pairs = lay_out_tasks(plan);
  detpost::start(class_task, plan, plan.first_tasks[call.batch], pairs < kManyPairs ? 1 : threads);
  if (call.out_scores) detpost::start(output_task, call, call.batch, threads_of_boxes);
}

}  // namespace

DETPOST_EXPORT int detpost_nms(const char* record) {
  Call call;
  std::memcpy(&call, record, sizeof call);
  const int outcome = detpost::outcome_of([&] { suppress(call); });
  scratch.trim(kMostKept);
  return outcome;
}

#else  // the kernels, once per instruction set

#define DETPOST_INLINE static inline __attribute__((always_inline))

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

#undef DETPOST_INLINE
#endif
