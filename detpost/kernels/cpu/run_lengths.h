// Where a mask changes, down its columns.
// Included by run_lengths.cpp in the namespace of each instruction set.

#include "arithmetic.h"

typedef uint8_t Bytes __attribute__((vector_size(DETPOST_REGISTER)));

// The bytes of two rows, `count` of them and no more than a register holds, that are not both 0 or both something else:
// lowest bit first.
DETPOST_INLINE uint64_t differences(const uint8_t* above, const uint8_t* below, int64_t count) {
  if (count < DETPOST_REGISTER) {
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>((above[i] != 0) != (below[i] != 0)) << i;
    return bits;
  }
  Bytes first, second;
  std::memcpy(&first, above, sizeof first);
  std::memcpy(&second, below, sizeof second);
  const Bytes differs = reinterpret_cast<Bytes>((first == 0) != (second == 0));
#if DETPOST_REGISTER == 64
  return _mm512_movepi8_mask(reinterpret_cast<__m512i>(differs));
#elif DETPOST_REGISTER == 32
  return static_cast<uint32_t>(_mm256_movemask_epi8(reinterpret_cast<__m256i>(differs)));
#elif defined(DETPOST_HAS_V3)
  return static_cast<uint32_t>(_mm_movemask_epi8(reinterpret_cast<__m128i>(differs)));
#else
  uint64_t bits = 0;
  for (int64_t i = 0; i < DETPOST_REGISTER; ++i) bits |= static_cast<uint64_t>(differs[i] & 1) << i;
  return bits;
#endif
}

// Calls `found` with every column in which a row differs from the one above it.
template <typename Found>
DETPOST_INLINE void each_change(const uint8_t* above, const uint8_t* below, int64_t width, const Found& found) {
  for (int64_t first = 0; first < width; first += DETPOST_REGISTER) {
    const int64_t left = width - first;
    uint64_t bits = differences(above + first, below + first, left < DETPOST_REGISTER ? left : DETPOST_REGISTER);
    for (; bits; bits &= bits - 1) found(first + __builtin_ctzll(bits));
  }
}

// Leaves in slot 1 of the scratch, ascending, the places column * height + row that differ from the one before them, and
// gives how many. Rows are compared where they lie; what is found is few, and is then put in order by its column.
static int64_t find_changes(const uint8_t* mask, int64_t height, int64_t width) {
  int64_t* starts = scratch.take<int64_t>(2, width + 1);
  std::memset(starts, 0, (width + 1) * sizeof *starts);
  const auto at = [&](int64_t row, int64_t column) { return mask[row * width + column] != 0; };
  // Each row is looked at twice, to count and to place: the second time where the first found something alone.
  uint8_t* rows = scratch.take<uint8_t>(3, height);
  for (int64_t column = 1; column < width && height > 0; ++column) {
    starts[column + 1] += at(0, column) != at(height - 1, column - 1);
  }
  for (int64_t row = 1; row < height; ++row) {
    const uint8_t* above = mask + (row - 1) * width;
    bool any = false;
    each_change(above, above + width, width, [&](int64_t column) { ++starts[column + 1], any = true; });
    rows[row] = any;
  }
  for (int64_t column = 0; column < width; ++column) starts[column + 1] += starts[column];
  const int64_t count = starts[width];
  int64_t* found = scratch.take<int64_t>(1, count);
  for (int64_t column = 1; column < width && height > 0; ++column) {
    if (at(0, column) != at(height - 1, column - 1)) found[starts[column]++] = column * height;
  }
  for (int64_t row = 1; row < height; ++row) {
    if (!rows[row]) continue;
    const uint8_t* above = mask + (row - 1) * width;
    each_change(above, above + width, width, [&](int64_t column) { found[starts[column]++] = column * height + row; });
  }
  return count;
}
