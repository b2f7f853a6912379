// The surfaces of two masks, and how far each element of one is from the nearest of the other.

#include <cstdint>
#include <cstring>

#include "common.h"

using namespace detpost;

namespace {

thread_local Scratch scratch;

constexpr uint16_t kNone = 65535;  // no element of the surface in this row
constexpr int64_t kSampled = 16;   // of so many rows one tells how long the search takes
constexpr int64_t kMostLooked = 3;  // places for each element of the volume: as long as its transform takes

// Of a volume (depth, height, width), one that its elements are taken from.
struct Box {
  int64_t first[3], sides[3];
};

struct EndsArguments {
  const uint8_t *a, *b;  // (depth, height, width), 0 or 1
  int64_t height, width;
  int64_t* ends;  // (depth, 4)
};

struct SurfaceArguments {
  const uint8_t* mask;  // (depth, height, width), 0 or 1
  int64_t depth, height, width;
  Box box;
  int axes;           // 3, or 2 where there is no depth
  uint8_t* surface;   // of the box
  int64_t* counts;    // elements of the surface in each of its rows
};

struct SearchArguments {
  const uint8_t* surface;       // whose elements are asked for (depth, height, width)
  const uint8_t* goal;          // the other surface, of the same shape
  const int64_t* goals;         // how many of its elements are in each row (depth, height)
  int64_t depth, height, width;
  const float* squares[3];      // of 0, 1, 2... elements along each axis
  float step;                   // along the width
  uint16_t* along;              // (depth, height, width): elements to the nearest of the goal in the same row
  const int64_t* firsts;        // (depth, height): where the results of a row begin
  float* out;                   // squared distances, element by element
  int64_t every;                // only one row of so many
  int64_t* looked;              // (depth): how many places were looked at
};

}  // namespace

#define DETPOST_FAMILY "surface.h"
#include "levels.h"

// The smallest box that holds both masks: `box` gets its first element and its sides along depth, height and width; sides
// of 0 where both are empty.
DETPOST_EXPORT int detpost_box_of_masks(const uint8_t* a, const uint8_t* b, int64_t depth, int64_t height, int64_t width,
                                        int64_t* box, int threads) {
  return outcome_of([&] {
    int64_t* ends = scratch.take<int64_t>(0, depth * 4);  // of each slice: rows and columns from and to
    const EndsArguments arguments{a, b, height, width, ends};
    start(DETPOST_BEST(find_ends), arguments, depth, depth * height * width < (1 << 16) ? 1 : threads);
    int64_t first[3] = {depth, height, width}, last[3] = {-1, -1, -1};
    for (int64_t z = 0; z < depth; ++z) {
      const int64_t* of = ends + z * 4;
      if (of[1] < 0) continue;
      first[0] = z < first[0] ? z : first[0];
      last[0] = z;
      for (int axis = 0; axis < 2; ++axis) {
        first[axis + 1] = of[axis * 2] < first[axis + 1] ? of[axis * 2] : first[axis + 1];
        last[axis + 1] = of[axis * 2 + 1] > last[axis + 1] ? of[axis * 2 + 1] : last[axis + 1];
      }
    }
    for (int axis = 0; axis < 3; ++axis) {
      box[axis] = last[0] < 0 ? 0 : first[axis];
      box[axis + 3] = last[0] < 0 ? 0 : last[axis] - first[axis] + 1;
    }
  });
}

// The elements of a mask with a direct neighbour outside it, of a box that holds it; and how many there are in each row.
DETPOST_EXPORT int detpost_surface(const uint8_t* mask, int64_t depth, int64_t height, int64_t width, const int64_t* box,
                                   int axes, uint8_t* surface, int64_t* counts, int threads) {
  return outcome_of([&] {
    SurfaceArguments arguments{mask, depth, height, width, {}, axes, surface, counts};
    std::memcpy(&arguments.box, box, sizeof arguments.box);
    const int64_t* sides = arguments.box.sides;
    start(DETPOST_BEST(find_surface), arguments, sides[0], sides[0] * sides[1] * sides[2] < (1 << 16) ? 1 : threads);
  });
}

// The squared distance of each element of one surface to the nearest of another. `counts` are of the rows of each. Leaves
// `out` alone, and says so in `is_far`, where to search from each element would take longer than to transform the volume.
DETPOST_EXPORT int detpost_surface_distance(const uint8_t* surface, const int64_t* counts, const uint8_t* goal,
                                            const int64_t* goals, int64_t depth, int64_t height, int64_t width,
                                            float step_depth, float step_height, float step_width, float* out,
                                            int* is_far, int threads) {
  return outcome_of([&] {
    const int64_t rows = depth * height, volume = rows * width;
    const int64_t sides[3] = {depth, height, width};
    const float steps[3] = {step_depth, step_height, step_width};
    if (volume < (1 << 16)) threads = 1;
    SearchArguments arguments{surface, goal, goals, depth, height, width, {}, step_width, nullptr, nullptr, out, 0, nullptr};
    for (int axis = 0; axis < 3; ++axis) {
      float* squares = scratch.take<float>(axis, sides[axis]);
      for (int64_t i = 0; i < sides[axis]; ++i) {
        const float length = static_cast<float>(i) * steps[axis];
        squares[i] = length * length;
      }
      arguments.squares[axis] = squares;
    }
    int64_t* firsts = scratch.take<int64_t>(3, rows);
    int64_t total = 0, of_goal = 0;
    for (int64_t row = 0; row < rows; ++row) {
      firsts[row] = total;
      total += counts[row];
      of_goal += goals[row];
    }
    *is_far = 0;
    if (total == 0) return;
    if (of_goal == 0) {
      for (int64_t i = 0; i < total; ++i) out[i] = kInfinity;
      return;
    }
    *is_far = 1;
    if (width >= kNone) return;
    arguments.firsts = firsts;
    arguments.along = scratch.take<uint16_t>(4, volume);
    arguments.looked = scratch.take<int64_t>(5, depth);
    start(DETPOST_BEST(goal_rows), arguments, depth, threads);
    const auto search_one_row_of = [&](int64_t every) {
      arguments.every = every;
      start(DETPOST_BEST(search_rows), arguments, depth, threads);
      int64_t looked = 0;
      for (int64_t z = 0; z < depth; ++z) looked += arguments.looked[z];
      return looked * every;
    };
    if (search_one_row_of(kSampled) <= kMostLooked * volume) {
      search_one_row_of(1);
      *is_far = 0;
    }
    scratch.trim(1 << 22);
  });
}
