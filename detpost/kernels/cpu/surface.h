// Where the surface of a mask is, and the search for the nearest element of another.
// Included by surface.cpp in the namespace of each instruction set.

#include "arithmetic.h"

// Whether one of `count` bytes is set.
DETPOST_INLINE bool any_of(const uint8_t* values, int64_t count) {
  uint64_t word = 0, some = 0;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    std::memcpy(&word, values + i, 8);
    some |= word;
  }
  for (; i < count; ++i) some |= values[i];
  return some != 0;
}

// Of a slice: its first and last row and its first and last column with an element of either mask; a last row of -1 where
// there is none.
static void find_ends(const void* data, int64_t slice) {
  const EndsArguments& of = *static_cast<const EndsArguments*>(data);
  const int64_t size = of.height * of.width;
  const uint8_t *a = of.a + slice * size, *b = of.b + slice * size;
  int64_t* ends = of.ends + slice * 4;
  ends[0] = of.height, ends[1] = -1, ends[2] = of.width, ends[3] = -1;
  for (int64_t y = 0; y < of.height; ++y) {
    const uint8_t *first = a + y * of.width, *second = b + y * of.width;
    if (!any_of(first, of.width) && !any_of(second, of.width)) continue;
    ends[0] = y < ends[0] ? y : ends[0];
    ends[1] = y;
    // Only what lies beyond the ends that are known is looked at.
    for (int64_t x = 0; x < ends[2]; ++x) {
      if (first[x] | second[x]) ends[2] = x;
    }
    for (int64_t x = of.width - 1; x > ends[3]; --x) {
      if (first[x] | second[x]) ends[3] = x;
    }
  }
}

static void find_surface(const void* data, int64_t slice) {
  const SurfaceArguments& of = *static_cast<const SurfaceArguments*>(data);
  const int64_t height = of.box.sides[1], width = of.box.sides[2];
  const int64_t z = of.box.first[0] + slice;
  const uint8_t* none = static_cast<const uint8_t*>(std::memset(scratch.take<uint8_t>(6, width + 2), 0, width + 2));
  uint8_t* padded = static_cast<uint8_t*>(std::memset(scratch.take<uint8_t>(7, width + 2), 0, width + 2));
  const auto row_at = [&](int64_t depth, int64_t y) {
    const bool is_there = depth >= 0 && depth < of.depth && y >= 0 && y < of.height;
    return is_there ? of.mask + (depth * of.height + y) * of.width + of.box.first[2] : none;
  };
  for (int64_t row = 0; row < height; ++row) {
    const int64_t y = of.box.first[1] + row;
    const uint8_t *own = row_at(z, y), *above = row_at(z, y - 1), *below = row_at(z, y + 1);
    const uint8_t* before = of.axes == 3 ? row_at(z - 1, y) : own;
    const uint8_t* behind = of.axes == 3 ? row_at(z + 1, y) : own;
    uint8_t* out = of.surface + (slice * height + row) * width;
    int64_t count = 0;
    if (any_of(own, width)) {
      std::memcpy(padded + 1, own, width);
      for (int64_t x = 0; x < width; ++x) {
        const uint8_t inner = padded[x] & padded[x + 2] & above[x] & below[x] & before[x] & behind[x];
        out[x] = own[x] & (inner ^ 1);
      }
      for (int64_t x = 0; x < width; ++x) count += out[x];
    } else {
      std::memset(out, 0, width);
    }
    of.counts[slice * height + row] = count;
  }
}

// In each row of a slice that has some of the goal, how many elements away the nearest is.
static void goal_rows(const void* data, int64_t slice) {
  const SearchArguments& of = *static_cast<const SearchArguments*>(data);
  for (int64_t row = slice * of.height; row < (slice + 1) * of.height; ++row) {
    if (of.goals[row] == 0) continue;  // nobody reads it
    const uint8_t* goal = of.goal + row * of.width;
    uint16_t* along = of.along + row * of.width;
    int32_t behind = kNone;
    for (int64_t x = 0; x < of.width; ++x) {
      behind = goal[x] ? 0 : behind + 1;
      along[x] = static_cast<uint16_t>(behind < kNone ? behind : kNone);
    }
    behind = kNone;
    for (int64_t x = of.width - 1; x >= 0; --x) {
      behind = goal[x] ? 0 : behind + 1;
      along[x] = along[x] < behind ? along[x] : static_cast<uint16_t>(behind);
    }
  }
}

// The least squared distance below `best` from one element to the goal, or `best`. Slices and rows are looked at from near
// to far, until no farther one can be nearer.
DETPOST_INLINE float search(const SearchArguments& of, int64_t z, int64_t y, int64_t x, float best, int64_t& looked) {
  const int64_t farthest_slice = z > of.depth - 1 - z ? z : of.depth - 1 - z;
  const int64_t farthest_row = y > of.height - 1 - y ? y : of.height - 1 - y;
  for (int64_t dz = 0; dz <= farthest_slice; ++dz) {
    const float of_slices = of.squares[0][dz];
    if (!(of_slices < best)) break;
    for (int side = 0; side < (dz ? 2 : 1); ++side) {
      const int64_t slice = side ? z + dz : z - dz;
      if (slice < 0 || slice >= of.depth) continue;
      const int64_t first = slice * of.height;
      for (int64_t dy = 0; dy <= farthest_row; ++dy) {
        const float of_rows = of.squares[1][dy];
        if (!(of_rows + of_slices < best)) break;
        for (int other = 0; other < (dy ? 2 : 1); ++other) {
          const int64_t row = other ? y + dy : y - dy;
          if (row < 0 || row >= of.height) continue;
          ++looked;
          if (of.goals[first + row] == 0) continue;
          const float squared = of.squares[2][of.along[(first + row) * of.width + x]] + of_rows + of_slices;
          best = squared < best ? squared : best;
        }
      }
    }
  }
  return best;
}

static void search_rows(const void* data, int64_t slice) {
  const SearchArguments& of = *static_cast<const SearchArguments*>(data);
  int64_t looked = 0;
  for (int64_t y = 0; y < of.height; ++y) {
    const int64_t row = slice * of.height + y;
    const uint8_t* surface = of.surface + row * of.width;
    if (row % of.every || !any_of(surface, of.width)) continue;
    float* out = of.out + of.firsts[row];
    int64_t before = -1;
    float nearest = 0;
    for (int64_t x = 0; x < of.width; ++x) {
      if (!surface[x]) continue;
      // The element before is so far from the goal: this one is no farther than that and the way between them.
      float bound = kInfinity;
      if (before >= 0) {
        const float way = __builtin_sqrtf(nearest) + static_cast<float>(x - before) * of.step;
        bound = way * way * 1.00001f + 1e-30f;
      }
      nearest = search(of, slice, y, x, bound, looked);
      *out++ = nearest;
      before = x;
    }
  }
  of.looked[slice] = looked;
}
