// Blends two rows and compares what comes out, in one pass over what is compared.
// Included by mask_upsampling.cpp in the namespace of each instruction set.

#include "arithmetic.h"

typedef uint8_t Bytes __attribute__((vector_size(DETPOST_REGISTER)));

// Truth of four registers of numbers, each -1 or 0, as bytes of 1 or 0.
DETPOST_INLINE Bytes as_bytes(const Ints* are_in) {
#if DETPOST_REGISTER == 64
  const __m512i* of = reinterpret_cast<const __m512i*>(are_in);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(of[0], of[1]), _mm512_packs_epi32(of[2], of[3]));
  return reinterpret_cast<Bytes>(_mm512_maskz_permutexvar_epi32(0xFFFF, order, packed)) & 1;
#elif DETPOST_REGISTER == 32
  const __m256i* of = reinterpret_cast<const __m256i*>(are_in);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(of[0], of[1]), _mm256_packs_epi32(of[2], of[3]));
  return reinterpret_cast<Bytes>(_mm256_permutevar8x32_epi32(packed, order)) & 1;
#else
  Bytes truth;
  for (int64_t i = 0; i < 4 * kLanes; ++i) truth[i] = static_cast<uint8_t>(are_in[i / kLanes][i % kLanes] & 1);
  return truth;
#endif
}

// One rounded product and one product added to it with one rounding, as the compiled `F.interpolate` has it. Where the
// processor has no instruction for that, nor has that, and the sum rounds twice.
DETPOST_INLINE Floats blend(const Floats& upper, const Floats& lower, float upper_weight, float lower_weight) {
  Floats product = lower * lower_weight;
  hold(product);
#if DETPOST_FMA
  const Floats weight = upper_weight - (Floats){};
  return fused(upper, weight, product);
#else
  Floats other = upper * upper_weight;
  hold(other);
  return other + product;
#endif
}

template <bool kInclusive>
DETPOST_INLINE void blend_row(const BlendArguments& of, const float* upper, const float* lower, float upper_weight,
                              float lower_weight, uint8_t* out) {
  constexpr int64_t kAtOnce = 4 * kLanes;
  for (int64_t x = 0; x < of.width; x += kAtOnce) {
    // The last numbers of a row that is long enough are looked at with some before them; a shorter row is copied.
    float ends[2 * kAtOnce];
    const float *above = upper + x, *below = lower + x;
    const int64_t left = of.width - x;
    int64_t back = 0;
    if (left < kAtOnce) {
      if (of.width >= kAtOnce) {
        back = kAtOnce - left;
        above -= back, below -= back;
      } else {
        std::memset(ends, 0, sizeof ends);
        std::memcpy(ends, above, left * sizeof *above);
        std::memcpy(ends + kAtOnce, below, left * sizeof *below);
        above = ends, below = ends + kAtOnce;
      }
    }
    Ints are_in[4];
    for (int i = 0; i < 4; ++i) {
      Floats first, second;
      load(first, above + i * kLanes);
      load(second, below + i * kLanes);
      const Floats blended = blend(first, second, upper_weight, lower_weight);
      are_in[i] = kInclusive ? blended >= of.threshold : blended > of.threshold;
    }
    const Bytes truth = as_bytes(are_in);
    std::memcpy(out + x - back, &truth, left < kAtOnce && back == 0 ? left : kAtOnce);
  }
}

static void blend_mask(const void* data, int64_t mask) {
  const BlendArguments& of = *static_cast<const BlendArguments*>(data);
  const float* rows = of.rows + mask * of.source_height * of.width;
  uint8_t* out = of.masks + mask * of.height * of.width;
  for (int64_t y = 0; y < of.height; ++y, out += of.width) {
    const float *upper = rows + of.upper[y] * of.width, *lower = rows + of.lower[y] * of.width;
    if (of.inclusive) {
      blend_row<true>(of, upper, lower, of.upper_weights[y], of.lower_weights[y], out);
    } else {
      blend_row<false>(of, upper, lower, of.upper_weights[y], of.lower_weights[y], out);
    }
  }
}
