// The erosion loss: k erosions of the squared error, and the gradient back through them.
// Included by erosion.cpp in the namespace of each instruction set.
//
// Errors are mostly thin: after an erosion or two most of a field is 0, and stays so. Each row keeps the span of what is
// not, and nothing is computed outside the spans, in either direction: there the stretched field is 0, the gradient is
// what the loss hands out itself, and none of it passes the threshold.
//
// Which elements tie for an extreme is decided up to rounding, as detpost/reference/erosion.py explains.

#include "arithmetic.h"

static void find_range(const int64_t* values, int64_t count, int64_t* range) {
  int64_t least = values[0], greatest = values[0];
  for (int64_t i = 0; i < count; ++i) {
    least = values[i] < least ? values[i] : least;
    greatest = values[i] > greatest ? values[i] : greatest;
  }
  range[0] = least;
  range[1] = greatest;
}

DETPOST_INLINE void multiply_add(Floats& sum, const Floats& value, float weight) { sum = sum + value * weight; }

DETPOST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DETPOST_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// One field with a border of zeros one row and one slice thick and a stride with room for one column on either side.
struct Grid {
  int64_t depth, height, width;
  int axes;
  int64_t stride() const { return (width + 2 + kTile - 1) / kTile * kTile + kTile; }
  int64_t slice() const { return stride() * (height + 2); }
  int64_t size() const { return slice() * (axes == 3 ? depth + 2 : 1) + 2 * kTile; }
  int64_t row(int64_t z, int64_t y) const { return (axes == 3 ? z + 1 : z) * slice() + (y + 1) * stride() + kTile; }
};

// A plane is what a stencil reaches over by one: a row of an image, a slice of a volume. A pass over the planes of one
// field can follow another at a distance of one, while what that one wrote is in the nearest cache.
DETPOST_INLINE int64_t planes_of(const Grid& grid) { return grid.axes == 3 ? grid.depth : grid.height; }

struct Rows {
  int64_t z, first, last;
};

DETPOST_INLINE Rows rows_of_plane(const Grid& grid, int64_t plane) {
  return grid.axes == 3 ? Rows{plane, 0, grid.height} : Rows{0, plane, plane + 1};
}

// Columns [first, last) of a row; none where last is not greater.
struct Span {
  int64_t first, last;
};

constexpr Span kNoSpan{int64_t(1) << 40, 0};  // so far beyond every row that it joins with any other span

DETPOST_INLINE Span joined(const Span& a, const Span& b) { return {smaller(a.first, b.first), greater(a.last, b.last)}; }

// To whole registers: the row has room for the last.
DETPOST_INLINE Span in_registers(const Grid& grid, const Span& span) {
  return {greater(span.first, 0) / kLanes * kLanes, (smaller(span.last, grid.width) + kLanes - 1) / kLanes * kLanes};
}

DETPOST_INLINE int64_t number_of_row(const Grid& grid, int64_t z, int64_t y) { return z * grid.height + y; }

// Where a stencil over this row finds anything of what lies in the spans of a field.
DETPOST_INLINE Span reach(const Grid& grid, const Span* spans, int64_t z, int64_t y) {
  const Span* at = spans + number_of_row(grid, z, y);
  Span found{at->first - 1, at->last + 1};
  if (y > 0) found = joined(found, at[-1]);
  if (y + 1 < grid.height) found = joined(found, at[1]);
  if (z > 0) found = joined(found, *(at - grid.height));
  if (z + 1 < grid.depth) found = joined(found, at[grid.height]);
  return in_registers(grid, found);
}

// What is done with the dilations of one step.
struct Step {
  float lower, extent;       // of the stretch; extent 0: the field is flat
  float top, bottom, half;   // from where on dilations tie with the maximum, the lower limit and the threshold
  bool is_flat;              // the maximum ties with the lower limit
};

struct Extremes {
  Floats least, greatest;
};

DETPOST_INLINE Extremes no_extremes() {
  Extremes extremes;
  fill(extremes.least, kInfinity);
  fill(extremes.greatest, -kInfinity);
  return extremes;
}

