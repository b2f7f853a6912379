// The order in which boxes are taken: image by image, class by class, and in each by score descending, then index ascending,
// NaN last.

#ifndef DETPOST_RANKING_H
#define DETPOST_RANKING_H

#include <cstdint>
#include <cstring>

#include "common.h"

namespace detpost {

enum FloatType : int64_t { kNone = 0, kSingle = 1, kDouble = 2 };

// The boxes of a batch of images, `count` each; the first part of a family's record, addresses as numbers, 0 for none.
struct Lists {
  int64_t batch, count, threads;
  int64_t scores, score_type;  // (batch, count), float32 or float64; none: best first already
  int64_t labels, valid;       // (batch, count), int64 and bool; none: one class, all of them
};

struct Entry {
  uint64_t key;
  int64_t index;
};

// Class c holds order[starts[c]] to order[starts[c + 1]]; boxes that are not valid are in none.
struct Ranking {
  const Entry* order;
  const int64_t* starts;
  int64_t classes;
};

inline size_t ranking_words(int64_t count) { return 2 * count * sizeof(Entry) / 8 + count + 1; }

namespace ranking {

// Integers that ascend where scores descend; -0.0 is 0.0, and NaN is above all.
inline uint64_t descending(float score) {
  score = score == 0.0f ? 0.0f : score;
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return score != score ? 0xFFFFFFFFu : static_cast<uint32_t>(bits >> 31 ? bits : ~(bits | 0x80000000u));
}

inline uint64_t descending(double score) {
  score = score == 0.0 ? 0.0 : score;
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return score != score ? ~uint64_t(0) : bits >> 63 ? bits : ~(bits | uint64_t(1) << 63);
}

// Stable sort by key: a pass for each byte in which the keys differ, and none where they are in order already, as those of
// a detector's output often are. Which of the two arrays holds the result is what comes back.
inline Entry* sort(Entry* from, Entry* to, int64_t count) {
  uint64_t differing = 0;
  bool in_order = true;
  for (int64_t i = 1; i < count; ++i) {
    differing |= from[i].key ^ from[0].key;
    in_order = in_order && from[i - 1].key <= from[i].key;
  }
  for (int shift = 0; shift < 64 && !in_order; shift += 8) {
    if ((differing >> shift & 255) == 0) continue;
    int64_t places[256] = {};
    for (int64_t i = 0; i < count; ++i) ++places[from[i].key >> shift & 255];
    int64_t sum = 0;
    for (int value = 0; value < 256; ++value) {
      const int64_t here = places[value];
      places[value] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) to[places[from[i].key >> shift & 255]++] = from[i];
    Entry* swap = from;
    from = to;
    to = swap;
  }
  return from;
}

}  // namespace ranking

// Ranks the boxes of an image in `memory` of ranking_words(count) words of 8 bytes.
inline Ranking rank(const Lists& of, int64_t image, int64_t* memory) {
  const int64_t first = image * of.count;
  const float* singles = reinterpret_cast<const float*>(of.scores) + first;
  const double* doubles = reinterpret_cast<const double*>(of.scores) + first;
  const int64_t* labels = reinterpret_cast<const int64_t*>(of.labels) + first;
  const uint8_t* valid = reinterpret_cast<const uint8_t*>(of.valid) + first;
  Entry* order = reinterpret_cast<Entry*>(memory);
  Entry* other = order + of.count;
  int64_t* starts = reinterpret_cast<int64_t*>(other + of.count);
  int64_t count = 0;
  for (int64_t i = 0; i < of.count; ++i) {
    if (of.valid && !valid[i]) continue;
    order[count].key = of.score_type == kSingle   ? ranking::descending(singles[i])
                       : of.score_type == kDouble ? ranking::descending(doubles[i])
                                                  : 0;
    order[count++].index = i;
  }
  Entry* sorted = ranking::sort(order, other, count);
  int64_t classes = count > 0;
  if (of.labels) {
    // A second stable sort keeps the order by score inside each class, whatever numbers the labels are.
    for (int64_t i = 0; i < count; ++i) sorted[i].key = static_cast<uint64_t>(labels[sorted[i].index]);
    sorted = ranking::sort(sorted, sorted == order ? other : order, count);
    for (int64_t i = 1; i < count; ++i) {
      if (sorted[i].key != sorted[i - 1].key) starts[classes++] = i;
    }
  }
  starts[0] = 0;
  starts[classes] = count;
  return Ranking{sorted, starts, classes};
}

// Gives back what is beyond 16 MiB a slot, however a call ends.
struct TrimAfter {
  Scratch& scratch;
  ~TrimAfter() { scratch.trim(size_t(1) << 24); }
};

// What is done with the boxes of one class, best first.
using Visit = void (*)(const void* call, int64_t image, const Entry* order, int64_t count);

namespace ranking {

// The rankings of all images; a task is one class of one image.
struct Plan {
  const Lists* lists;
  const void* call;
  Visit visit;
  int64_t* memory;
  Ranking* rankings;
  int64_t* first_tasks;  // of each image, and the end
};

inline void rank_task(const void* data, int64_t image) {
  const Plan& plan = *static_cast<const Plan*>(data);
  plan.rankings[image] = rank(*plan.lists, image, plan.memory + image * ranking_words(plan.lists->count));
}

inline void class_task(const void* data, int64_t task) {
  const Plan& plan = *static_cast<const Plan*>(data);
  int64_t image = 0;
  while (task >= plan.first_tasks[image + 1]) ++image;
  const Ranking& of = plan.rankings[image];
  const int64_t* start = of.starts + (task - plan.first_tasks[image]);
  plan.visit(plan.call, image, of.order + start[0], start[1] - start[0]);
}

// Lays out the tasks; gives the number of pairs that may have to be compared.
inline int64_t lay_out(const Plan& plan) {
  int64_t pairs = 0;
  plan.first_tasks[0] = 0;
  for (int64_t image = 0; image < plan.lists->batch; ++image) {
    const Ranking& of = plan.rankings[image];
    plan.first_tasks[image + 1] = plan.first_tasks[image] + of.classes;
    for (int64_t number = 0; number < of.classes; ++number) {
      const int64_t count = of.starts[number + 1] - of.starts[number];
      pairs += count * (count - 1) / 2;
    }
  }
  return pairs;
}

}  // namespace ranking

// Ranks all images and visits each class of each, on several threads where there is enough to do.
inline void for_each_class(const Lists& lists, const void* call, Visit visit) {
  // Boxes to rank, and pairs to compare, below which waking a thread takes longer than they do.
  constexpr int64_t kManyBoxes = int64_t(1) << 16, kManyPairs = int64_t(1) << 22;
  static thread_local Scratch scratch;
  const TrimAfter after{scratch};
  const ranking::Plan plan{&lists, call, visit,
                           scratch.take<int64_t>(0, lists.batch * ranking_words(lists.count)),
                           scratch.take<Ranking>(1, lists.batch), scratch.take<int64_t>(2, lists.batch + 1)};
  const int threads = static_cast<int>(lists.threads);
  start(ranking::rank_task, plan, lists.batch, lists.batch * lists.count < kManyBoxes ? 1 : threads);
  const int64_t pairs = ranking::lay_out(plan);
  start(ranking::class_task, plan, plan.first_tasks[lists.batch], pairs < kManyPairs ? 1 : threads);
}

}  // namespace detpost

#endif
