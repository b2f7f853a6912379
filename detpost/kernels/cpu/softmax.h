// Softmax scores, to the bits of detpost/reference/softmax.py, which says why each step is what it is.
// Included by decode.h in the namespace of each instruction set.

constexpr float kStepsOfLogit = 4194304.0f;  // 2^22
constexpr float kMostSteps = 268435456.0f;   // 64 logits
constexpr float kNearSteps = 134217728.0f;   // 32 logits

// exp(-steps / 2^22) times `scale`, a power of two, of steps from 0 to `kMostSteps`. In whole numbers: 11 bits of a step
// count choose from one table, 8 from the other, and the last 10 are what stands between two entries. The product before
// the difference is exact, and what the scale does to all of it, too.
DETPOST_INLINE Floats weights_by_tables(const Floats& steps, float scale) {
  const Ints whole = __builtin_convertvector(steps, Ints);
  const Ints coarse = whole >> 18, fine = whole >> 10 & 255;
  Floats products;
  for (int lane = 0; lane < kLanes; ++lane) {
    products[lane] = kSoftmaxTables.coarse[coarse[lane]] * kSoftmaxTables.fine[fine[lane]];
  }
  return products * (scale - __builtin_convertvector(whole & 1023, Floats) * (scale / kStepsOfLogit));
}

#if DETPOST_FMA
// The three factors of steps below `kNearSteps`, with no look-up in memory: the processors' gathers are slower than all of
// this. A coarse entry is a product of numbers in two parts each, a fine one a polynomial; each comes out as the table has
// it, as tests/kernels/cpu/test_softmax.py tries for every pair of entries.
#if DETPOST_REGISTER == 64
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

DETPOST_INLINE Floats rest_weights(const Ints& rest, float scale) {
  const Floats none = {};
  return fused(__builtin_convertvector(rest, Floats), none - scale / kStepsOfLogit, none + scale);
}
#endif

// Registers that take each step side by side: one alone would wait for the result of every step before.
constexpr int kTogether = DETPOST_FMA ? 8 : 1;
// They stay registers only where the loops over them are unrolled.
#define DETPOST_TOGETHER _Pragma("GCC unroll 8")

// exp(-gap) times `scale` of gaps from 0 to infinity in `kCount` registers, in place; `kNear`: all gaps are below 32.
template <int kCount, bool kNear>
DETPOST_INLINE void weights_from_steps(Floats* steps, float scale) {
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
    for (int i = 0; i < kCount; ++i) steps[i] *= rest_weights(whole[i] & 1023, scale);
    return;
  }
#endif
  DETPOST_TOGETHER
  for (int i = 0; i < kCount; ++i) steps[i] = weights_by_tables(steps[i], scale);
}

// What stands before it, of distances in steps of 2^-22 logits.
template <int kCount>
DETPOST_INLINE void weights_of(Floats* steps, float scale) {
  Ints are_far = {};
  DETPOST_TOGETHER
  for (int i = 0; i < kCount; ++i) {
    steps[i] = steps[i] < kMostSteps ? steps[i] : kMostSteps - (Floats){};
    are_far |= steps[i] >= kNearSteps;
  }
  if (any_lane(are_far)) {
    weights_from_steps<kCount, false>(steps, scale);
  } else {
    weights_from_steps<kCount, true>(steps, scale);
  }
}

// The same for a sum: what lies 32 logits below and more is below its last limb, and any weight as small stands for it.
template <int kCount>
DETPOST_INLINE void summands_of(Floats* steps, float scale) {
  constexpr float kMost = DETPOST_FMA ? kNearSteps - 8.0f : kMostSteps;
  DETPOST_TOGETHER
  for (int i = 0; i < kCount; ++i) steps[i] = steps[i] < kMost ? steps[i] : kMost - (Floats){};
  weights_from_steps<kCount, true>(steps, scale);
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

// Exact in each lane: together no limb adds up to more than 2^24.
struct Sums {
  Floats of[kMostLimbs];
  Ints last[2];  // of three limbs, the second and the third
};

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

// Adds `kCount` registers of weights times 2^bits, which it spends. `count` limbs, a constant where the loop is to be
// unrolled.
template <int kCount>
DETPOST_INLINE void add_limbs(Sums& sums, int count, int bits, Floats* weights) {
  const float scale = static_cast<float>(1 << bits);
  if (count == 3) {  // of up to 15 bits: the last two are summed as one, and told apart before they could overflow
    Words both = {};
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) {
      const Floats whole = whole_part(weights[i]);
      sums.of[0] += whole;
      both += reinterpret_cast<Words>(__builtin_convertvector((weights[i] - whole) * (scale * scale), Ints));
      if (i != kCount - 1 && (i != 3 || bits < 15)) continue;  // eight of 28 bits, or four of 30
      sums.last[0] += reinterpret_cast<Ints>(both >> bits);
      sums.last[1] += reinterpret_cast<Ints>(both & ((1u << bits) - 1));
      both = (Words){};
    }
    return;
  }
  for (int limb = 0; limb < count; ++limb) {
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) {
      const Floats whole = whole_part(weights[i]);
      sums.of[limb] += whole;
      weights[i] = (weights[i] - whole) * scale;
    }
  }
}