// `carried` is the error that the steps before have left, and is taken on to the next one.
DETPOST_INLINE Step step_of(const Extremes& extremes, int axes, double& carried) {
  float least = extremes.least[0], greatest = extremes.greatest[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    least = extremes.least[lane] < least ? extremes.least[lane] : least;
    greatest = extremes.greatest[lane] > greatest ? extremes.greatest[lane] : greatest;
  }
  const float lower = least > 0.5f ? least : 0.5f;
  greatest = greatest > 0.5f ? greatest : 0.5f;
  const float extent = greatest - lower;
  const double step = (2 * axes + 4) * static_cast<double>(std::numeric_limits<float>::epsilon());
  const double slack = carried + step * greatest;
  const Step found{extent == 0.0f ? 0.5f : lower,
                   extent,
                   static_cast<float>(greatest - slack),
                   static_cast<float>(lower + carried + step * lower),
                   static_cast<float>(0.5 - 0.5 * step - carried),
                   extent <= slack};
  const double grown = 0.5 * slack / (extent == 0.0f ? 1.0f : extent);
  carried = grown < 1.0 ? grown : 1.0;
  return found;
}

// What belongs to a field while it is worked on.
struct Field {
  const ErosionArguments& of;
  Grid grid;
  int64_t elements, number;  // number: the class id
  const float* pred;         // rows without a border, as the next three
  const int64_t* target;
  float* sum;              // of the stretched erosions, weighted; or null
  const float* cotangent;  // or null
  float* bound;            // on the grid: what is dilated next
  float* dilations;        // of each step, or of two that take turns where no gradient is wanted
  Span* spans;             // for each step and one before: where the field that it dilates is not 0, or passes the threshold
  Step* steps;
  int alive;  // the steps before the field was 0

  int64_t rows() const { return grid.depth * grid.height; }
  float* dilation(int step) const { return dilations + (of.gradient ? step : step % 2) * grid.size(); }
  Span* spans_before(int step) const { return spans + step * rows(); }
  Span* spans_after(int step) const { return spans + (step + 1) * rows(); }
};

constexpr float kLargestDifference = 1e12f;

DETPOST_INLINE float clamped_difference(float pred, bool is_class) {
  const float difference = pred - (is_class ? 1.0f : 0.0f);
  return difference > kLargestDifference ? kLargestDifference
         : difference < -kLargestDifference ? -kLargestDifference : difference;
}

// Fills a plane of `bound` with the squared error; returns whether all of it is numbers.
static bool squared_error_plane(const Field& field, int64_t plane) {
  const Rows rows = rows_of_plane(field.grid, plane);
  int32_t odd = 0;
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const int64_t first = number_of_row(field.grid, rows.z, y) * field.grid.width;
    const float* pred = field.pred + first;
    const int64_t* target = field.target + first;
    float* to = field.bound + field.grid.row(rows.z, y);
    for (int64_t x = 0; x < field.grid.width; ++x) {
      const float difference = clamped_difference(pred[x], target[x] == field.number);
      to[x] = difference * difference;
      odd |= difference != difference;
    }
  }
  return odd == 0;
}

// Mean over an element and its direct neighbours; taps in memory order, one multiply-add each, as a convolution rounds.
DETPOST_INLINE void stencil_lanes(const Grid& grid, const float* at, float weight, Floats& sum) {
  Floats tap;
  if (grid.axes == 3) {
    load(tap, at - grid.slice());
    sum = tap * weight;
    load(tap, at - grid.stride());
    multiply_add(sum, tap, weight);
  } else {
    load(tap, at - grid.stride());
    sum = tap * weight;
  }
  load(tap, at - 1);
  multiply_add(sum, tap, weight);
  load(tap, at);
  multiply_add(sum, tap, weight);
  load(tap, at + 1);
  multiply_add(sum, tap, weight);
  load(tap, at + grid.stride());
  multiply_add(sum, tap, weight);
  if (grid.axes == 3) {
    load(tap, at + grid.slice());
    multiply_add(sum, tap, weight);
  }
}

// Keeps what lies beyond the row's end out of sums and extremes.
DETPOST_INLINE void clear_beyond(Floats& values, int64_t valid, float filler) {
  for (int64_t lane = valid; lane < kLanes; ++lane) values[lane] = filler;
}

