// Decoding to bf16 or fp16 through a table of the levels of a row and group: 32 codes become 32 values in one instruction.
#pragma once
#include "codes.h"
#include "numbers.h"

#ifdef __AVX512VNNI__
constexpr int MOST_LEVELS_BITS = 5;  // codes that index a vector of 32 halves

// 32 levels as halves.
INLINE Bytes halves(Floats low, Floats high, Dtype dtype) {
  __m256i a, b;
  if (dtype == BF16) {
    a = _mm256_set_m128i(to_bf16(_mm512_extractf32x8_ps(low, 1)), to_bf16(_mm512_castps512_ps256(low)));
    b = _mm256_set_m128i(to_bf16(_mm512_extractf32x8_ps(high, 1)), to_bf16(_mm512_castps512_ps256(high)));
  } else {
    a = _mm512_cvtps_ph(low, 0);
    b = _mm512_cvtps_ph(high, 0);
  }
  return join(a, b);
}

// 16 bytes of codes become 16 halves.
INLINE __m256i pick16(__m128i codes, Bytes levels) {
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(_mm256_cvtepu8_epi16(codes)), levels));
}

// A block of codes of one row as halves, by the levels of its first 64 columns and of the others; salient: 128 bytes to be
// OR-ed to the codes, or null.
template <int BITS>
INLINE void pick(const uint8_t* p, Bytes first, Bytes second, const uint8_t* salient, uint16_t* out) {
  each_slot_of_row<BITS>(p, [&](int slot, __m128i q) {
    if (salient) q = _mm_or_si128(q, _mm_loadu_si128((const __m128i*)(salient + 16 * slot)));
    _mm256_storeu_si256((__m256i*)(out + 16 * slot), pick16(q, slot < SLOTS / 2 ? first : second));
  });
}
#endif
