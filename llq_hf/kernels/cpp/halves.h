// Decode to bf16 or fp16 by a table of the levels of a row and group: one instruction turns 32 codes into 32 values.
#pragma once
#include "codes.h"
#include "numbers.h"

#ifdef __AVX512VNNI__
constexpr int MOST_LEVELS_BITS = 5;  // codes that index a vector of 32 halves

// 16 numbers as halves.
INLINE __m256i halves(Floats v, Dtype dtype) {
  if (dtype != BF16) return _mm512_cvtps_ph(v, 0);
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);  // ties to even, as torch
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}

// 32 levels as halves.
INLINE Bytes halves(Floats low, Floats high, Dtype dtype) { return join(halves(low, dtype), halves(high, dtype)); }

// 16 bytes of codes become 16 halves.
INLINE __m256i pick16(__m128i codes, Bytes levels) {
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_castsi256_si512(_mm256_cvtepu8_epi16(codes)), levels));
}

// Decodes a block of one row. salient: 128 bytes that are OR-ed to the codes, or null.
template <int BITS>
INLINE void pick(const uint8_t* p, Bytes levels, const uint8_t* salient, uint16_t* out) {
  each_slot_of_row<BITS>(p, [&](int slot, __m128i q) {
    if (salient) q = _mm_or_si128(q, _mm_loadu_si128((const __m128i*)(salient + 16 * slot)));
    _mm256_storeu_si256((__m256i*)(out + 16 * slot), pick16(q, levels));
  });
}
#endif