// Weighs `kCount` registers of logits from `first` on and adds them; the last may reach beyond the row, but where `kWhole`.
// `kept` receives the weights, or is null. `kHuge`: a logit times `kStepsOfLogit` may be infinite.
template <int kCount, bool kWhole, bool kHuge>
DETPOST_INLINE void add_registers(Sums& sums, int count, int bits, const float* logits, int64_t first, int64_t classes,
                                  float peak, float* kept) {
  constexpr int kLast = kCount - 1;
  const int64_t begin = first + kLast * kLanes;  // of the last register
  const float scale = static_cast<float>(1 << bits);
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
  for (int i = 0; i < kCount; ++i) {
#if DETPOST_FMA
    if (!kHuge) {  // exact products: this is the difference, rounded once
      values[i] = fused(values[i], -kStepsOfLogit - (Floats){}, peak * kStepsOfLogit - (Floats){});
      continue;
    }
#endif
    values[i] = (peak - values[i]) * kStepsOfLogit;
  }
  if (kept) {
    weights_of<kCount>(values, 1.0f);
    DETPOST_TOGETHER
    for (int i = 0; i < kLast; ++i) store(kept + first + i * kLanes, values[i]);
    if (whole) store(kept + begin, values[kLast]);
    for (int64_t i = begin; !whole && i < classes; ++i) kept[i] = values[kLast][skipped + i - begin];
    DETPOST_TOGETHER
    for (int i = 0; i < kCount; ++i) values[i] *= scale;
  } else {
    summands_of<kCount>(values, scale);
  }
  add_limbs<kCount>(sums, count, bits, values);
}

// The sum of the weights of a query's classes, whose greatest logit is a finite `peak`. `count` limbs, a constant where the
// loop over them is to be unrolled. `kept` receives the weights themselves, or is null.
template <bool kHuge>
DETPOST_INLINE float sum_weights(const float* logits, int64_t classes, float peak, const Limbs& limbs, int count,
                                 float* kept) {
  Sums sums;
  for (int limb = 0; limb < count; ++limb) sums.of[limb] = (Floats){};
  sums.last[0] = sums.last[1] = (Ints){};
  const float scale = static_cast<float>(1 << limbs.bits);
  const int bits = limbs.bits;
  int64_t first = 0;
  for (; first + kTogether * kLanes <= classes; first += kTogether * kLanes) {
    add_registers<kTogether, true, kHuge>(sums, count, bits, logits, first, classes, peak, kept);
  }
  const int64_t left = (classes - first + kLanes - 1) / kLanes;  // registers, the last of them not full
  if (left & 4) add_registers<4, false, kHuge>(sums, count, bits, logits, first, classes, peak, kept), first += 4 * kLanes;
  if (left & 2) add_registers<2, false, kHuge>(sums, count, bits, logits, first, classes, peak, kept), first += 2 * kLanes;
  if (left & 1) add_registers<1, false, kHuge>(sums, count, bits, logits, first, classes, peak, kept);
  if (left & 8) add_registers<8, false, kHuge>(sums, count, bits, logits, first, classes, peak, kept);
  if (count == 3) {
    sums.of[1] = __builtin_convertvector(sums.last[0], Floats);
    sums.of[2] = __builtin_convertvector(sums.last[1], Floats);
  }
  float total = 0.0f;
  for (int limb = count - 1; limb >= 0; --limb) {
    total = sum_of_lanes(sums.of[limb]) + total / scale;  // an exact quotient: the sum alone rounds
  }
  total = total / scale;
  return total < 1.0f ? 1.0f : total;
}

