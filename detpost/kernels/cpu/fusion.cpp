// Weighted box fusion (Solovyev, Wang and Gabruseva, Image and Vision Computing 2021).
//
// Boxes are taken best first, class by class. Each joins the cluster whose mean box it overlaps most, if by more than the
// threshold, or begins one. All in doubles but for the mean of two boxes and more, whose sums and quotients are rounded to
// float32: so are those of ensemble-boxes, and that decides between clusters.

#ifndef DETPOST_KERNELS

#include <cstdint>
#include <cstring>
#include <limits>

#include "common.h"
#include "ranking.h"

namespace {

using detpost::Entry;
using detpost::hold;

thread_local detpost::Scratch scratch;

// In the order of fusion.py's record; doubles throughout.
struct Call {
  detpost::Lists lists;  // with scores, which are weights too
  int64_t boxes;         // (batch, count, 4)
  int64_t owners;        // out, (batch, count), int64, all -1: the index of the box that began the cluster of each
  int64_t fused;         // out, as boxes, and a copy of them: mean boxes, where a cluster begins
  int64_t means;         // out, (batch, count), and a copy of the scores: mean scores, where a cluster begins
  double threshold;
};

// The boxes of one class, best first; all but `order` of their image.
struct Group {
  const Entry* order;
  int64_t count;
  const double *boxes, *scores;
  int64_t* owners;
  double *fused, *means;
  double threshold;
};

struct Cluster {
  int64_t index;  // of the box that began it
  int64_t members;
  float sums[4];  // of boxes by their scores
  double total;   // of scores
};

double rounded(double value) { return static_cast<double>(static_cast<float>(value)); }

}  // namespace

#define DETPOST_FAMILY "fusion.cpp"
#include "levels.h"

namespace {

void visit(const void* data, int64_t image, const Entry* order, int64_t count) {
  const Call& call = *static_cast<const Call*>(data);
  const detpost::TrimAfter after{scratch};
  const int64_t first = image * call.lists.count;
  DETPOST_BEST(fuse_class)
  (Group{order, count, reinterpret_cast<const double*>(call.boxes) + 4 * first,
         reinterpret_cast<const double*>(call.lists.scores) + first, reinterpret_cast<int64_t*>(call.owners) + first,
         reinterpret_cast<double*>(call.fused) + 4 * first, reinterpret_cast<double*>(call.means) + first,
         call.threshold});
}

}  // namespace

DETPOST_EXPORT int detpost_fuse(const char* record) {
  return detpost::outcome_of([&] {
    Call call;
    std::memcpy(&call, record, sizeof call);
    detpost::for_each_class(call.lists, &call, visit);
  });
}

#else  // the kernels, once per instruction set

typedef double Doubles __attribute__((vector_size(DETPOST_REGISTER)));
typedef int64_t Places __attribute__((vector_size(DETPOST_REGISTER)));

constexpr int64_t kLanes = DETPOST_REGISTER / 8;

// The mean boxes of a class's clusters in columns. The register behind the last has areas that are no numbers.
struct Columns {
  double* sides[4];
  double* area;
};

static void set_box(const Columns& columns, int64_t at, const double* box) {
  for (int side = 0; side < 4; ++side) columns.sides[side][at] = box[side];
  double area = (box[2] - box[0]) * (box[3] - box[1]);
  hold(area);
  columns.area[at] = area;
}

// The first of the clusters that a box overlaps most, by more than the threshold; -1 for none.
static int64_t best_cluster(const Columns& columns, int64_t count, const double* box, double threshold) {
  const Doubles zero = {};
  const Doubles left = box[0] - zero, top = box[1] - zero, right = box[2] - zero, bottom = box[3] - zero;
  double area = (box[2] - box[0]) * (box[3] - box[1]);
  hold(area);
  Doubles best = threshold - zero;
  Places place = Places{} - 1;
  for (int64_t i = 0; i < count; i += kLanes) {
    Doubles lefts, tops, rights, bottoms, areas;
    std::memcpy(&lefts, columns.sides[0] + i, sizeof lefts);
    std::memcpy(&tops, columns.sides[1] + i, sizeof tops);
    std::memcpy(&rights, columns.sides[2] + i, sizeof rights);
    std::memcpy(&bottoms, columns.sides[3] + i, sizeof bottoms);
    std::memcpy(&areas, columns.area + i, sizeof areas);
    Doubles width = (rights < right ? rights : right) - (lefts > left ? lefts : left);
    Doubles height = (bottoms < bottom ? bottoms : bottom) - (tops > top ? tops : top);
    width = width > zero ? width : zero;
    height = height > zero ? height : zero;
    Doubles shared = width * height;
    hold(shared);
    const Doubles overlap = shared / (areas + area - shared);
    const Places better = overlap > best;
    best = better ? overlap : best;
    place = better ? Places{} + i : place;
  }
  int64_t found = -1;
  double greatest = threshold;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (place[lane] < 0) continue;
    const int64_t here = place[lane] + lane;
    if (best[lane] > greatest || (best[lane] == greatest && here < found)) {
      greatest = best[lane];
      found = here;
    }
  }
  return found;
}

static void fuse_class(const Group& of) {
  const int64_t column = of.count + kLanes;
  double* memory = scratch.take<double>(0, 5 * column);
  Cluster* clusters = scratch.take<Cluster>(1, of.count);
  const Columns columns{{memory, memory + column, memory + 2 * column, memory + 3 * column}, memory + 4 * column};
  for (int64_t lane = 0; lane < kLanes; ++lane) columns.area[lane] = std::numeric_limits<double>::quiet_NaN();
  int64_t count = 0;
  for (int64_t i = 0; i < of.count; ++i) {
    const int64_t index = of.order[i].index;
    const double* box = of.boxes + 4 * index;
    const double score = of.scores[index];
    int64_t at = best_cluster(columns, count, box, of.threshold);
    if (at < 0) {
      at = count++;
      clusters[at] = Cluster{index, 0, {}, 0.0};
      set_box(columns, at, box);
      columns.area[at + kLanes] = std::numeric_limits<double>::quiet_NaN();
    }
    Cluster& cluster = clusters[at];
    for (int side = 0; side < 4; ++side) {
      double weighted = score * box[side];
      hold(weighted);
      cluster.sums[side] = static_cast<float>(cluster.sums[side] + weighted);
    }
    cluster.total += score;
    of.owners[index] = cluster.index;
    if (++cluster.members == 1) continue;
    of.means[cluster.index] = rounded(cluster.total / cluster.members);
    if (cluster.total == 0.0) continue;  // nothing to weigh by: the box that began it stays
    double* mean = of.fused + 4 * cluster.index;
    for (int side = 0; side < 4; ++side) mean[side] = rounded(cluster.sums[side] / cluster.total);
    set_box(columns, at, mean);
  }
}

#endif
