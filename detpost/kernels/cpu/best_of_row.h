// The k best of one row of scores, in the one exact order; what selection and decode stand on.
// Included by their kernels in the namespace of each instruction set.

// An ascending integer order over the floats that a descending one over the scores follows. Zeros are one number.
DETPOST_INLINE uint32_t descending_key(float value) {
  value = value == 0.0f ? 0.0f : value;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t ordered = bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
  return value != value ? 0xFFFFFFFFu : ~ordered;
}

DETPOST_INLINE float value_of_key(uint32_t key) {
  const uint32_t ordered = ~key;
  const uint32_t bits = ordered ^ ((ordered >> 31) ? 0x80000000u : 0xFFFFFFFFu);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Of numbers that are none of them NaN.
DETPOST_INLINE Words descending_keys(const Floats& values) {
  const Words bits = reinterpret_cast<Words>(values + 0.0f);  // of zeros +0
  const Words sign = reinterpret_cast<Words>(reinterpret_cast<Ints>(bits) >> 31);
  return ~(bits ^ (sign | 0x80000000u));
}

// The least key such that `wanted` of the `count` keys are no greater, or, if `slack` allows, one somewhat above it with
// at most `slack` further keys below. 1 <= wanted <= count. Counts them in equal parts of their range, then in those of the
// part that the answer is in, until a part is small enough.
static uint32_t select_key(const uint32_t* keys, int64_t count, int64_t wanted, int64_t slack) {
  constexpr int kBits = 8;
  uint32_t first = keys[0], last = keys[0];  // the range
  for (int64_t i = 1; i < count; ++i) {
    first = keys[i] < first ? keys[i] : first;
    last = keys[i] > last ? keys[i] : last;
  }
  int64_t below = 0;  // keys under the range
  while (first < last) {
    const uint32_t range = last - first;
    const int width = 32 - __builtin_clz(range);
    const int shift = width > kBits ? width - kBits : 0;
    uint32_t histogram[(1 << kBits) + 1] = {};  // the last is for what is outside the range
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t place = keys[i] - first;  // huge below the range
      ++histogram[place <= range ? place >> shift : 1 << kBits];
    }
    uint32_t part = 0;
    while (below + histogram[part] < wanted) below += histogram[part++];
    const uint32_t before = part << shift, size = (1u << shift) - 1;
    last = range - before > size ? first + before + size : last;
    first += before;
    if (below + histogram[part] <= wanted + slack) break;
  }
  return last;
}

// Stable ascending radix sort of (key, index) pairs; the result is in the first pair of arrays.
static void sort_pairs(uint32_t* keys, uint32_t* indices, uint32_t* other_keys, uint32_t* other_indices,
                       int64_t count) {
  uint32_t starts[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int digit = 0; digit < 4; ++digit) ++starts[digit][(keys[i] >> (8 * digit)) & 255];
  }
  uint32_t *from_keys = keys, *from = indices, *to_keys = other_keys, *to = other_indices;
  for (int digit = 0; digit < 4; ++digit) {
    uint32_t* start = starts[digit];
    if (count == 0 || start[(from_keys[0] >> (8 * digit)) & 255] == count) continue;  // one digit for all
    uint32_t sum = 0;
    for (int value = 0; value < 256; ++value) {
      const uint32_t here = start[value];
      start[value] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t place = start[(from_keys[i] >> (8 * digit)) & 255]++;
      to_keys[place] = from_keys[i];
      to[place] = from[i];
    }
    uint32_t* swap = from_keys; from_keys = to_keys; to_keys = swap;
    swap = from; from = to; to = swap;
  }
  if (from_keys != keys) {
    std::memcpy(keys, from_keys, count * sizeof *keys);
    std::memcpy(indices, from, count * sizeof *indices);
  }
}

constexpr int64_t kBlock = 128;  // elements whose maximum is kept, to pass over them later

// A bound that at least `kept` of the row's numbers reach, and few more; -inf where fewer than `kept` are numbers.
// Of any partition of the row, the kept-th greatest maximum of its parts is such a bound.
static float lower_bound_of_best(const float* row, int64_t width, int64_t kept, float* block_maxima) {
  const int64_t blocks = width / kBlock;
  const int64_t parts = (2 * kept + 2 * kLanes - 1) / (2 * kLanes);  // of two registers each
  const int64_t blocks_per_part = blocks / parts;
  if (blocks_per_part == 0) return -kInfinity;
  const int64_t count = (blocks + blocks_per_part - 1) / blocks_per_part * 2 * kLanes;
  uint32_t* keys = scratch.take<uint32_t>(1, count);
  int64_t made = 0;
  for (int64_t first = 0; first < blocks; first += blocks_per_part) {
    const int64_t last = first + blocks_per_part < blocks ? first + blocks_per_part : blocks;
    Floats even_part, odd_part;
    fill(even_part, -kInfinity);
    fill(odd_part, -kInfinity);
    for (int64_t block = first; block < last; ++block) {
      Floats even, odd, values;
      fill(even, -kInfinity);
      fill(odd, -kInfinity);
      for (int64_t i = 0; i < kBlock; i += 2 * kLanes) {
        load(values, row + block * kBlock + i);
        even = values > even ? values : even;  // false for NaN, which is passed over
        load(values, row + block * kBlock + i + kLanes);
        odd = values > odd ? values : odd;
      }
      even_part = even > even_part ? even : even_part;
      odd_part = odd > odd_part ? odd : odd_part;
      block_maxima[block] = greatest_lane(even > odd ? even : odd);
    }
    const Words made_here[2] = {descending_keys(even_part), descending_keys(odd_part)};
    std::memcpy(keys + made, made_here, sizeof made_here);
    made += 2 * kLanes;
  }
  return value_of_key(select_key(keys, made, kept, kept / 16));
}

