// The registers of one instruction set, and the arithmetic that families share.
// Included by a family's kernels in the namespace of each instruction set.

typedef float Floats __attribute__((vector_size(DETPOST_REGISTER)));
typedef int32_t Ints __attribute__((vector_size(DETPOST_REGISTER)));
typedef uint32_t Words __attribute__((vector_size(DETPOST_REGISTER)));

constexpr int64_t kLanes = DETPOST_REGISTER / 4;

DETPOST_INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
DETPOST_INLINE void store(float* to, const Floats& from) { std::memcpy(to, &from, sizeof from); }
DETPOST_INLINE void fill(Floats& to, float value) { to = value - (Floats){}; }

// The lanes in another order: each changes places with the one `kDistance` away, a power of two below `kLanes`. Masks of all
// lanes, here and below, since GCC 12 warns of an operand without them that nobody reads.
template <int kDistance>
DETPOST_INLINE Floats swapped(const Floats& values) {
#if DETPOST_REGISTER == 64
  if (kDistance == 8) return _mm512_maskz_shuffle_f32x4(0xFFFF, values, values, 0x4E);
  if (kDistance == 4) return _mm512_maskz_shuffle_f32x4(0xFFFF, values, values, 0xB1);
  return _mm512_maskz_permute_ps(0xFFFF, values, kDistance == 2 ? 0x4E : 0xB1);
#elif DETPOST_REGISTER == 32
  if (kDistance == 4) return _mm256_permute2f128_ps(values, values, 1);
  return _mm256_permute_ps(values, kDistance == 2 ? 0x4E : 0xB1);
#else
  Floats other;
  for (int lane = 0; lane < kLanes; ++lane) other[lane] = values[lane ^ kDistance];
  return other;
#endif
}

// Of numbers that are none of them NaN.
DETPOST_INLINE Floats greater(const Floats& a, const Floats& b) { return a > b ? a : b; }

DETPOST_INLINE float greatest_lane(Floats values) {
#if DETPOST_REGISTER == 64
  values = greater(values, swapped<8>(values));
#endif
#if DETPOST_REGISTER >= 32
  values = greater(values, swapped<4>(values));
#endif
  values = greater(values, swapped<2>(values));
  return greater(values, swapped<1>(values))[0];
}

DETPOST_INLINE float sum_of_lanes(Floats values) {
#if DETPOST_REGISTER == 64
  values += swapped<8>(values);
#endif
#if DETPOST_REGISTER >= 32
  values += swapped<4>(values);
#endif
  values += swapped<2>(values);
  return (values + swapped<1>(values))[0];
}

#if DETPOST_FMA
// a * b + c, rounded once.
DETPOST_INLINE Floats fused(const Floats& a, const Floats& b, const Floats& c) {
#if DETPOST_REGISTER == 64
  return _mm512_fmadd_ps(a, b, c);
#else
  return _mm256_fmadd_ps(a, b, c);
#endif
}
#endif

// The lanes of a comparison that hold, lowest bit first.
DETPOST_INLINE uint32_t lane_bits(const Ints& mask) {
#if DETPOST_REGISTER == 64
  return static_cast<uint32_t>(_mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)));
#elif DETPOST_REGISTER == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(DETPOST_HAS_V3)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(mask[lane] & 1) << lane;
  return bits;
#endif
}

DETPOST_INLINE bool any_lane(const Ints& mask) { return lane_bits(mask) != 0; }

// The lanes in which two numbers are equal, and those in which one of them is NaN, as `lane_bits`: from one comparison,
// where a compiler makes a register of a mask first.
DETPOST_INLINE uint32_t equal_bits(const Floats& a, const Floats& b) {
#if DETPOST_REGISTER == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
#else
  return lane_bits(a == b);
#endif
}

DETPOST_INLINE uint32_t nan_bits(const Floats& a, const Floats& b) {
#if DETPOST_REGISTER == 64
  return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
#elif DETPOST_REGISTER == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)));
#else
  return lane_bits((a != a) | (b != b));
#endif
}

// Towards 0.
DETPOST_INLINE Floats whole_part(const Floats& values) {
#if DETPOST_REGISTER == 64
  return _mm512_maskz_roundscale_ps(0xFFFF, values, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#elif DETPOST_REGISTER == 32
  return _mm256_round_ps(values, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
#else
  return __builtin_convertvector(__builtin_convertvector(values, Ints), Floats);
#endif
}

// exp(x) for |x| <= 708 to about 1e-15 of it: 2^n times the series of the rest. Written so that a compiler takes several
// at a time, and equal numbers come out equal wherever they stand.
DETPOST_INLINE double exponential(double x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer in the low bits
  const double shifted = x * 1.4426950408889634 + kRound;
  const double n = shifted - kRound;
  const double r = (x - n * 0.6931471805598903) - n * 5.497923018708371e-14;
  double series = 1.0 / 6227020800.0;
  series = series * r + 1.0 / 479001600.0;
  series = series * r + 1.0 / 39916800.0;
  series = series * r + 1.0 / 3628800.0;
  series = series * r + 1.0 / 362880.0;
  series = series * r + 1.0 / 40320.0;
  series = series * r + 1.0 / 5040.0;
  series = series * r + 1.0 / 720.0;
  series = series * r + 1.0 / 120.0;
  series = series * r + 1.0 / 24.0;
  series = series * r + 1.0 / 6.0;
  series = series * r + 0.5;
  series = series * r + 1.0;
  series = series * r + 1.0;
  uint64_t bits, power;  // without a sign: a shift beyond the top is defined then
  std::memcpy(&bits, &series, sizeof bits);
  std::memcpy(&power, &shifted, sizeof power);
  bits += power << 52;
  std::memcpy(&series, &bits, sizeof series);
  return series;
}