static void dilate_plane(const Field& field, int step, int64_t plane, Extremes& extremes) {
  const Grid& grid = field.grid;
  const Rows rows = rows_of_plane(grid, plane);
  const float weight = field.of.stencil_weight;
  Floats least = extremes.least, greatest = extremes.greatest, sum;
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const Span span = reach(grid, field.spans_before(step), rows.z, y);
    const float* from = field.bound + grid.row(rows.z, y);
    float* to = field.dilation(step) + grid.row(rows.z, y);
    if (span.first > 0 || span.last < grid.width) fill(least, 0.0f);
    int64_t x = span.first;
    for (; x < smaller(span.last, grid.width - kLanes + 1); x += kLanes) {
      stencil_lanes(grid, from + x, weight, sum);
      store(to + x, sum);
      least = sum < least ? sum : least;
      greatest = sum > greatest ? sum : greatest;
    }
    if (x < span.last) {
      stencil_lanes(grid, from + x, weight, sum);
      Floats low = sum;
      clear_beyond(low, grid.width - x, kInfinity);
      clear_beyond(sum, grid.width - x, 0.0f);
      store(to + x, sum);
      least = low < least ? low : least;
      greatest = sum > greatest ? sum : greatest;
    }
  }
  extremes.least = least;
  extremes.greatest = greatest;
}

DETPOST_INLINE double sum_lanes(const Floats& values) {
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += values[lane];
  return sum;
}

// A sum over rows: in lanes, which go into a double every so often, since adding them up takes longer than a short row.
struct RowSum {
  Floats lanes = {};
  double total = 0;
  int rows = 0;
};

DETPOST_INLINE double flush(RowSum& sum) {
  sum.total += sum_lanes(sum.lanes);
  fill(sum.lanes, 0.0f);
  sum.rows = 0;
  return sum.total;
}

DETPOST_INLINE void add_row(RowSum& sum, const Floats& row) {
  sum.lanes += row;
  if (++sum.rows == 32) flush(sum);
}

// Height above the lower limit: what a stretched element is before it is divided by the range.
DETPOST_INLINE void height_lanes(Floats& values, float limit) {
  Floats lower;
  fill(lower, limit);
  values = (values > lower ? values : lower) - lower;
}

DETPOST_INLINE void divide_lanes(Floats& values, float divisor) {
#if DETPOST_FMA
  // A division's own result at a quarter of its time: the product with the inverse, mended by what it leaves over, which
  // a fused multiply-add gives exactly (Markstein 1990).
  const float inverse = 1.0f / divisor;
  const Floats product = values * inverse;
  const Floats rest = values - product * divisor;
  values = product + rest * inverse;
#else
  values = values / divisor;
#endif
}

// Stretches a plane into `bound`, adds it to the sums, and finds its spans. Returns whether there are any.
static bool stretch_plane(const Field& field, int step, int64_t plane, RowSum& total) {
  const Grid& grid = field.grid;
  const Step& limits = field.steps[step];
  const float divisor = limits.extent == 0.0f ? 1.0f : limits.extent;
  const float weight = static_cast<float>(field.of.weights[step]);
  const Rows rows = rows_of_plane(grid, plane);
  Floats half;
  fill(half, limits.half);
  bool any = false;
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const Span span = reach(grid, field.spans_before(step), rows.z, y);
    const float* from = field.dilation(step) + grid.row(rows.z, y);
    float* to = field.bound + grid.row(rows.z, y);
    Span found = kNoSpan;
    Floats sum, values;
    fill(sum, 0.0f);
    for (int64_t x = span.first; x < span.last; x += kLanes) {
      load(values, from + x);
      const uint32_t passes = lane_bits(values >= half);
      height_lanes(values, limits.lower);
      divide_lanes(values, divisor);
      store(to + x, values);
      if (passes == 0) continue;
      sum += values;
      found = joined(found, {x + __builtin_ctz(passes), x + 32 - __builtin_clz(passes)});
    }
    field.spans_after(step)[number_of_row(grid, rows.z, y)] = found;
    if (found.last == 0) continue;
    any = true;
    add_row(total, sum);
    if (field.sum) {
      float* out = field.sum + number_of_row(grid, rows.z, y) * grid.width;
      for (int64_t x = found.first; x < found.last; ++x) out[x] += weight * to[x];
    }
  }
  return any;
}

