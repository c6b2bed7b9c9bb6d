// Codes of b bits as llq_hf/bits.py packs them: blocks of 128 in planes of 8, 4, 2 and 1 bits, what is left in units of 32.
//
// A *slot* is 16 bytes: 16 neighbouring columns of a row. Taking a plane's fields one after the other gives a block's
// eight slots in an order that depends on the width; the activations are put in the same order once (`slot_of`), so that
// no code ever moves between lanes.
#pragma once
#include <cstring>

#include "simd.h"

constexpr int BLOCK = 128, SLOTS = 8, UNIT = 32;

constexpr int64_t packed_bytes(int64_t n, int bits) {
  return n / BLOCK * 16 * bits + (n % BLOCK + UNIT - 1) / UNIT * 4 * bits;
}

// Code i of n that are packed at p. For what no vector is worth: tails of rows.
inline int code_at(const uint8_t* p, int64_t i, int64_t n, int bits) {
  const int64_t whole = n / BLOCK * BLOCK;
  const bool tail = i >= whole;
  const int block = tail ? UNIT : BLOCK;
  p += tail ? whole / 8 * bits + (i - whole) / UNIT * 4 * bits : i / BLOCK * 16 * bits;
  int at = (tail ? i - whole : i) % block, code = 0;
  for (int width = 8; width; width >>= 1) {
    if (!(bits & width)) continue;
    const int chunk = tail ? 4 * width : 16, per_chunk = chunk * 8 / width;
    const int byte = at / per_chunk * chunk + at % chunk, field = at % per_chunk / chunk;
    code = code << width | ((p[byte] >> field * width) & ((1 << width) - 1));
    p += block * width / 8;
  }
  return code;
}

// How many rows share a vector, and how many vectors hold their block.
template <int BITS>
constexpr int ROWS = BITS >= 4 ? 1 : (BITS == 1 ? WIDTH / 16 : WIDTH / 32);
template <int BITS>
constexpr int VECTORS = ROWS<BITS> * BLOCK / WIDTH;

// The slot (16 columns from 16 * slot on) that comes at `place`.
constexpr int slot_of(int bits, int place) {
  constexpr int two[SLOTS] = {0, 4, 1, 5, 2, 6, 3, 7}, wide[SLOTS] = {0, 2, 4, 6, 1, 3, 5, 7};
  constexpr int narrow[SLOTS] = {0, 2, 1, 3, 4, 6, 5, 7};
  if (bits == 2 || bits == 3) return two[place];
  if (bits >= 4 && bits < 8) return WIDTH == 64 ? wide[place] : narrow[place];
  return place;
}

// Which half of a block (64 columns) the bytes of vector n belong to; -1: to both, the lower lanes of each row to the first.
template <int BITS>
constexpr int half_of(int n) {
  if (BITS == 1 || BITS == 8 || (BITS >= 4 && WIDTH == 32)) return n / (VECTORS<BITS> / 2);
  return -1;
}

// The part of 128 digits that vector n of a block is multiplied with.
template <int BITS>
INLINE Bytes digits_of(const int8_t* block, int n) {
  block += n * (WIDTH / ROWS<BITS>);
  if constexpr (WIDTH / ROWS<BITS> == 16) return both16(block);
#ifdef __AVX512VNNI__
  if constexpr (WIDTH / ROWS<BITS> == 32) return both32(block);
#endif
  return load(block);
}

