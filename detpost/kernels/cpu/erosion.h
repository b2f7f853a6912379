// The erosion loss: k erosions of the squared error, and the gradient back through them.
// Included by native.cpp in the namespace of each instruction set.

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

struct Limits {
  float lower, extent;  // extent 0: the field is flat
};

struct Range {
  float least, greatest;
};

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

struct Extremes {
  Floats least, greatest;
};

static void dilate_plane(const Grid& grid, int64_t plane, const float* bound, float* dilation, float weight,
                         Extremes& extremes) {
  const Rows rows = rows_of_plane(grid, plane);
  Floats least = extremes.least, greatest = extremes.greatest, sum;
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const float* from = bound + grid.row(rows.z, y);
    float* to = dilation + grid.row(rows.z, y);
    int64_t x = 0;
    for (; x + kLanes <= grid.width; x += kLanes) {
      stencil_lanes(grid, from + x, weight, sum);
      store(to + x, sum);
      least = sum < least ? sum : least;
      greatest = sum > greatest ? sum : greatest;
    }
    if (x < grid.width) {
      stencil_lanes(grid, from + x, weight, sum);
      Floats low = sum, high = sum;
      clear_beyond(low, grid.width - x, kInfinity);
      clear_beyond(high, grid.width - x, -kInfinity);
      clear_beyond(sum, grid.width - x, 0.0f);
      store(to + x, sum);
      least = low < least ? low : least;
      greatest = high > greatest ? high : greatest;
    }
  }
  extremes.least = least;
  extremes.greatest = greatest;
}

DETPOST_INLINE Extremes no_extremes() {
  Extremes extremes;
  fill(extremes.least, kInfinity);
  fill(extremes.greatest, -kInfinity);
  return extremes;
}

DETPOST_INLINE Range range_of(const Extremes& extremes) {
  Range range{extremes.least[0], extremes.greatest[0]};
  for (int lane = 1; lane < kLanes; ++lane) {
    range.least = extremes.least[lane] < range.least ? extremes.least[lane] : range.least;
    range.greatest = extremes.greatest[lane] > range.greatest ? extremes.greatest[lane] : range.greatest;
  }
  return range;
}

DETPOST_INLINE Limits limits_of(const Range& range) {
  const float least = range.least > 0.5f ? range.least : 0.5f;
  const float greatest = range.greatest > 0.5f ? range.greatest : 0.5f;
  const float extent = greatest - least;
  return {extent == 0.0f ? 0.5f : least, extent};
}

DETPOST_INLINE void stretch_lanes(Floats& values, const Limits& limits) {
  Floats lower;
  fill(lower, limits.lower);
  values = (values > lower ? values : lower) - lower;
  if (limits.extent == 0.0f) return;
#if DETPOST_FMA
  if (limits.extent > 1e-30f) {
    // A division's own result at a quarter of its time: the product with the inverse, mended by what it leaves over, which
    // a fused multiply-add gives exactly (Markstein 1990).
    const float inverse = 1.0f / limits.extent;
    const Floats product = values * inverse;
    const Floats rest = values - product * limits.extent;
    values = product + rest * inverse;
    return;
  }
#endif
  values = values / limits.extent;
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

// Writes the stretched plane, adds it to `field` (rows without a border) weighted, and to the sum.
static void stretch_plane(const Grid& grid, int64_t plane, const float* dilation, const Limits& limits, float* bound,
                          float* field, float weight, RowSum& total) {
  const Rows rows = rows_of_plane(grid, plane);
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const float* from = dilation + grid.row(rows.z, y);
    float* to = bound + grid.row(rows.z, y);
    Floats sum, values;
    fill(sum, 0.0f);
    for (int64_t x = 0; x < grid.width; x += kLanes) {
      load(values, from + x);
      stretch_lanes(values, limits);
      if (x + kLanes > grid.width) clear_beyond(values, grid.width - x, 0.0f);
      store(to + x, values);
      sum += values;
    }
    add_row(total, sum);
    if (field) {
      float* out = field + (rows.z * grid.height + y) * grid.width;
      for (int64_t x = 0; x < grid.width; ++x) out[x] += weight * to[x];
    }
  }
}

