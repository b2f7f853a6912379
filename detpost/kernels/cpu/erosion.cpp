// The erosion loss, its gradient, and what it does to whole fields.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common.h"

using namespace detpost;

namespace {

thread_local Scratch scratch;

constexpr int64_t kTile = 16;  // floats of the widest register, to which rows are padded

struct ErosionArguments {
  const float* pred;       // (batch, classes, depth, height, width), contiguous
  const int64_t* target;   // (batch, depth, height, width)
  int64_t classes, depth, height, width;  // depth 1 and `axes` 2 for images
  int axes;
  float stencil_weight;
  const double* weights;  // (steps)
  int steps;
  double* totals;        // (batch * classes): weighted sum over each field; or null
  float* field;          // as pred: the weighted sum of the erosions; or null
  const float* cotangent;  // as pred: gradient of `field`; or null for all ones
  float* gradient;         // as pred; or null
};

struct ScaleArguments {
  const float* values;   // (fields, elements)
  const float* factors;  // (fields)
  int64_t elements, chunks;
  float* out;
};

}  // namespace

#define DETPOST_FAMILY "erosion.h"
#include "levels.h"

DETPOST_EXPORT int detpost_erosion(const float* pred, const int64_t* target, int64_t batch, int64_t classes,
                                   int64_t depth, int64_t height, int64_t width, int axes, float stencil_weight,
                                   const double* weights, int steps, double* totals, float* field,
                                   const float* cotangent, float* gradient, int threads) {
  return outcome_of([&] {
    const ErosionArguments arguments{pred, target, classes, depth,  height, width,     axes,    stencil_weight,
                                     weights, steps, totals,  field, cotangent, gradient};
    start(DETPOST_BEST(erode_field), arguments, batch * classes, threads);
  });
}

DETPOST_EXPORT int detpost_scale(const float* values, const float* factors, int64_t fields, int64_t elements,
                                 float* out, int threads) {
  return outcome_of([&] {
    const int64_t chunks = (elements + (1 << 14) - 1) >> 14;
    const ScaleArguments arguments{values, factors, elements, chunks, out};
    start(DETPOST_BEST(scale_chunk), arguments, fields * chunks, fields * elements < (1 << 15) ? 1 : threads);
  });
}

// The least and the greatest of `count` numbers, at least one.
DETPOST_EXPORT int detpost_range(const int64_t* values, int64_t count, int64_t* range) {
  return outcome_of([&] { DETPOST_BEST(find_range)(values, count, range); });
}
