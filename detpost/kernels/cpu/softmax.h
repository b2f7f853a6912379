// Softmax scores, to the bits of detpost/reference/softmax.py, which says why each step is what it is.
// Included by decode.h in the namespace of each instruction set.

constexpr float kStepsOfLogit = 4194304.0f;  // 2^22
constexpr float kMostSteps = 268435456.0f;   // 64 logits
constexpr float kNearSteps = 134217728.0f;   // 32 logits

// exp(-steps / 2^22), of steps from 0 to `kMostSteps`. In whole numbers: 11 bits of a step count choose from one table, 8
// from the other, and the last 10 are what stands between two entries. The product before the difference is exact.
DETPOST_INLINE Floats weights_by_tables(const Floats& steps) {
  const Ints whole = __builtin_convertvector(steps, Ints);
  const Ints coarse = whole >> 18, fine = whole >> 10 & 255;
  Floats products;
  for (int lane = 0; lane < kLanes; ++lane) {
    products[lane] = kSoftmaxTables.coarse[coarse[lane]] * kSoftmaxTables.fine[fine[lane]];
  }
  return products * (1.0f - __builtin_convertvector(whole & 1023, Floats) / kStepsOfLogit);
}

#if DETPOST_FMA
#if DETPOST_REGISTER == 64
DETPOST_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c) { return _mm512_fmadd_ps(a, b, c); }

// The entries of a table of 16, by the lowest four bits of each place, or of 32, by the lowest five.
DETPOST_INLINE Floats sixteenth(const float* table, const Ints& places) {
  return _mm512_maskz_permutexvar_ps(0xFFFF, reinterpret_cast<__m512i>(places), _mm512_loadu_ps(table));
}
DETPOST_INLINE Floats thirty_second(const float* table, const Ints& places) {
  return _mm512_permutex2var_ps(_mm512_loadu_ps(table), reinterpret_cast<__m512i>(places), _mm512_loadu_ps(table + 16));
}

DETPOST_INLINE Floats coarse_weights(const Ints& entries) {
  const SoftmaxTables& of = kSoftmaxTables;
  const Ints logits = entries >> 4;
  const Floats high = thirty_second(of.logits.high, logits), low = thirty_second(of.logits.low, logits);
  const Floats part = sixteenth(of.sixteenths.high, entries), rest = sixteenth(of.sixteenths.low, entries);
  return fused(high, part, fused(low, part, high * rest));
}
#else
DETPOST_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c) { return _mm256_fmadd_ps(a, b, c); }

// The entries of a table of 8, by the lowest three bits of each place.
DETPOST_INLINE Floats eighth(const float* table, const Ints& places) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), reinterpret_cast<__m256i>(places));
}

DETPOST_INLINE Floats coarse_weights(const Ints& entries) {
  const SoftmaxTables& of = kSoftmaxTables;
  const Ints halves = entries >> 3, fours = entries >> 6;
  const Floats high = eighth(of.fours.high, fours), low = eighth(of.fours.low, fours);
  const Floats half = eighth(of.halves.high, halves), half_rest = eighth(of.halves.low, halves);
  const Floats part = eighth(of.sixteenths.high, entries), part_rest = eighth(of.sixteenths.low, entries);
  const Floats product = high * half;
  const Floats lost = fused(low, half, fused(high, half_rest, fused(high, half, -product)));
  return fused(product, part, fused(lost, part, product * part_rest));
}
#endif

// The same of steps below `kNearSteps`, with no look-up in memory: the processors' gathers are slower than all of this.
// A coarse entry is a product of numbers in two parts each, a fine one a polynomial; each comes out as the table has it,
// as tests/kernels/cpu/test_softmax.py tries for every pair of entries.
DETPOST_INLINE Floats near_weights(const Floats& steps) {
  const Ints whole = __builtin_convertvector(steps, Ints);
  const Floats coarse = coarse_weights(whole >> 18);
  const Floats j = __builtin_convertvector(whole >> 10 & 255, Floats);
  const Floats none = {};
  const Floats line = fused(j, none - 0x1p-12f, none + 1.0f);
  const Floats curve = fused(fused(none + 0x1.5188p-53f, j, none - 0x1.5558e2p-39f), j, none + 0x1.000006p-25f);
  const Floats fine = fused(j * j, curve, line);
  return coarse * fine * (1.0f - __builtin_convertvector(whole & 1023, Floats) / kStepsOfLogit);
}
#endif

// exp(-gap) of gaps from 0 to infinity.
DETPOST_INLINE Floats weights_of(const Floats& gaps) {
  const Floats scaled = gaps * kStepsOfLogit;
  const Floats steps = scaled < kMostSteps ? scaled : kMostSteps - (Floats){};
#if DETPOST_FMA
  if (!any_lane(steps >= kNearSteps)) return near_weights(steps);
#endif
  return weights_by_tables(steps);
}

// The same for a sum: what lies 32 logits below and more is below its last limb, and any weight as small stands for it.
DETPOST_INLINE Floats summands_of(const Floats& gaps) {
#if DETPOST_FMA
  constexpr float kLeast = kNearSteps - 8.0f;
  const Floats scaled = gaps * kStepsOfLogit;
  return near_weights(scaled < kLeast ? scaled : kLeast - (Floats){});
#else
  return weights_of(gaps);
#endif
}