constexpr float kLargestDifference = 1e12f;

DETPOST_INLINE float clamped_difference(float pred, bool is_class) {
  const float difference = pred - (is_class ? 1.0f : 0.0f);
  return difference > kLargestDifference ? kLargestDifference
         : difference < -kLargestDifference ? -kLargestDifference : difference;
}

// Fills `bound` with the squared error; returns whether all of it is numbers.
static bool squared_error(const Grid& grid, const float* pred, const int64_t* target, int64_t number, float* bound) {
  bool numbers = true;
  for (int64_t z = 0; z < grid.depth; ++z) {
    for (int64_t y = 0; y < grid.height; ++y) {
      const int64_t first = (z * grid.height + y) * grid.width;
      float* to = bound + grid.row(z, y);
      int32_t odd = 0;
      for (int64_t x = 0; x < grid.width; ++x) {
        const float difference = clamped_difference(pred[first + x], target[first + x] == number);
        to[x] = difference * difference;
        odd |= difference != difference;
      }
      numbers = numbers && !odd;
    }
  }
  return numbers;
}

// What a stretched element is made of: its height above the lower limit. Its quotient with the range is exactly 1 for the
// range itself alone, and 0 for 0 alone, so that extremes are told without a division.
DETPOST_INLINE void height_lanes(Floats& values, const Limits& limits) {
  Floats lower;
  fill(lower, limits.lower);
  values = (values > lower ? values : lower) - lower;
}

// The sums that the gradients of a stretch's limits are made of.
struct StretchSums {
  RowSum gradient, product, maxima, minima;
};

// Adds a row of them: the gradient that comes back to the stretched row, and the row before the stretch.
DETPOST_INLINE void add_row(const Grid& grid, const float* gradient, const float* dilation, const Limits& limits,
                            StretchSums& total) {
  Floats onto_sum, product, maxima, minima, top, none, one, height, onto;
  fill(none, 0.0f);
  fill(one, 1.0f);
  fill(top, limits.extent == 0.0f ? 1.0f : limits.extent);
  onto_sum = product = maxima = minima = none;
  for (int64_t x = 0; x < grid.width; x += kLanes) {
    load(height, dilation + x);
    load(onto, gradient + x);
    height_lanes(height, limits);
    Floats at_maximum = height >= top ? one : none, at_minimum = height <= none ? one : none;
    if (x + kLanes > grid.width) {
      clear_beyond(at_maximum, grid.width - x, 0.0f);  // `onto` is 0 there
      clear_beyond(at_minimum, grid.width - x, 0.0f);
    }
    onto_sum += onto;
    product += onto * height;
    maxima += at_maximum;
    minima += at_minimum;
  }
  add_row(total.gradient, onto_sum);
  add_row(total.product, product);
  add_row(total.maxima, maxima);
  add_row(total.minima, minima);
}

// How the gradient goes back through a stretch; elements that share an extreme share its gradient equally.
struct StretchShares {
  float scale, per_maximum, per_minimum;
};

DETPOST_INLINE StretchShares shares_of(StretchSums& sums, const Limits& limits) {
  if (limits.extent == 0.0f) return {1.0f, 0.0f, 0.0f};  // the limits of a flat field are constants
  const double scale = 1.0 / limits.extent;
  const double onto_range = -flush(sums.product) * scale * scale;
  const double onto_minimum = -flush(sums.gradient) * scale - onto_range;
  const double maxima = flush(sums.maxima), minima = flush(sums.minima);
  return {static_cast<float>(scale), static_cast<float>(onto_range / (maxima < 1 ? 1 : maxima)),
          static_cast<float>(onto_minimum / (minima < 1 ? 1 : minima))};
}

