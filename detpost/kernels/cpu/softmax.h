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
// The three factors of steps below `kNearSteps`, with no look-up in memory: the processors' gathers are slower than all of
// this. A coarse entry is a product of numbers in two parts each, a fine one a polynomial; each comes out as the table has
// it, as tests/kernels/cpu/test_softmax.py tries for every pair of entries.
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

DETPOST_INLINE Floats fine_weights(const Ints& entries) {
  const Floats j = __builtin_convertvector(entries, Floats);
  const Floats none = {};
  const Floats line = fused(j, none - 0x1p-12f, none + 1.0f);
  const Floats curve = fused(fused(none + 0x1.5188p-53f, j, none - 0x1.5558e2p-39f), j, none + 0x1.000006p-25f);
  return fused(j * j, curve, line);
}

DETPOST_INLINE Floats rest_weights(const Ints& rest) { return 1.0f - __builtin_convertvector(rest, Floats) / kStepsOfLogit; }
#endif

// Registers that take each step side by side: one alone would wait for the result of every step before.
constexpr int kTogether = DETPOST_FMA ? 8 : 1;
// They stay registers only where the loops over them are unrolled.
#define DETPOST_TOGETHER _Pragma("GCC unroll 8")

// exp(-gap) of gaps from 0 to infinity in `kCount` registers, in place; `kNear`: all gaps are below 32.
template <int kCount, bool kNear>
DETPOST_INLINE void weights_from_steps(Floats* steps) {
#if DETPOST_FMA
  if (kNear) {
    Ints whole[kCount];
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) whole[i] = __builtin_convertvector(steps[i], Ints);
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) steps[i] = coarse_weights(whole[i] >> 18);
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) steps[i] *= fine_weights(whole[i] >> 10 & 255);
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) steps[i] *= rest_weights(whole[i] & 1023);
    return;
  }
#endif
  DETPOST_TOGETHER
  for (int i = 0; i < kCount; ++i) steps[i] = weights_by_tables(steps[i]);
}

template <int kCount>
DETPOST_INLINE void weights_of(Floats* gaps) {
  Ints are_far = {};
  DETPOST_TOGETHER
  for (int i = 0; i < kCount; ++i) {
    const Floats scaled = gaps[i] * kStepsOfLogit;
    gaps[i] = scaled < kMostSteps ? scaled : kMostSteps - (Floats){};
    are_far |= gaps[i] >= kNearSteps;
  }
  if (any_lane(are_far)) {
    weights_from_steps<kCount, false>(gaps);
  } else {
    weights_from_steps<kCount, true>(gaps);
  }
}

// The same for a sum: what lies 32 logits below and more is below its last limb, and any weight as small stands for it.
template <int kCount>
DETPOST_INLINE void summands_of(Floats* gaps) {
  constexpr float kMost = DETPOST_FMA ? kNearSteps - 8.0f : kMostSteps;
  DETPOST_TOGETHER
  for (int i = 0; i < kCount; ++i) {
    const Floats scaled = gaps[i] * kStepsOfLogit;
    gaps[i] = scaled < kMost ? scaled : kMost - (Floats){};
  }
  weights_from_steps<kCount, true>(gaps);
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

// Adds `kCount` registers of weights, which it spends. `count` limbs, a constant where the loop is to be unrolled.
template <int kCount>
DETPOST_INLINE void add_limbs(Ints* sums, int count, int bits, Floats* weights) {
  constexpr int kFew = kCount < 4 ? kCount : 4;
  const float scale = static_cast<float>(1 << bits);
  if (count == 3) {  // of up to 15 bits: the last two are summed as one, and told apart before four of them could overflow
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) {
      weights[i] *= scale;
      const Ints whole = __builtin_convertvector(weights[i], Ints);
      sums[0] += whole;
      weights[i] -= __builtin_convertvector(whole, Floats);
    }
    for (int first = 0; first < kCount; first += kFew) {
      Words both = {};
      DETPOST_TOGETHER
      for (int i = first; i < first + kFew; ++i) {
        both += reinterpret_cast<Words>(__builtin_convertvector(weights[i] * (scale * scale), Ints));
      }
      sums[1] += reinterpret_cast<Ints>(both >> bits);
      sums[2] += reinterpret_cast<Ints>(both & ((1u << bits) - 1));
    }
    return;
  }
  for (int limb = 0; limb < count; ++limb) {
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) {
      weights[i] *= scale;
      const Ints whole = __builtin_convertvector(weights[i], Ints);
      sums[limb] += whole;
      weights[i] -= __builtin_convertvector(whole, Floats);
    }
  }
}

// Weighs `kCount` registers of logits from `first` on and adds them; the last may reach beyond the row, but where `kWhole`.
// `kept` receives the weights, or is null.
template <int kCount, bool kWhole>
DETPOST_INLINE void add_registers(Ints* sums, int count, int bits, const float* logits, int64_t first, int64_t classes,
                                  float peak, float* kept) {
  constexpr int kLast = kCount - 1;
  const int64_t begin = first + kLast * kLanes;  // of the last register
  Floats values[kCount];
  DETPOST_TOGETHER
  for (int i = 0; i < kLast; ++i) load(values[i], logits + first + i * kLanes);
  const bool whole = kWhole || begin + kLanes <= classes;
  int64_t skipped = 0;
  if (whole) {
    load(values[kLast], logits + begin);
  } else {
    skipped = load_last(values[kLast], logits, begin, classes);
  }
  DETPOST_TOGETHER
  for (int i = 0; i < kCount; ++i) values[i] = peak - values[i];
  if (kept) {
    weights_of<kCount>(values);
    DETPOST_TOGETHER
    for (int i = 0; i < kLast; ++i) store(kept + first + i * kLanes, values[i]);
    if (whole) store(kept + begin, values[kLast]);
    for (int64_t i = begin; !whole && i < classes; ++i) kept[i] = values[kLast][skipped + i - begin];
  } else {
    summands_of<kCount>(values);
  }
  add_limbs<kCount>(sums, count, bits, values);
}