// Weights are summed in limbs so short that a sum over the classes is exact, whatever its order.
struct Limbs {
  int bits, count;
  explicit Limbs(int64_t classes) : bits(24) {
    while (bits > 1 && int64_t(1) << (24 - bits) < classes) --bits;
    count = 46 / bits;
  }
};

constexpr int kMostLimbs = 46;

// The last elements of a row of `width`, fewer than a register holds, from `first` on; what is not of them is -inf. Gives
// the lane in which the first of them stands.
DETPOST_INLINE int64_t load_last(Floats& values, const float* row, int64_t first, int64_t width) {
  if (width < kLanes) {
    fill(values, -kInfinity);
    for (int64_t lane = 0; lane < width; ++lane) values[lane] = row[lane];
    return 0;
  }
  load(values, row + width - kLanes);
  const int32_t skipped = static_cast<int32_t>(kLanes - (width - first));
  Ints lanes;
  for (int32_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  values = lanes < skipped ? -kInfinity - (Floats){} : values;
  return skipped;
}

DETPOST_INLINE void add_limbs(Ints* sums, int count, float scale, const Floats& weights) {
  Floats rest = weights;
  for (int limb = 0; limb < count; ++limb) {
    const Floats scaled = rest * scale;
    const Ints whole = __builtin_convertvector(scaled, Ints);
    sums[limb] += whole;
    rest = scaled - __builtin_convertvector(whole, Floats);
  }
}

constexpr int64_t kLooksEvery = 8 * kLanes;  // a power of two

// The sum of the weights of a query's classes, whose greatest logit is a finite `peak`. `count` limbs, a constant where the
// loop over them is to be unrolled. `weights` receives the weights themselves, where they are kept; where they are not, a
// part of the sum will do that is `enough`.
template <bool kKeeps>
DETPOST_INLINE float sum_weights(const float* logits, int64_t classes, float peak, const Limbs& limbs, int count,
                                 float* weights, float enough) {
  Ints sums[kMostLimbs];
  for (int limb = 0; limb < count; ++limb) sums[limb] = (Ints){};
  const float scale = static_cast<float>(1 << limbs.bits);
  Floats values, shares;
  int64_t first = 0;
  for (; first + kLanes <= classes; first += kLanes) {
    load(values, logits + first);
    shares = kKeeps ? weights_of(peak - values) : summands_of(peak - values);
    add_limbs(sums, count, scale, shares);
    if (kKeeps) store(weights + first, shares);
    if (kKeeps || (first & (kLooksEvery - 1)) != 0) continue;
    int32_t sum = 0;  // of the greatest limb alone, rounded down: never more than the whole sum
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[0][lane];
    if (static_cast<float>(sum) >= enough * scale) return static_cast<float>(sum) / scale;
  }
  if (first < classes) {
    const int64_t skipped = load_last(values, logits, first, classes);
    shares = kKeeps ? weights_of(peak - values) : summands_of(peak - values);
    add_limbs(sums, count, scale, shares);
    for (int64_t i = first; kKeeps && i < classes; ++i) weights[i] = shares[skipped + i - first];
  }
  float total = 0.0f;
  for (int limb = count - 1; limb >= 0; --limb) {
    int32_t sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[limb][lane];
    total = static_cast<float>(sum) + total / scale;  // an exact quotient: the sum alone rounds
  }
  total = total / scale;
  return total < 1.0f ? 1.0f : total;
}

// A greatest logit of +inf has all the probability, and shares it with its equals.
static float sum_of_infinite(const float* logits, int64_t classes, float* weights) {
  int64_t count = 0;
  for (int64_t i = 0; i < classes; ++i) {
    count += logits[i] == kInfinity;
    if (weights) weights[i] = logits[i] == kInfinity ? 1.0f : 0.0f;
  }
  return static_cast<float>(count);
}

template <bool kKeeps>
DETPOST_INLINE float total_weight(const float* logits, int64_t classes, float peak, const Limbs& limbs, float* weights,
                                  float enough) {
  if (peak == kInfinity) return sum_of_infinite(logits, classes, kKeeps ? weights : nullptr);
  if (peak == -kInfinity) peak = 0.0f;
  if (limbs.count == 2) return sum_weights<kKeeps>(logits, classes, peak, limbs, 2, weights, enough);
  if (limbs.count == 3) return sum_weights<kKeeps>(logits, classes, peak, limbs, 3, weights, enough);
  return sum_weights<kKeeps>(logits, classes, peak, limbs, limbs.count, weights, enough);
}

struct Greatest {
  float value;  // -inf where none is a number
  bool has_nan;
};

static Greatest greatest_of(const float* logits, int64_t count) {
  Floats best, values;
  fill(best, -kInfinity);
  Ints is_nan = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    load(values, logits + i);
    is_nan |= values != values;
    best = values > best ? values : best;
  }
  if (i < count) {
    load_last(values, logits, i, count);
    is_nan |= values != values;
    best = values > best ? values : best;
  }
  return {greatest_lane(best), any_lane(is_nan)};
}

// The first place of a number in logits[first, last), or `last`.
static int64_t first_place(const float* logits, int64_t first, int64_t last, float number) {
  Floats values;
  for (; first + kLanes <= last; first += kLanes) {
    load(values, logits + first);
    const uint32_t equal = lane_bits(values == number);
    if (equal) return first + __builtin_ctz(equal);
  }
  while (first < last && logits[first] != number) ++first;
  return first;
}