// In place: from the gradient of the stretched plane to that of the plane before.
static void stretch_back_plane(const Grid& grid, int64_t plane, float* gradient, const float* dilation,
                               const Limits& limits, const StretchShares& shares) {
  const float below_half = 0.5f - std::numeric_limits<float>::epsilon() / 4;  // at the threshold itself all passes
  Floats none, top, values, onto, half, maximum_share, minimum_share;
  fill(none, 0.0f);
  fill(top, limits.extent == 0.0f ? 1.0f : limits.extent);
  fill(half, below_half);
  fill(maximum_share, shares.per_maximum);
  fill(minimum_share, shares.per_minimum);
  const Rows rows = rows_of_plane(grid, plane);
  for (int64_t y = rows.first; y < rows.last; ++y) {
    float* grad = gradient + grid.row(rows.z, y);
    const float* from = dilation + grid.row(rows.z, y);
    for (int64_t x = 0; x < grid.width; x += kLanes) {
      load(values, from + x);
      load(onto, grad + x);
      Floats height = values;
      height_lanes(height, limits);
      onto = onto * shares.scale + (height >= top ? maximum_share : none) + (height <= none ? minimum_share : none);
      onto = values > half ? onto : none;
      if (x + kLanes > grid.width) clear_beyond(onto, grid.width - x, 0.0f);
      store(grad + x, onto);
    }
  }
}

// The stencil is symmetric, so it is its own transpose; `cotangent` (rows without a border, or null for ones) is what
// the loss hands to this step's result directly. Adds the sums of the stretch before it, unless that is null.
static void stencil_back_plane(const Grid& grid, int64_t plane, const float* from, float* to, float stencil_weight,
                               const float* cotangent, float weight, const float* dilation, const Limits* limits,
                               StretchSums& sums) {
  Floats sum, direct;
  const Rows rows = rows_of_plane(grid, plane);
  for (int64_t y = rows.first; y < rows.last; ++y) {
    const float* source = from + grid.row(rows.z, y);
    float* out = to + grid.row(rows.z, y);
    for (int64_t x = 0; x < grid.width; x += kLanes) {
      stencil_lanes(grid, source + x, stencil_weight, sum);
      fill(direct, weight);
      const int64_t valid = grid.width - x < kLanes ? grid.width - x : kLanes;
      if (cotangent) {
        const float* given = cotangent + (rows.z * grid.height + y) * grid.width + x;
        for (int64_t lane = 0; lane < valid; ++lane) direct[lane] = weight * given[lane];
      }
      sum = sum + direct;
      if (valid < kLanes) clear_beyond(sum, valid, 0.0f);
      store(out + x, sum);
    }
    if (dilation) add_row(grid, out, dilation + grid.row(rows.z, y), *limits, sums);
  }
}

