// The order in which the boxes of an image are taken: class by class, and in each by score descending, then index
// ascending, NaN last.

#ifndef DETPOST_RANKING_H
#define DETPOST_RANKING_H

#include <cstdint>
#include <cstring>

namespace detpost {

enum FloatType : int64_t { kNone = 0, kSingle = 1, kDouble = 2 };

// One image's boxes, `count` of them. No scores: they are in order. No labels: they are of one class.
struct Ranked {
  const void* scores;
  int64_t score_type;
  const int64_t* labels;
  const uint8_t* valid;  // or null: all are
  int64_t count;
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

// Ranks in `memory` of ranking_words(count) words of 8 bytes.
inline Ranking rank(const Ranked& of, int64_t* memory) {
  Entry* order = reinterpret_cast<Entry*>(memory);
  Entry* other = order + of.count;
  int64_t* starts = reinterpret_cast<int64_t*>(other + of.count);
  int64_t count = 0;
  for (int64_t i = 0; i < of.count; ++i) {
    if (of.valid && !of.valid[i]) continue;
    order[count].key = of.score_type == kSingle   ? ranking::descending(static_cast<const float*>(of.scores)[i])
                       : of.score_type == kDouble ? ranking::descending(static_cast<const double*>(of.scores)[i])
                                                  : 0;
    order[count++].index = i;
  }
  Entry* sorted = ranking::sort(order, other, count);
  int64_t classes = count > 0;
  if (of.labels) {
    // A second stable sort keeps the order by score inside each class, whatever numbers the labels are.
    for (int64_t i = 0; i < count; ++i) sorted[i].key = static_cast<uint64_t>(of.labels[sorted[i].index]);
    sorted = ranking::sort(sorted, sorted == order ? other : order, count);
    for (int64_t i = 1; i < count; ++i) {
      if (sorted[i].key != sorted[i - 1].key) starts[classes++] = i;
    }
  }
  starts[0] = 0;
  starts[classes] = count;
  return Ranking{sorted, starts, classes};
}

}  // namespace detpost

#endif
