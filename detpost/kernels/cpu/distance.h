// The distance transform, and the loss that its distances weigh.
// Included by distance.cpp in the namespace of each instruction set.

#include "arithmetic.h"

constexpr int32_t kFar = 1 << 29;

// Squared distance within each row to the nearest element of the other kind: positive inside, negative outside, so that
// one array serves both sides; 0 outside where only the inside is wanted.
static void distance_rows(const void* data, int64_t task) {
  const RowsPerTask& given = *static_cast<const RowsPerTask*>(data);
  const DistanceArguments& of = given.of;
  const int64_t width = of.width;
  const int64_t last = (task + 1) * kRowsPerTask < given.rows ? (task + 1) * kRowsPerTask : given.rows;
  int32_t* distance = scratch.take<int32_t>(0, width);
  uint8_t* inside = scratch.take<uint8_t>(1, width);
  for (int64_t row = task * kRowsPerTask; row < last; ++row) {
    if (of.both_sides) {
      const float* values = static_cast<const float*>(of.values) + row * width;
      for (int64_t x = 0; x < width; ++x) inside[x] = values[x] > of.threshold;
    } else {
      const uint8_t* values = static_cast<const uint8_t*>(of.values) + row * width;
      for (int64_t x = 0; x < width; ++x) inside[x] = values[x] != 0;
    }
    distance[0] = kFar;
    for (int64_t x = 1; x < width; ++x) {
      const int32_t same = inside[x] == inside[x - 1];
      distance[x] = (distance[x - 1] & -same) + 1;
    }
    float* out = of.out + row * width;
    int32_t behind = kFar;
    for (int64_t x = width - 1; x >= 0; --x) {
      if (x < width - 1) behind = (behind & -static_cast<int32_t>(inside[x] == inside[x + 1])) + 1;
      distance[x] = distance[x] < behind ? distance[x] : behind;
    }
    for (int64_t x = 0; x < width; ++x) {
      const float length = static_cast<float>(distance[x]) * of.steps[2];
      const float squared = distance[x] >= kFar ? kInfinity : length * length;
      out[x] = inside[x] ? squared : of.both_sides ? -squared : 0.0f;
    }
  }
}

// min over j of max(sign * f[j], 0) + (step (i - j))^2 for one line of one side, by the lower envelope of the parabolas
// (Felzenszwalb and Huttenlocher 2012): linear whatever the distances are.
static void line_by_envelope(const float* f, int64_t length, float step, float sign, float* out, int32_t* hull,
                             float* starts) {
  int64_t count = 0;
  const double squared_step = static_cast<double>(step) * step;
  for (int64_t q = 0; q < length; ++q) {
    const float own = f[q * kTile] * sign;
    const double height = own > 0.0f ? own : 0.0f;
    if (!(height < kInfinity)) continue;
    float start = -kInfinity;
    while (count) {
      const int64_t v = hull[count - 1];
      const float before = f[v * kTile] * sign;
      const double other = before > 0.0f ? before : 0.0f;
      start = static_cast<float>(((height - other) / squared_step + double(q) * q - double(v) * v) / (2.0 * (q - v)));
      if (start > starts[count - 1]) break;
      --count;
      start = -kInfinity;
    }
    hull[count] = static_cast<int32_t>(q);
    starts[count++] = start;
  }
  int64_t at = 0;
  for (int64_t i = 0; i < length; ++i) {
    if (!count) {
      out[i] = kInfinity;
      continue;
    }
    while (at + 1 < count && starts[at + 1] < static_cast<float>(i)) ++at;
    // A start is rounded: its neighbours may be nearer by that much.
    float best = kInfinity;
    for (int64_t near = at > 0 ? at - 1 : 0; near <= at + 1 && near < count; ++near) {
      const float own = f[hull[near] * kTile] * sign, along = static_cast<float>(i - hull[near]) * step;
      const float value = (own > 0.0f ? own : 0.0f) + along * along;
      best = value < best ? value : best;
    }
    out[i] = best;
  }
}

static void tile_by_envelope(const float* f, int64_t length, float step, float* results) {
  float* inside = scratch.take<float>(3, length);
  float* outside = scratch.take<float>(4, length);
  int32_t* hull = scratch.take<int32_t>(5, length);
  float* starts = scratch.take<float>(6, length);
  for (int64_t lane = 0; lane < kTile; ++lane) {
    bool negative = false;
    for (int64_t i = 0; i < length; ++i) negative = negative || f[i * kTile + lane] < 0.0f;
    line_by_envelope(f + lane, length, step, 1.0f, inside, hull, starts);
    if (negative) line_by_envelope(f + lane, length, step, -1.0f, outside, hull, starts);
    for (int64_t i = 0; i < length; ++i) {
      results[i * kTile + lane] = f[i * kTile + lane] < 0.0f ? -outside[i] : inside[i];
    }
  }
}