// The sum of the weights of a query's classes, whose greatest logit is a finite `peak`. `count` limbs, a constant where the
// loop over them is to be unrolled. `kept` receives the weights themselves, or is null; where it is, a part of the sum will
// do that is `enough`.
DETPOST_INLINE float sum_weights(const float* logits, int64_t classes, float peak, const Limbs& limbs, int count,
                                 float* kept, float enough) {
  Ints sums[kMostLimbs];
  for (int limb = 0; limb < count; ++limb) sums[limb] = (Ints){};
  const float scale = static_cast<float>(1 << limbs.bits);
  const int bits = limbs.bits;
  int64_t first = 0;
  for (; first + kTogether * kLanes <= classes; first += kTogether * kLanes) {
    add_registers<kTogether, true>(sums, count, bits, logits, first, classes, peak, kept);
    if (enough == kInfinity) continue;
    int32_t sum = 0;  // of the greatest limb alone, rounded down: never more than the whole sum
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[0][lane];
    if (static_cast<float>(sum) >= enough * scale) return static_cast<float>(sum) / scale;
  }
  const int64_t left = (classes - first + kLanes - 1) / kLanes;  // registers, the last of them not full
  if (left & 4) add_registers<4, false>(sums, count, bits, logits, first, classes, peak, kept), first += 4 * kLanes;
  if (left & 2) add_registers<2, false>(sums, count, bits, logits, first, classes, peak, kept), first += 2 * kLanes;
  if (left & 1) add_registers<1, false>(sums, count, bits, logits, first, classes, peak, kept);
  if (left & 8) add_registers<8, false>(sums, count, bits, logits, first, classes, peak, kept);
  float total = 0.0f;
  for (int limb = count - 1; limb >= 0; --limb) {
    int32_t sum = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[limb][lane];
    total = static_cast<float>(sum) + total / scale;  // an exact quotient: the sum alone rounds
  }
  total = total / scale;
  return total < 1.0f ? 1.0f : total;
}

// What the sum of the weights is at least, at a fifth of the work; it stops where that is `enough`. A float's bits, read as a
// whole number, are its logarithm but for a curve that they cut short: by that a weight comes out up to 6.15 % too great.
// The rest of `kTooGreat` is what `kMostCheap` classes round by.
constexpr float kTooGreat = 1.063f;
constexpr int64_t kMostCheap = 1 << 14;
constexpr int64_t kLooksEvery = 8 * kLanes;  // a power of two

static float least_sum(const float* logits, int64_t classes, float peak, float enough) {
  constexpr float kPerLogit = -12102203.0f, kOne = 1065353216.0f;  // 2^23 / ln 2, and the bits of 1
  Floats values, sums = {};
  float least = 0.0f;
  for (int64_t first = 0; first < classes; first += kLanes) {
    if (first + kLanes <= classes) {
      load(values, logits + first);
    } else {
      load_last(values, logits, first, classes);
    }
    const Floats gaps = peak - values;
    const Floats near = gaps < 80.0f ? gaps : 80.0f - (Floats){};
    sums += reinterpret_cast<Floats>(__builtin_convertvector(near * kPerLogit + kOne, Ints));
    const int64_t next = first + kLanes;
    if (next < classes && (next & (kLooksEvery - 1)) != 0) continue;
    float sum = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    least = sum / kTooGreat;
    if (least >= enough) break;
  }
  return least;
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

DETPOST_INLINE float total_weight(const float* logits, int64_t classes, float peak, const Limbs& limbs, float* kept,
                                  float enough) {
  if (peak == kInfinity) return sum_of_infinite(logits, classes, kept);
  if (peak == -kInfinity) peak = 0.0f;
  if (limbs.count == 2) return sum_weights(logits, classes, peak, limbs, 2, kept, enough);
  if (limbs.count == 3) return sum_weights(logits, classes, peak, limbs, 3, kept, enough);
  return sum_weights(logits, classes, peak, limbs, limbs.count, kept, enough);
}

struct Greatest {
  float value;  // -inf where none is a number
  bool has_nan;
};

static Greatest greatest_of(const float* logits, int64_t count) {
  constexpr int kAtOnce = 4;  // a maximum waits for the one before
  Floats best[kAtOnce], values[kAtOnce];
  Ints is_nan = {};
  for (int i = 0; i < kAtOnce; ++i) fill(best[i], -kInfinity);
  int64_t first = 0;
  for (; first + kAtOnce * kLanes <= count; first += kAtOnce * kLanes) {
    DETPOST_TOGETHER
    for (int i = 0; i < kAtOnce; ++i) {
      load(values[i], logits + first + i * kLanes);
      is_nan |= values[i] != values[i];
      best[i] = values[i] > best[i] ? values[i] : best[i];
    }
  }
  for (; first < count; first += kLanes) {
    if (first + kLanes <= count) {
      load(values[0], logits + first);
    } else {
      load_last(values[0], logits, first, count);
    }
    is_nan |= values[0] != values[0];
    best[0] = values[0] > best[0] ? values[0] : best[0];
  }
  for (int i = 1; i < kAtOnce; ++i) best[0] = best[i] > best[0] ? best[i] : best[0];
  return {greatest_lane(best[0]), any_lane(is_nan)};
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