// What the sum of the weights is at least, at a sixth of the work; it stops where that is `enough`. A float's bits, read as a
// whole number, are its logarithm but for a curve that they cut short: by that a weight comes out up to 6.15 % too great.
// The rest of `kTooGreat` is what `kMostCheap` classes round by.
constexpr float kTooGreat = 1.063f;
constexpr int64_t kMostCheap = 1 << 14;

DETPOST_INLINE Floats cheap_weights(const Floats& values, float peak) {
  constexpr float kPerLogit = -12102203.0f, kOne = 1065353216.0f;  // 2^23 / ln 2, and the bits of 1
#if DETPOST_FMA
  const Floats bits = fused(peak - values, kPerLogit - (Floats){}, kOne - (Floats){});
#else
  const Floats bits = (peak - values) * kPerLogit + kOne;
#endif
  return reinterpret_cast<Floats>(__builtin_convertvector(bits > 0.0f ? bits : (Floats){}, Ints));
}

static float least_sum(const float* logits, int64_t classes, float peak, float enough) {
  constexpr int kAtOnce = 4;  // a sum waits for the one before
  Floats values, sums[kAtOnce] = {};
  float least = 0.0f;
  int64_t first = 0;
  for (; first + 2 * kAtOnce * kLanes <= classes; first += 2 * kAtOnce * kLanes) {
    DETPOST_TOGETHER
    for (int i = 0; i < 2 * kAtOnce; ++i) {
      load(values, logits + first + i * kLanes);
      sums[i % kAtOnce] += cheap_weights(values, peak);
    }
    least = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / kTooGreat;
    if (least >= enough) return least;
  }
  for (; first < classes; first += kLanes) {
    if (first + kLanes <= classes) {
      load(values, logits + first);
    } else {
      load_last(values, logits, first, classes);
    }
    sums[first / kLanes % kAtOnce] += cheap_weights(values, peak);
  }
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / kTooGreat;
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

DETPOST_INLINE float total_weight(const float* logits, int64_t classes, float peak, const Limbs& limbs, float* kept) {
  constexpr float kHuge = 1e30f;
  if (peak == kInfinity) return sum_of_infinite(logits, classes, kept);
  if (peak == -kInfinity) peak = 0.0f;
  const bool is_usual = peak > -kHuge && peak < kHuge;
  if (is_usual && limbs.count == 2) return sum_weights<false>(logits, classes, peak, limbs, 2, kept);
  if (is_usual && limbs.count == 3) return sum_weights<false>(logits, classes, peak, limbs, 3, kept);
  return sum_weights<true>(logits, classes, peak, limbs, limbs.count, kept);
}

struct Greatest {
  float value;  // -inf where none is a number
  bool has_nan;
};

static Greatest greatest_of(const float* logits, int64_t count) {
  constexpr int kAtOnce = 4;  // a maximum waits for the one before
  Floats best[kAtOnce], values[kAtOnce];
  uint32_t are_nan = 0;
  for (int i = 0; i < kAtOnce; ++i) fill(best[i], -kInfinity);
  int64_t first = 0;
  for (; first + kAtOnce * kLanes <= count; first += kAtOnce * kLanes) {
    DETPOST_TOGETHER
    for (int i = 0; i < kAtOnce; ++i) {
      load(values[i], logits + first + i * kLanes);
      best[i] = values[i] > best[i] ? values[i] : best[i];
    }
    are_nan |= nan_bits(values[0], values[1]) | nan_bits(values[2], values[3]);
  }
  for (; first < count; first += kLanes) {
    if (first + kLanes <= count) {
      load(values[0], logits + first);
    } else {
      load_last(values[0], logits, first, count);
    }
    are_nan |= nan_bits(values[0], values[0]);
    best[0] = values[0] > best[0] ? values[0] : best[0];
  }
  return {greatest_lane(greater(greater(best[0], best[1]), greater(best[2], best[3]))), are_nan != 0};
}

// The first place of a number in logits[first, last), or `last`.
static int64_t first_place(const float* logits, int64_t first, int64_t last, float number) {
  constexpr int kAtOnce = 4;
  Floats values, wanted;
  fill(wanted, number);
  uint64_t places = 0;
  while (first + kAtOnce * kLanes <= last) {
    for (int i = 0; i < kAtOnce; ++i) {
      load(values, logits + first + i * kLanes);
      places |= static_cast<uint64_t>(equal_bits(values, wanted)) << i * kLanes;
    }
    if (places) return first + __builtin_ctzll(places);
    first += kAtOnce * kLanes;
  }
  while (first < last && logits[first] != number) ++first;
  return first;
}
