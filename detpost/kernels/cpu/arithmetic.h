// The registers of one instruction set, and the arithmetic that families share.
// Included by a family's kernels in the namespace of each instruction set.

typedef float Floats __attribute__((vector_size(DETPOST_REGISTER)));
typedef int32_t Ints __attribute__((vector_size(DETPOST_REGISTER)));
typedef uint32_t Words __attribute__((vector_size(DETPOST_REGISTER)));

constexpr int64_t kLanes = DETPOST_REGISTER / 4;

DETPOST_INLINE void load(Floats& to, const float* from) { std::memcpy(&to, from, sizeof to); }
DETPOST_INLINE void store(float* to, const Floats& from) { std::memcpy(to, &from, sizeof from); }
DETPOST_INLINE void fill(Floats& to, float value) { to = value - (Floats){}; }

DETPOST_INLINE float greatest_lane(const Floats& values) {
  float best = values[0];
  for (int lane = 1; lane < kLanes; ++lane) best = values[lane] > best ? values[lane] : best;
  return best;
}

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