// All erosions; returns the weighted sum over them and over the elements, which is NaN where one element is: it takes the
// extremes of its field with it, and these every element.
static double erode(Field& field) {
  const int64_t planes = planes_of(field.grid);
  Extremes extremes = no_extremes();
  bool numbers = true;
  for (int64_t plane = 0; plane <= planes; ++plane) {
    if (plane < planes) numbers = squared_error_plane(field, plane) && numbers;
    if (plane > 0) dilate_plane(field, 0, plane - 1, extremes);
  }
  field.alive = 0;
  if (!numbers) return std::numeric_limits<double>::quiet_NaN();
  double total = 0, carried = 0;
  for (int step = 0; step < field.of.steps; ++step) {
    field.steps[step] = step_of(extremes, field.grid.axes, carried);
    extremes = no_extremes();
    RowSum sum;
    bool any = false;
    for (int64_t plane = 0; plane <= planes; ++plane) {
      if (plane < planes) any = stretch_plane(field, step, plane, sum) || any;
      if (plane > 0 && step + 1 < field.of.steps) dilate_plane(field, step + 1, plane - 1, extremes);
    }
    if (!any) break;
    total += field.of.weights[step] * flush(sum);
    field.alive = step + 1;
  }
  return total;
}

// The sums that the gradients of a stretch's limits are made of.
struct StretchSums {
  double gradient = 0;             // of the stretched field, over all its elements
  RowSum product, maxima, higher;  // gradient times height; how many tie with the maximum; how many not with the minimum
};

// How the gradient goes back through a stretch; elements that share an extreme share its gradient equally.
struct StretchShares {
  float scale, per_maximum, per_minimum;
};

static StretchShares shares_of(const Field& field, StretchSums& sums, const Step& limits) {
  if (limits.is_flat) return {1.0f, 0.0f, 0.0f};  // the limits of a flat field are constants
  const double scale = 1.0 / limits.extent;
  const double onto_range = -flush(sums.product) * scale * scale;
  const double onto_minimum = -sums.gradient * scale - onto_range;
  const double maxima = flush(sums.maxima), minima = field.elements - flush(sums.higher);
  return {static_cast<float>(scale), static_cast<float>(onto_range / (maxima < 1 ? 1 : maxima)),
          static_cast<float>(onto_minimum / (minima < 1 ? 1 : minima))};
}

// What the loss hands to the results of one step directly.
DETPOST_INLINE void direct_lanes(const float* cotangent, int64_t valid, float weight, Floats& direct) {
  fill(direct, weight);
  if (!cotangent) return;
  Floats given = {};
  if (valid >= kLanes) {
    load(given, cotangent);
  } else {
    std::memcpy(&given, cotangent, static_cast<size_t>(valid) * sizeof(float));
  }
  direct = direct * given;
}

// Writes the gradient of a plane that a step has stretched, on its spans: what the loss hands out, and what comes back
// through the stencil from the step after it, unless there is none. Adds the plane to the sums.
static void gradient_plane(const Field& field, int step, int64_t plane, const float* from, float* to, const Span* stale,
                           StretchSums& sums) {
  const Grid& grid = field.grid;
  const Step& limits = field.steps[step];
  const float weight = static_cast<float>(field.of.weights[step]);
  const Rows rows = rows_of_plane(grid, plane);
  Floats top, bottom, none, one, onto, direct, height;
  fill(top, limits.top);
  fill(bottom, limits.bottom);
  fill(none, 0.0f);
  fill(one, 1.0f);
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const int64_t at = grid.row(rows.z, y), number = number_of_row(grid, rows.z, y);
    if (stale) {
      const Span old = in_registers(grid, stale[number]);
      for (int64_t x = old.first; x < old.last; x += kLanes) store(to + at + x, none);
    }
    const Span span = in_registers(grid, field.spans_after(step)[number]);
    if (span.first >= span.last) continue;
    const float* cotangent = field.cotangent ? field.cotangent + number * grid.width : nullptr;
    const float* dilation = field.dilation(step) + at;
    Floats product = none, maxima = none, higher = none;
    for (int64_t x = span.first; x < span.last; x += kLanes) {
      direct_lanes(cotangent ? cotangent + x : nullptr, grid.width - x, weight, direct);
      onto = direct;
      if (from) {
        stencil_lanes(grid, from + at + x, field.of.stencil_weight, onto);
        onto += direct;
      }
      store(to + at + x, onto);
      load(height, dilation + x);
      maxima += height >= top ? one : none;
      higher += height > bottom ? one : none;
      height_lanes(height, limits.lower);
      product += onto * height;
    }
    add_row(sums.product, product);
    add_row(sums.maxima, maxima);
    add_row(sums.higher, higher);
  }
}

