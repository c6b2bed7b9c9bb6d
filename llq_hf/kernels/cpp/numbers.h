// Conversions between fp32 and the three dtypes of activations, scales and outputs.
#pragma once
#include <cstring>

#include "simd.h"

enum Dtype : int32_t { NONE = 0, F16 = 1, F32 = 2, BF16 = 3 };

// Rounds to nearest, ties to even, as torch does.
inline uint16_t to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if (v != v) return 0x7fc0;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

INLINE __m128i to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i up = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  up = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}

constexpr int64_t size_of(Dtype dtype) { return dtype == F32 ? 4 : 2; }

inline void to_floats(const void* from, Dtype dtype, int64_t count, float* out) {
  if (dtype == F32) {
    memcpy(out, from, count * 4);
  } else if (dtype == BF16) {
    const uint16_t* p = (const uint16_t*)from;
    for (int64_t i = 0; i < count; i++) {
      const uint32_t bits = (uint32_t)p[i] << 16;
      memcpy(out + i, &bits, 4);
    }
  } else {
    const uint16_t* p = (const uint16_t*)from;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i))));
    for (; i < count; i++) out[i] = _cvtsh_ss(p[i]);
  }
}

inline void from_floats(const float* from, int64_t count, Dtype dtype, void* out) {
  if (dtype == F32) {
    memcpy(out, from, count * 4);
    return;
  }
  uint16_t* p = (uint16_t*)out;
  int64_t i = 0;
  if (dtype == BF16) {
    for (; i + 8 <= count; i += 8) _mm_storeu_si128((__m128i*)(p + i), to_bf16(_mm256_loadu_ps(from + i)));
    for (; i < count; i++) p[i] = to_bf16(from[i]);
  } else {
    for (; i + 8 <= count; i += 8) _mm_storeu_si128((__m128i*)(p + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    for (; i < count; i++) p[i] = _cvtss_sh(from[i], 0);
  }
}

// A vector with four floats for each group: from four numbers of dtype D, from three and a zero, or from two, twice. Each
// function reads a whole vector, whatever it uses of it.
template <Dtype D>
INLINE Floats load_quads(const uint8_t* p) {
  if constexpr (D == F32) return loadf((const float*)p);
#ifdef __AVX512VNNI__
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
}
template <Dtype D>
INLINE Floats load_triples(const uint8_t* p) {
  const Floats v = load_quads<D>(p);
#ifdef __AVX512VNNI__
  return _mm512_maskz_permutexvar_ps(0x7777, _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0), v);
#else
  return _mm256_blend_ps(_mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0)), _mm256_setzero_ps(), 0x88);
#endif
}
template <Dtype D>
INLINE Floats load_pairs(const uint8_t* p) {
  const Floats v = load_quads<D>(p);
#ifdef __AVX512VNNI__
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7), v);
#else
  return _mm256_permutevar8x32_ps(v, _mm256_setr_epi32(0, 1, 0, 1, 2, 3, 2, 3));
#endif
}

// Eight numbers of dtype D as floats.
template <Dtype D>
INLINE __m256 load_eight(const uint8_t* p) {
  if constexpr (D == F32) return _mm256_loadu_ps((const float*)p);
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