#ifdef __AVX512VNNI__
INLINE __m256i load32(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE __m256i twice16(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
// 16 bytes of each of 4 rows; 32 bytes of each of 2; the 16 bytes of each of 2, twice.
INLINE Bytes plane1(const uint8_t* const* p) {
  const __m256i low = _mm256_inserti128_si256(_mm256_loadu_si256((const __m256i*)p[0]), *(const __m128i_u*)p[1], 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_loadu_si256((const __m256i*)p[2]), *(const __m128i_u*)p[3], 1);
  return join(low, high);
}
INLINE Bytes plane2(const uint8_t* const* p) { return join(load32(p[0]), load32(p[1])); }
// A 1-bit plane beside a 2-bit one: slots (f, f + 4) of two rows for fields f = 0..3.
INLINE Bytes beside2(const uint8_t* const* p) { return shr_lanes(join(twice16(p[0] + 32), twice16(p[1] + 32)), 0, 4, 0, 4); }
// A 4-bit plane, and narrower planes beside it: slots 2h + f in lane h.
INLINE Bytes plane4(const uint8_t* p, int) { return load(p); }
INLINE Bytes two_beside4(const uint8_t* p, int) {
  const Bytes halves = _mm512_permutexvar_epi64(_mm512_set_epi64(3, 2, 3, 2, 1, 0, 1, 0), _mm512_castsi256_si512(load32(p)));
  return shr_lanes(halves, 0, 4, 0, 4);
}
INLINE Bytes one_beside4(const uint8_t* p, int) { return shr_lanes(both16(p), 0, 2, 4, 6); }
#else
INLINE Bytes plane1(const uint8_t* const* p) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(*(const __m128i_u*)p[0]), *(const __m128i_u*)p[1], 1);
}
INLINE Bytes plane2(const uint8_t* const* p) { return load(p[0]); }
INLINE Bytes beside2(const uint8_t* const* p) { return shr_lanes(both16(p[0] + 32), 0, 4); }
// Half a block: slots 4 half + 2 lane + f.
INLINE Bytes plane4(const uint8_t* p, int half) { return load(p + 32 * half); }
INLINE Bytes two_beside4(const uint8_t* p, int half) { return shr_lanes(both16(p + 16 * half), 0, 4); }
INLINE Bytes one_beside4(const uint8_t* p, int half) {
  const Bytes v = both16(p);
  return half ? shr_lanes(v, 4, 6) : shr_lanes(v, 0, 2);
}
#endif

// The codes of a block of ROWS<BITS> rows, one byte each; p[r] is where the block of row r begins.
template <int BITS>
INLINE void codes(const uint8_t* const* p, Bytes* out) {
  if constexpr (BITS == 1) {
    const Bytes v = plane1(p);
    for (int f = 0; f < 8; f++) out[f] = keep(shr(v, f), 1);
  } else if constexpr (BITS == 2) {
    const Bytes v = plane2(p);
    for (int f = 0; f < 4; f++) out[f] = keep(shr(v, 2 * f), 3);
  } else if constexpr (BITS == 3) {
    const Bytes v = plane2(p), low = beside2(p);
    for (int f = 0; f < 4; f++) out[f] = either(shl(keep(shr(v, 2 * f), 3), 1), keep(shr(low, f), 1));
  } else if constexpr (BITS == 8) {
    for (int n = 0; n < VECTORS<8>; n++) out[n] = load(p[0] + n * WIDTH);
  } else {
    for (int half = 0; half < VECTORS<BITS> / 2; half++) {
      const Bytes v = plane4(p[0], half);
      for (int f = 0; f < 2; f++) {
        Bytes q = keep(shr(v, 4 * f), 15);
        if constexpr (BITS & 2) q = either(shl(q, 2), keep(shr(two_beside4(p[0] + 64, half), 2 * f), 3));
        if constexpr (BITS & 1) q = either(shl(q, 1), keep(shr(one_beside4(p[0] + 16 * (BITS & 6), half), f), 1));
        out[2 * half + f] = q;
      }
    }
  }
}

// Calls put(slot, its 16 codes) for one block of one row. No detour over memory: a load that spans two fresh stores waits
// for both.
template <int BITS, typename Put>
INLINE void each_slot(const uint8_t* p, Put put) {
  const uint8_t* rows[4] = {p, p, p, p};
  constexpr int taken = WIDTH / ROWS<BITS> / 16;  // slots of each vector that belong to the first row
  Bytes v[VECTORS<BITS>];
  codes<BITS>(rows, v);
#pragma GCC unroll 8
  for (int place = 0; place < SLOTS; place++) put(slot_of(BITS, place), lane16(v[place / taken], place % taken));
}

// The codes of one block of one row in the order of the columns.
template <int BITS>
INLINE void ordered_codes(const uint8_t* p, uint8_t* out) {
  each_slot<BITS>(p, [&](int slot, __m128i q) { _mm_storeu_si128((__m128i*)(out + 16 * slot), q); });
}

// Calls f with a constant of the width.
template <typename F>
INLINE void with_bits(int bits, F f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    case 5: return f(std::integral_constant<int, 5>{});
    case 6: return f(std::integral_constant<int, 6>{});
    case 7: return f(std::integral_constant<int, 7>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}