// The sum over a field of what the stencil makes of another, in parts: a border loses a tap for each side it lies on.
struct Outflow {
  RowSum all, lost;
  double sides = 0;
};

// In place, on the spans: from the gradient of a stretched plane to that of the plane before. What lies in the registers
// of a span and not in the span itself is below the threshold.
static void stretch_back_plane(const Field& field, int step, int64_t plane, float* gradient, const StretchShares& shares,
                               Outflow& outflow) {
  const Grid& grid = field.grid;
  const Step& limits = field.steps[step];
  Floats none, top, bottom, half, maximum_share, minimum_share, values, onto;
  fill(none, 0.0f);
  fill(top, limits.top);
  fill(bottom, limits.bottom);
  fill(half, limits.half);
  fill(maximum_share, shares.per_maximum);
  fill(minimum_share, shares.per_minimum);
  const Rows rows = rows_of_plane(grid, plane);
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const Span span = in_registers(grid, field.spans_after(step)[number_of_row(grid, rows.z, y)]);
    if (span.first >= span.last) continue;
    float* grad = gradient + grid.row(rows.z, y);
    const float* from = field.dilation(step) + grid.row(rows.z, y);
    Floats sum = none;
    for (int64_t x = span.first; x < span.last; x += kLanes) {
      load(values, from + x);
      load(onto, grad + x);
      onto = onto * shares.scale + (values >= top ? maximum_share : none) + (values <= bottom ? minimum_share : none);
      onto = values >= half ? onto : none;
      store(grad + x, onto);
      sum += onto;
    }
    add_row(outflow.all, sum);
    if (y == 0) add_row(outflow.lost, sum);
    if (y + 1 == grid.height) add_row(outflow.lost, sum);
    if (grid.axes == 3 && rows.z == 0) add_row(outflow.lost, sum);
    if (grid.axes == 3 && rows.z + 1 == grid.depth) add_row(outflow.lost, sum);
    if (span.first == 0) outflow.sides += grad[0];
    if (span.last >= grid.width) outflow.sides += grad[grid.width - 1];
  }
}

DETPOST_INLINE float finite(float value) {
  constexpr float largest = std::numeric_limits<float>::max();
  if (value != value) return 0.0f;
  return value > largest ? largest : value < -largest ? -largest : value;
}

// From the gradient of the first dilation to that of the prediction.
static void last_plane(const Field& field, int64_t plane, const float* from, float* gradient) {
  const Grid& grid = field.grid;
  const Rows rows = rows_of_plane(grid, plane);
  Floats onto[1];
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const int64_t first = number_of_row(grid, rows.z, y) * grid.width;
    const Span span = reach(grid, field.spans_after(0), rows.z, y);
    const float* at = from + grid.row(rows.z, y);
    const float* pred = field.pred + first;
    const int64_t* target = field.target + first;
    float* out = gradient + first;
    std::memset(out, 0, static_cast<size_t>(grid.width) * sizeof(float));
    for (int64_t x = span.first; x < span.last; x += kLanes) {
      stencil_lanes(grid, at + x, field.of.stencil_weight, onto[0]);
      const int64_t valid = smaller(kLanes, grid.width - x);
      for (int64_t lane = 0; lane < valid; ++lane) {
        // Where ranges of one rounding step follow each other the slopes can leave float32: finite all the same.
        const float difference = clamped_difference(pred[x + lane], target[x + lane] == field.number);
        out[x + lane] = finite(onto[0][lane] * 2.0f * difference);
      }
    }
  }
}

