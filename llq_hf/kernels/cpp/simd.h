// Vectors of bytes and of floats as wide as the instruction set of this build has them: AVX-512 with VNNI, or AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define INLINE inline __attribute__((always_inline))

#ifdef __AVX512VNNI__
constexpr int WIDTH = 64;  // bytes in a vector
using Bytes = __m512i;
using Floats = __m512;

INLINE Bytes load(const void* p) { return _mm512_loadu_si512(p); }
INLINE Bytes both16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes both32(const void* p) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Bytes join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
INLINE Bytes shr(Bytes v, int n) { return _mm512_srli_epi16(v, n); }
INLINE Bytes shl(Bytes v, int n) { return _mm512_slli_epi16(v, n); }
INLINE Bytes shr_lanes(Bytes v, int a, int b, int c, int d) {
  return _mm512_srlv_epi32(v, _mm512_set_epi32(d, d, d, d, c, c, c, c, b, b, b, b, a, a, a, a));
}
INLINE Bytes keep(Bytes v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }
INLINE Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
INLINE Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
INLINE Floats set(float v) { return _mm512_set1_ps(v); }
INLINE Floats loadf(const float* p) { return _mm512_loadu_ps(p); }
INLINE void storef(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
// WIDTH / 4 unsigned bytes as floats.
INLINE Floats floats(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE float total(Floats v) { return _mm512_reduce_add_ps(v); }
// 16 bytes of a vector.
INLINE __m128i lane16(Bytes v, int lane) {
  return lane == 0   ? _mm512_castsi512_si128(v)
         : lane == 1 ? _mm512_extracti32x4_epi32(v, 1)
         : lane == 2 ? _mm512_extracti32x4_epi32(v, 2)
                     : _mm512_extracti32x4_epi32(v, 3);
}
// LANES bytes as int32.
INLINE Bytes widened(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes high_half(Bytes v) { return _mm512_srli_epi32(v, 4); }
// table[q[i]] for LANES codes below 8.
INLINE Floats look_up(const float* table, const uint8_t* q) {
  return _mm512_permutexvar_ps(widened(q), _mm512_castps256_ps512(_mm256_loadu_ps(table)));
}
// Sixteen levels, picked by the low 4 bits of every lane.
struct Sixteen {
  Floats all;
  Sixteen() = default;
  explicit Sixteen(const float* p) : all(loadf(p)) {}
  INLINE Floats at(Bytes q) const { return _mm512_permutexvar_ps(q, all); }
};

// Sums of products of unsigned codes and signed digits, in int32.
template <int BITS>
struct Sum {
  Bytes v = _mm512_setzero_si512();
  INLINE void add(Bytes codes, Bytes digits) { v = _mm512_dpbusd_epi32(v, codes, digits); }
  INLINE Bytes ints() const { return v; }
};
// 128 high + low, of both digits' sums.
INLINE Floats joined(Bytes high, Bytes low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
}

// p[r][a] for the first half of the lanes of row r, p[r][b] for the other; of 1 or 2 rows.
template <int ROWS>
INLINE Floats spread_halves(const float* const* p, int a, int b) {
  Floats v = _mm512_mask_broadcastss_ps(set(p[0][a]), ROWS == 1 ? 0xff00 : 0x00f0, _mm_load_ss(p[0] + b));
  if constexpr (ROWS == 1) return v;
  v = _mm512_mask_broadcastss_ps(v, 0x0f00, _mm_load_ss(p[ROWS - 1] + a));
  return _mm512_mask_broadcastss_ps(v, 0xf000, _mm_load_ss(p[ROWS - 1] + b));
}

// p[r][i] for every lane of row r, where a vector holds ROWS rows.
template <int ROWS>
INLINE Floats spread(const float* const* p, int i) {
  Floats v = set(p[0][i]);
  if constexpr (ROWS == 4) v = _mm512_mask_broadcastss_ps(v, 0x00f0, _mm_load_ss(p[1] + i));
  if constexpr (ROWS >= 2) v = _mm512_mask_broadcastss_ps(v, 0xff00, _mm_load_ss(p[ROWS / 2] + i));
  if constexpr (ROWS == 4) v = _mm512_mask_broadcastss_ps(v, 0xf000, _mm_load_ss(p[3] + i));
  return v;
}
#else
constexpr int WIDTH = 32;
using Bytes = __m256i;
using Floats = __m256;

INLINE Bytes load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE Bytes both16(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes shr(Bytes v, int n) { return _mm256_srli_epi16(v, n); }
INLINE Bytes shl(Bytes v, int n) { return _mm256_slli_epi16(v, n); }
INLINE Bytes shr_lanes(Bytes v, int a, int b) {
  return _mm256_srlv_epi32(v, _mm256_set_epi32(b, b, b, b, a, a, a, a));
}
INLINE Bytes keep(Bytes v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8((char)mask)); }
INLINE Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
INLINE Floats set(float v) { return _mm256_set1_ps(v); }
INLINE Floats loadf(const float* p) { return _mm256_loadu_ps(p); }
INLINE void storef(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats floats(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE __m128i lane16(Bytes v, int lane) { return lane ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v); }
INLINE Bytes widened(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
INLINE Bytes high_half(Bytes v) { return _mm256_srli_epi32(v, 4); }
INLINE Floats look_up(const float* table, const uint8_t* q) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), widened(q));
}
struct Sixteen {
  Floats low, high;
  Sixteen() = default;
  explicit Sixteen(const float* p) : low(loadf(p)), high(loadf(p + 8)) {}
  INLINE Floats at(Bytes q) const {  // bit 3 chooses the half
    const Floats half = _mm256_castsi256_ps(_mm256_slli_epi32(q, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, q), _mm256_permutevar8x32_ps(high, q), half);
  }
};
INLINE float total(Floats v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// maddubs sums pairs in int16: of codes up to 15 the sums over a block fit (4 vectors: 4 * 2 * 15 * 127 = 15240).
template <int BITS>
struct Sum {
  Bytes low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
  INLINE void add(Bytes codes, Bytes digits) {
    if constexpr (BITS <= 4) {
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(codes, digits));
    } else {
      low = _mm256_add_epi16(low, _mm256_maddubs_epi16(keep(codes, 15), digits));
      high = _mm256_add_epi16(high, _mm256_maddubs_epi16(keep(shr(codes, 4), 15), digits));
    }
  }
  INLINE Bytes ints() const {
    Bytes sums = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
    if constexpr (BITS <= 4) return sums;
    return _mm256_add_epi32(sums, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
};
INLINE Floats joined(Bytes high, Bytes low) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high, 7), low));
}

template <int ROWS>
INLINE Floats spread_halves(const float* const* p, int a, int b) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(p[0] + a)), _mm_broadcast_ss(p[0] + b), 1);
}

template <int ROWS>
INLINE Floats spread(const float* const* p, int i) {
  if constexpr (ROWS == 1) return set(p[0][i]);
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_broadcast_ss(p[0] + i)), _mm_broadcast_ss(p[1] + i), 1);
}
#endif

constexpr int LANES = WIDTH / 4;

// Sums over the lanes of each row.
template <int ROWS>
INLINE void totals(Floats v, float* out) {
  if constexpr (ROWS == 1) {
    *out = total(v);
    return;
  }
  alignas(64) float lanes[LANES];
  storef(lanes, v);
  for (int r = 0; r < ROWS; r++) {
    out[r] = 0;
    for (int i = 0; i < LANES / ROWS; i++) out[r] += lanes[r * (LANES / ROWS) + i];
  }
}
