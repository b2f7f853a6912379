// The distance transform, and the loss that its distances weigh.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

using namespace detpost;

namespace {

thread_local Scratch scratch;

constexpr int64_t kTile = 16;  // neighbouring lines that are worked on together

struct DistanceArguments {
  const void* values;  // (fields, depth, height, width): bytes, or float32 that are inside above the threshold
  int64_t depth, height, width;
  float steps[3];   // along depth, height, width
  int both_sides;   // distance to the other side from either, 0 where there is none
  float threshold;  // of the floats, with both sides
  float* out;       // squared distances
};

struct WeightedErrorArguments {
  const float* values;  // (fields, elements): probabilities, or logits with `sigmoid`
  const float* truth;
  const float* of_truth;  // squared distances of the truth's boundary
  float* of_values;       // those of the prediction's; overwritten with the gradient
  int64_t elements, chunks;  // of a field
  double exponent, factor;   // weight = factor * squared distance ^ exponent
  float limit;
  int sigmoid;
  double* sums;  // (fields, chunks)
};

constexpr int64_t kRowsPerTask = 32;

struct RowsPerTask {
  DistanceArguments of;
  int64_t rows;
};

// Lines along one axis: `out` as (outer, length, lanes), tiles of kTile neighbouring lines.
struct LinesPerTask {
  float* out;
  int64_t length, lanes;
  float step;
  int64_t tiles() const { return (lanes + kTile - 1) / kTile; }
};

}  // namespace

#define DETPOST_FAMILY "distance.h"
#include "levels.h"

DETPOST_EXPORT int detpost_distance(const void* values, int64_t fields, int64_t depth, int64_t height, int64_t width,
                                    float step_depth, float step_height, float step_width, int both_sides,
                                    float threshold, float* out, int threads) {
  return outcome_of([&] {
    const DistanceArguments arguments{values,     depth,     height, width, {step_depth, step_height, step_width},
                                      both_sides, threshold, out};
    const int64_t rows = fields * depth * height;
    if (rows * width < (1 << 14)) threads = 1;
    const RowsPerTask per_row{arguments, rows};
    start(DETPOST_BEST(distance_rows), per_row, (rows + kRowsPerTask - 1) / kRowsPerTask, threads);
    const LinesPerTask columns{out, height, width, step_height};
    start(DETPOST_BEST(distance_lines), columns, fields * depth * columns.tiles(), threads);
    if (depth > 1) {
      const LinesPerTask slices{out, depth, height * width, step_depth};
      start(DETPOST_BEST(distance_lines), slices, fields * slices.tiles(), threads);
    }
    const RowsPerTask finish{arguments, rows};
    if (both_sides) start(DETPOST_BEST(distance_finish), finish, (rows + kRowsPerTask - 1) / kRowsPerTask, threads);
  });
}

DETPOST_EXPORT int detpost_weighted_error(const float* values, const float* truth, const float* of_truth,
                                          float* of_values, int64_t fields, int64_t elements, int64_t chunks,
                                          double exponent, double factor, float limit, int sigmoid, double* sums,
                                          int threads) {
  return outcome_of([&] {
    const WeightedErrorArguments arguments{values,   truth,  of_truth, of_values, elements, chunks,
                                           exponent, factor, limit,    sigmoid,   sums};
    start(DETPOST_BEST(weighted_error), arguments, fields * chunks, fields * elements < (1 << 14) ? 1 : threads);
  });
}