// Appends the indices of what reaches the bound in row[first, last), without a branch per element, and gives the new
// count. Writes up to 8 places beyond it.
DETPOST_INLINE int64_t collect(const float* row, int64_t first, int64_t last, float bound, uint32_t* found,
                               int64_t count) {
  int64_t i = first;
#if DETPOST_FMA
  const __m256 bounds = _mm256_set1_ps(bound);
  for (; i + 8 <= last; i += 8) {
    const int mask = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(row + i), bounds, _CMP_GE_OQ));
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLaneTable.lanes[mask]));
    const __m256i places = _mm256_add_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(static_cast<int>(i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + count), places);
    count += __builtin_popcount(static_cast<unsigned>(mask));
  }
#endif
  for (; i < last; ++i) {
    found[count] = static_cast<uint32_t>(i);
    count += row[i] >= bound;
  }
  return count;
}

// Puts the indices of the best `kept` of the row into `best`: score descending, then index ascending, NaN last.
static void select_best(const float* row, int64_t width, int64_t kept, uint32_t* best) {
  const int64_t blocks = width / kBlock;
  float* block_maxima = scratch.take<float>(2, blocks + 1);
  const float bound = lower_bound_of_best(row, width, kept, block_maxima);
  const bool skips = bound > -kInfinity;
  uint32_t* found = scratch.take<uint32_t>(3, width + 8);
  int64_t count = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    if (skips && block_maxima[block] < bound) continue;
    count = collect(row, block * kBlock, (block + 1) * kBlock, bound, found, count);
  }
  count = collect(row, blocks * kBlock, width, bound, found, count);

  uint32_t* keys = scratch.take<uint32_t>(5, 2 * count + 1);
  for (int64_t i = 0; i < count; ++i) keys[i] = descending_key(row[found[i]]);
  if (count > kept + kept / 2) {  // too many to sort: all below the kept-th key, then the first that equal it
    const uint32_t last = select_key(keys, count, kept, 0);
    int64_t under = 0, room = kept;
    for (int64_t i = 0; i < count; ++i) room -= keys[i] < last;
    for (int64_t i = 0; i < count; ++i) {
      const bool equals = keys[i] == last && room > 0;
      room -= equals;
      if (keys[i] < last || equals) {
        keys[under] = keys[i];
        found[under++] = found[i];
      }
    }
    count = under;
  }
  uint32_t* spare = scratch.take<uint32_t>(6, count + 1);
  sort_pairs(keys, found, keys + count, spare, count);
  int64_t done = count < kept ? count : kept;
  std::memcpy(best, found, done * sizeof *best);
  for (int64_t i = 0; i < width && done < kept; ++i) {
    if (row[i] != row[i]) best[done++] = static_cast<uint32_t>(i);
  }
}

DETPOST_INLINE float widen_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7FFF;
  uint32_t bits;
  float value;
  if (rest >= 0x7C00) {  // infinities and NaN
    bits = sign | 0x7F800000u | ((rest & 0x3FF) << 13);
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  bits = rest << 13;  // the exponent is 112 short, which a product mends for normal and subnormal numbers alike
  std::memcpy(&value, &bits, sizeof value);
  value *= 5.192296858534828e33f;  // 2 ** 112
  std::memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

DETPOST_INLINE float element(const void* data, int dtype, int64_t i) {
  if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t narrow = static_cast<const uint16_t*>(data)[i];
  if (dtype == kFloat16) return widen_half(narrow);
  const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The numbers data[first, first + count) as float32: themselves, or a widened copy.
static const float* as_floats(const void* data, int dtype, int64_t first, int64_t count) {
  if (dtype == kFloat32) return static_cast<const float*>(data) + first;
  const uint16_t* narrow = static_cast<const uint16_t*>(data) + first;
  float* wide = scratch.take<float>(0, count);
  int64_t i = 0;
  if (dtype == kBFloat16) {
    for (; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(narrow[i]) << 16;
      std::memcpy(wide + i, &bits, sizeof bits);
    }
    return wide;
  }
#if DETPOST_FMA
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(narrow + i));
    _mm256_storeu_ps(wide + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < count; ++i) wide[i] = widen_half(narrow[i]);
  return wide;
}