// Looking outward from each element, a register of lines at once, until no farther one can be nearer. Gives up where that
// takes long on average: then the envelope is faster.
static bool lanes_by_looking(const float* f, int64_t length, float step, float* results) {
  int64_t looked = 0;
  Floats one, none;
  fill(one, 1.0f);
  fill(none, 0.0f);
  for (int64_t i = 0; i < length; ++i) {
    Floats own, best, other, limit;
    load(own, f + i * kTile);
    const Floats sign = own < none ? -one : one;
    best = own * sign;
    const int64_t most = i > length - 1 - i ? i : length - 1 - i;
    int64_t r = 1;
    for (; r <= most; ++r) {
      const float along = static_cast<float>(r) * step, least = along * along;
      fill(limit, least);
      if (!any_lane(best > limit)) break;
      if (i >= r) {
        load(other, f + (i - r) * kTile);
        other = other * sign;
        other = (other > none ? other : none) + limit;
        best = other < best ? other : best;
      }
      if (i + r < length) {
        load(other, f + (i + r) * kTile);
        other = other * sign;
        other = (other > none ? other : none) + limit;
        best = other < best ? other : best;
      }
    }
    looked += r;
    store(results + i * kTile, best * sign);
    if (looked > 64 * (i + 4)) return false;
  }
  return true;
}

static bool tile_by_looking(const float* f, int64_t length, float step, float* results) {
  for (int64_t lane = 0; lane < kTile; lane += kLanes) {
    if (!lanes_by_looking(f + lane, length, step, results + lane)) return false;
  }
  return true;
}

static void distance_lines(const void* data, int64_t task) {
  const LinesPerTask& of = *static_cast<const LinesPerTask*>(data);
  const int64_t first = task % of.tiles() * kTile;
  const int64_t lanes = of.lanes - first < kTile ? of.lanes - first : kTile;
  float* base = of.out + task / of.tiles() * of.length * of.lanes + first;
  float* f = scratch.take<float>(1, of.length * kTile);
  float* results = scratch.take<float>(2, of.length * kTile);
  for (int64_t i = 0; i < of.length; ++i) {
    for (int64_t lane = 0; lane < kTile; ++lane) f[i * kTile + lane] = lane < lanes ? base[i * of.lanes + lane] : 0.0f;
  }
  if (!tile_by_looking(f, of.length, of.step, results)) tile_by_envelope(f, of.length, of.step, results);
  for (int64_t i = 0; i < of.length; ++i) {
    for (int64_t lane = 0; lane < lanes; ++lane) base[i * of.lanes + lane] = results[i * kTile + lane];
  }
}

// From signed to plain; 0 where the whole field is of one kind.
static void distance_finish(const void* data, int64_t task) {
  const RowsPerTask& given = *static_cast<const RowsPerTask*>(data);
  const int64_t end = (task + 1) * kRowsPerTask < given.rows ? (task + 1) * kRowsPerTask : given.rows;
  float* out = given.of.out;
  for (int64_t i = task * kRowsPerTask * given.of.width; i < end * given.of.width; ++i) {
    const float squared = out[i] < 0.0f ? -out[i] : out[i];
    out[i] = squared < kInfinity ? squared : 0.0f;
  }
}

// The squared error, weighted with the distances to both boundaries, and its gradient; `chunks` tasks to a field.
static void weighted_error(const void* data, int64_t task) {
  const WeightedErrorArguments& of = *static_cast<const WeightedErrorArguments*>(data);
  const int64_t field = task / of.chunks, chunk = task % of.chunks;
  const int64_t first = field * of.elements + chunk * of.elements / of.chunks;
  const int64_t last = field * of.elements + (chunk + 1) * of.elements / of.chunks;
  const bool plain = of.exponent == 1.0;
  const float factor = static_cast<float>(of.factor);
  double total = 0;
  for (int64_t start = first; start < last; start += 1024) {
    const int64_t end = start + 1024 < last ? start + 1024 : last;
    float sum = 0;
    if (!plain) {
      for (int64_t i = start; i < end; ++i) {
        of.of_values[i] = static_cast<float>(of.factor * (std::pow(static_cast<double>(of.of_values[i]), of.exponent) +
                                                          std::pow(static_cast<double>(of.of_truth[i]), of.exponent)));
      }
    } else {
      for (int64_t i = start; i < end; ++i) of.of_values[i] = (of.of_values[i] + of.of_truth[i]) * factor;
    }
    for (int64_t i = start; i < end; ++i) {
      const float weight = of.of_values[i];
      float value = of.values[i], slope = 1.0f;
      if (of.sigmoid) {
        double x = -static_cast<double>(value);
        x = x > 708.0 ? 708.0 : x;
        x = x < -708.0 ? -708.0 : x;
        value = value != value ? value : static_cast<float>(1.0 / (1.0 + exponential(x)));
        slope = value * (1.0f - value);
      }
      const float whole = value - of.truth[i];
      const float cut = whole > of.limit ? of.limit : whole < -of.limit ? -of.limit : whole;
      sum += cut * cut * weight;
      of.of_values[i] = cut == whole ? 2.0f * cut * weight * slope : 0.0f;
    }
    total += sum;
  }
  of.sums[task] = total;
}