static double total_cotangent(const Field& field) {
  if (!field.cotangent) return static_cast<double>(field.elements);
  double total = 0;
  for (int64_t i = 0; i < field.elements; ++i) total += field.cotangent[i];
  return total;
}

// Back through all erosions, into `gradient`, rows without a border.
static void back(const Field& field, float* gradient) {
  if (field.alive == 0) {
    std::memset(gradient, 0, static_cast<size_t>(field.elements) * sizeof(float));
    return;
  }
  const int64_t planes = planes_of(field.grid);
  const double handed_out = total_cotangent(field);
  float *from = scratch.take<float>(3, field.grid.size()), *to = field.bound;
  std::memset(from, 0, field.grid.size() * sizeof *from);
  int step = field.alive - 1;
  StretchSums sums;
  sums.gradient = field.of.weights[step] * handed_out;
  for (int64_t plane = 0; plane < planes; ++plane) gradient_plane(field, step, plane, nullptr, from, nullptr, sums);
  // Where each of the two holds what it was filled with before.
  const Span *in_from = field.spans_after(step), *in_to = in_from;
  for (; step >= 0; --step) {
    const StretchShares shares = shares_of(field, sums, field.steps[step]);
    sums = StretchSums();
    Outflow outflow;
    for (int64_t plane = 0; plane <= planes; ++plane) {
      if (plane < planes) stretch_back_plane(field, step, plane, from, shares, outflow);
      if (plane == 0) continue;
      if (step > 0) {
        gradient_plane(field, step - 1, plane - 1, from, to, in_to, sums);
      } else {
        last_plane(field, plane - 1, from, gradient);
      }
    }
    if (step == 0) break;
    const double taps = 2 * field.grid.axes + 1;
    const double flown = taps * flush(outflow.all) - flush(outflow.lost) - outflow.sides;
    sums.gradient = field.of.weights[step - 1] * handed_out + field.of.stencil_weight * flown;
    float* swap = from;
    from = to;
    to = swap;
    in_to = in_from;
    in_from = field.spans_after(step - 1);
  }
}

static void erode_field(const void* data, int64_t index) {
  const ErosionArguments& of = *static_cast<const ErosionArguments*>(data);
  const Grid grid{of.depth, of.height, of.width, of.axes};
  const int64_t elements = of.depth * of.height * of.width, rows = of.depth * of.height, size = grid.size();
  Field field{of,
              grid,
              elements,
              index % of.classes,
              of.pred + index * elements,
              of.target + index / of.classes * elements,
              of.field ? of.field + index * elements : nullptr,
              of.cotangent ? of.cotangent + index * elements : nullptr,
              scratch.take<float>(0, size),
              scratch.take<float>(1, size * (of.gradient ? of.steps : 2)),
              scratch.take<Span>(4, rows * (of.steps + 1)),
              scratch.take<Step>(2, of.steps),
              0};
  std::memset(field.bound, 0, size * sizeof *field.bound);
  for (int64_t row = 0; row < rows; ++row) field.spans[row] = {0, of.width};
  if (field.sum) std::memset(field.sum, 0, elements * sizeof *field.sum);
  const double total = erode(field);
  if (of.totals) of.totals[index] = total;
  for (int64_t i = 0; field.sum && total != total && i < elements; ++i) field.sum[i] = static_cast<float>(total);
  if (of.gradient) back(field, of.gradient + index * elements);
  scratch.trim(size_t(1) << 26);
}

// Multiplies each field by its factor. What leaves float32 stays finite, but a NaN is seen.
static void scale_chunk(const void* data, int64_t task) {
  const ScaleArguments& of = *static_cast<const ScaleArguments*>(data);
  constexpr float largest = std::numeric_limits<float>::max();
  const int64_t field = task / of.chunks, chunk = task % of.chunks;
  const float factor = of.factors[field];
  const int64_t last = field * of.elements + (chunk + 1) * of.elements / of.chunks;
  for (int64_t i = field * of.elements + chunk * of.elements / of.chunks; i < last; ++i) {
    float value = of.values[i] * factor;
    value = value > largest ? largest : value;
    of.out[i] = value < -largest ? -largest : value;
  }
}