DETPOST_INLINE float finite(float value) {
  constexpr float largest = std::numeric_limits<float>::max();
  if (value != value) return 0.0f;
  return value > largest ? largest : value < -largest ? -largest : value;
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

static void fill_rows(const Grid& grid, float* to, const float* cotangent, float weight) {
  for (int64_t z = 0; z < grid.depth; ++z) {
    for (int64_t y = 0; y < grid.height; ++y) {
      float* out = to + grid.row(z, y);
      const float* given = cotangent ? cotangent + (z * grid.height + y) * grid.width : nullptr;
      for (int64_t x = 0; x < grid.width; ++x) out[x] = given ? weight * given[x] : weight;
    }
  }
}

static void erode_field(const void* data, int64_t index) {
  const ErosionArguments& of = *static_cast<const ErosionArguments*>(data);
  const Grid grid{of.depth, of.height, of.width, of.axes};
  const int64_t elements = of.depth * of.height * of.width;
  const float* pred = of.pred + index * elements;
  const int64_t* target = of.target + index / of.classes * elements;
  const int64_t number = index % of.classes;
  float* field = of.field ? of.field + index * elements : nullptr;
  const int64_t size = grid.size();
  const int kept = of.gradient ? of.steps : 2;
  float* bound = scratch.take<float>(0, size);
  float* dilations = scratch.take<float>(1, size * kept);
  Limits* limits = scratch.take<Limits>(2, of.steps);
  std::memset(bound, 0, size * sizeof *bound);
  if (field) std::memset(field, 0, elements * sizeof *field);

  double total = 0;
  const bool numbers = squared_error(grid, pred, target, number, bound);
  if (!numbers) {  // one NaN takes the extremes of its field with it, and these every element
    const float nan = std::numeric_limits<float>::quiet_NaN();
    total = nan;
    for (int64_t i = 0; field && i < elements; ++i) field[i] = nan;
    for (int64_t i = 0; of.gradient && i < elements; ++i) of.gradient[index * elements + i] = 0.0f;
    if (of.totals) of.totals[index] = total;
    return;
  }
  const int64_t planes = planes_of(grid);
  Extremes extremes = no_extremes();
  for (int64_t plane = 0; plane < planes; ++plane) {
    dilate_plane(grid, plane, bound, dilations, of.stencil_weight, extremes);
  }
  for (int step = 0; step < of.steps; ++step) {
    // Two fields take turns where no gradient is wanted, since the one is read while the other is written.
    const float* dilation = dilations + (of.gradient ? step : step % 2) * size;
    float* next = dilations + (of.gradient ? step + 1 : (step + 1) % 2) * size;
    limits[step] = limits_of(range_of(extremes));
    extremes = no_extremes();
    const double weight = of.weights[step];
    const bool is_last = step + 1 == of.steps;
    RowSum sum;
    for (int64_t plane = 0; plane <= planes; ++plane) {
      if (plane < planes) {
        stretch_plane(grid, plane, dilation, limits[step], bound, field, static_cast<float>(weight), sum);
      }
      if (plane > 0 && !is_last) dilate_plane(grid, plane - 1, bound, next, of.stencil_weight, extremes);
    }
    total += weight * flush(sum);
  }
  if (of.totals) of.totals[index] = total;

  if (of.gradient) {
    const float* cotangent = of.cotangent ? of.cotangent + index * elements : nullptr;
    float* gradient = scratch.take<float>(3, size);
    std::memset(gradient, 0, size * sizeof *gradient);
    std::memset(bound, 0, size * sizeof *bound);
    float *from = gradient, *to = bound;
    StretchSums sums;
    fill_rows(grid, from, cotangent, static_cast<float>(of.weights[of.steps - 1]));
    for (int64_t z = 0; z < grid.depth; ++z) {
      for (int64_t y = 0; y < grid.height; ++y) {
        const int64_t at = grid.row(z, y);
        add_row(grid, from + at, dilations + (of.steps - 1) * size + at, limits[of.steps - 1], sums);
      }
    }
    for (int step = of.steps - 1; step >= 0; --step) {
      const float* dilation = dilations + step * size;
      const float* before = step ? dilation - size : nullptr;
      const float weight = step ? static_cast<float>(of.weights[step - 1]) : 0.0f;
      const StretchShares shares = shares_of(sums, limits[step]);
      sums = StretchSums();
      for (int64_t plane = 0; plane <= planes; ++plane) {
        if (plane < planes) stretch_back_plane(grid, plane, from, dilation, limits[step], shares);
        if (plane > 0) {
          stencil_back_plane(grid, plane - 1, from, to, of.stencil_weight, cotangent, weight, before,
                             step ? &limits[step - 1] : nullptr, sums);
        }
      }
      float* swap = from;
      from = to;
      to = swap;
    }
    for (int64_t z = 0; z < grid.depth; ++z) {
      for (int64_t y = 0; y < grid.height; ++y) {
        const int64_t first = (z * grid.height + y) * grid.width;
        const float* at = from + grid.row(z, y);
        float* out = of.gradient + index * elements + first;
        for (int64_t x = 0; x < grid.width; ++x) {
          // Where ranges of one rounding step follow each other the slopes can leave float32: finite all the same.
          out[x] = finite(at[x] * 2.0f * clamped_difference(pred[first + x], target[first + x] == number));
        }
      }
    }
  }
  scratch.trim(size_t(1) << 26);
}
