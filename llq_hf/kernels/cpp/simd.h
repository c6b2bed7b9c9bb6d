// Vectors of bytes and of floats, as wide as this build's instruction set allows: AVX-512 with VNNI, or AVX2.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define INLINE inline __attribute__((always_inline))

// A constant vector of equal numbers: loading one is faster than computing it.
struct alignas(64) Number {
  int32_t all[16];
  constexpr Number(int n) : all{n, n, n, n, n, n, n, n, n, n, n, n, n, n, n, n} {}
};
#ifdef __AVX512VNNI__
constexpr int WIDTH = 64;  // bytes in a vector
using Bytes = __m512i;
using Floats = __m512;

INLINE Bytes load(const void* p) { return _mm512_loadu_si512(p); }
INLINE void store(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
INLINE Bytes both16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }
INLINE Bytes shr(Bytes v, int n) { return _mm512_srli_epi16(v, n); }
INLINE Bytes shl(Bytes v, int n) { return _mm512_slli_epi16(v, n); }
INLINE Bytes keep(Bytes v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi8((char)mask)); }
INLINE Bytes plus(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
INLINE Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
INLINE Bytes minus(Bytes v) { return _mm512_sub_epi8(_mm512_setzero_si512(), v); }
INLINE Bytes eights(uint64_t v) { return _mm512_set1_epi64(v); }
// 255 where a has the one bit that b has.
INLINE Bytes tested(Bytes a, Bytes b) { return _mm512_movm_epi8(_mm512_test_epi8_mask(a, b)); }
// In each 16 bytes: pick takes those at the indices q; turned swaps the two halves.
INLINE Bytes pick(Bytes table, Bytes q) { return _mm512_shuffle_epi8(table, q); }
INLINE Bytes flip(Bytes v, int mask) { return _mm512_xor_si512(v, _mm512_set1_epi8(mask)); }
INLINE Bytes saturated(Bytes v, int n) { return _mm512_adds_epu8(v, _mm512_set1_epi8(n)); }
INLINE Bytes turned(Bytes v) { return _mm512_shuffle_epi32(v, _MM_PERM_BADC); }
INLINE Bytes plus8(Bytes v, int n) { return _mm512_add_epi8(v, _mm512_set1_epi8(n)); }
// Narrowed with saturation: in each 16 bytes those of a, then those of b.
INLINE Bytes packed32(Bytes a, Bytes b) { return _mm512_packs_epi32(a, b); }
INLINE Bytes packed16(Bytes a, Bytes b) { return _mm512_packus_epi16(a, b); }
INLINE __m128i lane16(Bytes v, int lane) {
  return lane == 0   ? _mm512_castsi512_si128(v)
         : lane == 1 ? _mm512_extracti32x4_epi32(v, 1)
         : lane == 2 ? _mm512_extracti32x4_epi32(v, 2)
                     : _mm512_extracti32x4_epi32(v, 3);
}
INLINE Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
INLINE Floats set(float v) { return _mm512_set1_ps(v); }
INLINE Floats loadf(const float* p) { return _mm512_loadu_ps(p); }
INLINE void storef(float* p, Floats v) { _mm512_storeu_ps(p, v); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE float largest(Floats v) { return _mm512_reduce_max_ps(v); }
INLINE Bytes rounded(Floats v) { return _mm512_cvtps_epi32(v); }
INLINE Floats whole(Floats v) { return _mm512_roundscale_ps(v, 0); }
// int32 numbers; total32 is their sum, store_narrow keeps the lowest byte of each.
INLINE Bytes zeros() { return _mm512_setzero_si512(); }
INLINE Bytes ints(int n) { return _mm512_set1_epi32(n); }
INLINE Bytes minus32(Bytes a, Bytes b) { return _mm512_sub_epi32(a, b); }
template <int N>
INLINE Bytes shifted32(Bytes v) {
  return _mm512_srai_epi32(v, N);
}
template <int N>
INLINE Bytes shl32(Bytes v) {
  return _mm512_slli_epi32(v, N);
}
INLINE int total32(Bytes v) { return _mm512_reduce_add_epi32(v); }
INLINE void store_narrow(int8_t* p, Bytes v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
INLINE Floats greater(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats size(Floats v) { return _mm512_abs_ps(v); }
// quads: a vector that repeats four floats; quad: numbers A, B, C, D of each four floats; firsts: the first of each four.
INLINE Floats quads(float a, float b, float c, float d) { return _mm512_broadcast_f32x4(_mm_setr_ps(a, b, c, d)); }
template <int A, int B, int C, int D>
INLINE Floats quad(Floats v) {
  return _mm512_permute_ps(v, A | B << 2 | C << 4 | D << 6);
}
INLINE void firsts(Floats v, float* out) {
  const __m512i four = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(four, v)));
}
// WIDTH / 4 unsigned bytes as floats.
INLINE Floats floats(__m128i v) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(v)); }
INLINE Floats floats(const uint8_t* p) { return floats(_mm_loadu_si128((const __m128i*)p)); }
INLINE float total(Floats v) { return _mm512_reduce_add_ps(v); }
// LANES bytes as int32.
INLINE Bytes widened(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// table[q[i]] for LANES codes below 8.
INLINE Floats look_up(const float* table, const uint8_t* q) {
  return _mm512_permutexvar_ps(widened(q), _mm512_castps256_ps512(_mm256_loadu_ps(table)));
}
// Sixteen levels, selected by the low 4 bits of each lane.
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
// 128 high + low, the sums of both digits.
INLINE Floats joined(Bytes high, Bytes low) {
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 7), low));
}

// Number i of each four floats, repeated four times.
INLINE Floats spread(Floats v, int i) {
  static constexpr Number numbers[4] = {Number(0), Number(1), Number(2), Number(3)};
  return _mm512_permutevar_ps(v, _mm512_load_si512(&numbers[i]));
}
// The same four floats for each row of a tile.
INLINE Floats four(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
// One number for each row of a tile, repeated four times.
INLINE Floats each_row(const float* p) {
  const __m512i row = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(row, _mm512_castps128_ps512(_mm_loadu_ps(p)));
}
// The sum of each four floats.
INLINE void totals(Floats v, float* out) {
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1));
  v = _mm512_add_ps(v, _mm512_permute_ps(v, 0x4e));
  firsts(v, out);
}
// 16 bytes at each of p[0..3]: one slot of the rows of a tile; and of rows that are `stride` bytes apart.
INLINE Bytes each16(const uint8_t* const* p) {
  Bytes v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p[0]));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)p[1]), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)p[2]), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)p[3]), 3);
}
INLINE Bytes rows16(const uint8_t* p, int64_t stride) {
  const uint8_t* const each[4] = {p, p + stride, p + 2 * stride, p + 3 * stride};
  return each16(each);
}
// Bit 0 of all 16 bytes, then bit 1, ...
INLINE void planes(__m128i v, uint64_t* out) {
  const Bytes all = _mm512_broadcast_i32x4(v), bit = _mm512_setr_epi64(
      0x0101010101010101, 0x0101010101010101, 0x0202020202020202, 0x0202020202020202,
      0x0404040404040404, 0x0404040404040404, 0x0808080808080808, 0x0808080808080808);
  out[0] = _mm512_test_epi8_mask(all, bit);
  out[1] = _mm512_test_epi8_mask(all, _mm512_slli_epi16(bit, 4));
}
#else
constexpr int WIDTH = 32;
using Bytes = __m256i;
using Floats = __m256;

INLINE Bytes load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store(void* p, Bytes v) { _mm256_storeu_si256((__m256i*)p, v); }
INLINE Bytes both16(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
INLINE Bytes shr(Bytes v, int n) { return _mm256_srli_epi16(v, n); }
INLINE Bytes shl(Bytes v, int n) { return _mm256_slli_epi16(v, n); }
INLINE Bytes keep(Bytes v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi8((char)mask)); }
INLINE Bytes plus(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
INLINE Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
INLINE Bytes minus(Bytes v) { return _mm256_sub_epi8(_mm256_setzero_si256(), v); }
INLINE Bytes eights(uint64_t v) { return _mm256_set1_epi64x(v); }
INLINE Bytes tested(Bytes a, Bytes b) { return _mm256_cmpeq_epi8(_mm256_and_si256(a, b), b); }
INLINE Bytes pick(Bytes table, Bytes q) { return _mm256_shuffle_epi8(table, q); }
INLINE Bytes flip(Bytes v, int mask) { return _mm256_xor_si256(v, _mm256_set1_epi8(mask)); }
INLINE Bytes saturated(Bytes v, int n) { return _mm256_adds_epu8(v, _mm256_set1_epi8(n)); }
INLINE Bytes turned(Bytes v) { return _mm256_shuffle_epi32(v, 0x4e); }
INLINE Bytes plus8(Bytes v, int n) { return _mm256_add_epi8(v, _mm256_set1_epi8(n)); }
INLINE Bytes packed32(Bytes a, Bytes b) { return _mm256_packs_epi32(a, b); }
INLINE Bytes packed16(Bytes a, Bytes b) { return _mm256_packus_epi16(a, b); }
INLINE __m128i lane16(Bytes v, int lane) { return lane ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v); }
INLINE Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
INLINE Floats set(float v) { return _mm256_set1_ps(v); }
INLINE Floats loadf(const float* p) { return _mm256_loadu_ps(p); }
INLINE void storef(float* p, Floats v) { _mm256_storeu_ps(p, v); }
INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE float largest(Floats v) {
  const __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
INLINE Bytes rounded(Floats v) { return _mm256_cvtps_epi32(v); }
INLINE Floats whole(Floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Bytes zeros() { return _mm256_setzero_si256(); }
INLINE Bytes ints(int n) { return _mm256_set1_epi32(n); }
INLINE Bytes minus32(Bytes a, Bytes b) { return _mm256_sub_epi32(a, b); }
template <int N>
INLINE Bytes shifted32(Bytes v) {
  return _mm256_srai_epi32(v, N);
}
template <int N>
INLINE Bytes shl32(Bytes v) {
  return _mm256_slli_epi32(v, N);
}
INLINE int total32(Bytes v) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
INLINE void store_narrow(int8_t* p, Bytes v) {
  const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(pairs, pairs));
}
INLINE Floats greater(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats size(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
INLINE Floats quads(float a, float b, float c, float d) { return _mm256_setr_ps(a, b, c, d, a, b, c, d); }
template <int A, int B, int C, int D>
INLINE Floats quad(Floats v) {
  return _mm256_permute_ps(v, A | B << 2 | C << 4 | D << 6);
}
INLINE void firsts(Floats v, float* out) {
  out[0] = _mm256_cvtss_f32(v);
  out[1] = _mm_cvtss_f32(_mm256_extractf128_ps(v, 1));
}
INLINE Floats floats(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE Bytes widened(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
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

// maddubs sums pairs in int16. With codes up to 15 the sums over a block fit too (8 slots: 8 * 2 * 15 * 127 = 30480).
// Codes of 8 bits are therefore split in halves.
template <int BITS>
struct Sum {
  Bytes v = _mm256_setzero_si256(), upper = _mm256_setzero_si256();
  static INLINE Bytes wide(Bytes pairs, int factor) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(factor)); }
  INLINE void add(Bytes codes, Bytes digits) {
    if constexpr (BITS <= 4) {
      v = _mm256_add_epi16(v, _mm256_maddubs_epi16(codes, digits));
    } else if constexpr (BITS < 8) {
      v = plus(v, wide(_mm256_maddubs_epi16(codes, digits), 1));
    } else {
      v = _mm256_add_epi16(v, _mm256_maddubs_epi16(keep(codes, 15), digits));
      upper = _mm256_add_epi16(upper, _mm256_maddubs_epi16(keep(shr(codes, 4), 15), digits));
    }
  }
  INLINE Bytes ints() const {
    if constexpr (BITS <= 4) return wide(v, 1);
    if constexpr (BITS < 8) return v;
    return plus(wide(v, 1), wide(upper, 16));
  }
};
INLINE Floats joined(Bytes high, Bytes low) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high, 7), low));
}

INLINE Floats spread(Floats v, int i) { return _mm256_permutevar_ps(v, _mm256_set1_epi32(i)); }
INLINE Floats four(const float* p) { return _mm256_broadcast_ps((const __m128*)p); }
INLINE Floats each_row(const float* p) { return _mm256_setr_m128(_mm_set1_ps(p[0]), _mm_set1_ps(p[1])); }
INLINE void totals(Floats v, float* out) {
  v = _mm256_add_ps(v, _mm256_permute_ps(v, 0xb1));
  v = _mm256_add_ps(v, _mm256_permute_ps(v, 0x4e));
  firsts(v, out);
}
INLINE Bytes each16(const uint8_t* const* p) {
  const __m256i v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p[0]));
  return _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)p[1]), 1);
}
INLINE Bytes rows16(const uint8_t* p, int64_t stride) {
  const uint8_t* const each[2] = {p, p + stride};
  return each16(each);
}
INLINE void planes(__m128i v, uint64_t* out) {
  out[0] = out[1] = 0;
  for (int f = 0; f < 8; f++)
    out[f / 4] |= (uint64_t)_mm_movemask_epi8(_mm_sll_epi16(v, _mm_cvtsi32_si128(7 - f))) << f % 4 * 16;
}
#endif

#ifdef __AVX512VBMI2__
// Those of 128 bytes that have the numbers `index`.
INLINE Bytes gather128(const int8_t* table, Bytes index) {
  return _mm512_permutex2var_epi8(load(table), index, load(table + WIDTH));
}
// For each one in `bits` the number of zeros before it: its position less the number of ones before it.
INLINE Bytes zeros_before_ones(uint64_t bits) {
  alignas(64) static constexpr uint8_t steps[64] = {
      0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
      22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43,
      44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
  const Bytes all = load(steps);
  return _mm512_sub_epi8(_mm512_maskz_compress_epi8(bits, all), all);
}
// The same to out[0..], of which up to 64 bytes may be written.
INLINE void zeros_before_ones(uint64_t bits, uint8_t* out) { store(out, zeros_before_ones(bits)); }
// The number of ones before the zeros n, n + step, ... of `bits`: `count` numbers, of zeros that exist. A multiple of
// 16 numbers may be written.
INLINE void ones_before_zeros(uint64_t bits, int n, int step, int count, int32_t* out) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const Bytes all = zeros_before_ones(~bits), strides = _mm512_mullo_epi32(lane, _mm512_set1_epi32(step));
  for (int i = 0; i < count; i += 16, n += 16 * step) {
    const Bytes found = _mm512_permutexvar_epi8(plus(strides, _mm512_set1_epi32(n)), all);
    store(out + i, both(found, _mm512_set1_epi32(255)));
  }
}
#else
INLINE Bytes gather128(const int8_t* table, Bytes index) {
  Bytes found{};
  for (int slot = 0; slot < 8; slot++)  // the index of another slot gets a top bit, for which `pick` gives zero
    found = either(found, pick(both16(table + 16 * slot), saturated(flip(index, 16 * slot), 0x70)));
  return found;
}
INLINE void zeros_before_ones(uint64_t bits, uint8_t* out) {
  for (int i = 0; bits; bits &= bits - 1, i++) out[i] = __builtin_ctzll(bits) - i;
}
INLINE void ones_before_zeros(uint64_t bits, int n, int step, int count, int32_t* out) {
  uint64_t zeros = ~bits;
  for (int i = 0, passed = 0; i < count; i++, n += step) {
    for (; passed < n; passed++) zeros &= zeros - 1;
    out[i] = zeros ? __builtin_ctzll(zeros) - n : 0;
  }
}
#endif

// Number i of each four floats, where the compiler knows i.
INLINE Floats spread_known(Floats v, int i) {
  switch (i) {
    case 0: return quad<0, 0, 0, 0>(v);
    case 1: return quad<1, 1, 1, 1>(v);
    case 2: return quad<2, 2, 2, 2>(v);
    default: return quad<3, 3, 3, 3>(v);
  }
}

// Several vectors with the same operations.
template <int N>
struct Many {
  Bytes v[N];
};
template <int N>
INLINE Many<N> shr(Many<N> a, int n) {
  for (Bytes& v : a.v) v = shr(v, n);
  return a;
}
template <int N>
INLINE Many<N> shl(Many<N> a, int n) {
  for (Bytes& v : a.v) v = shl(v, n);
  return a;
}
template <int N>
INLINE Many<N> keep(Many<N> a, int mask) {
  for (Bytes& v : a.v) v = keep(v, mask);
  return a;
}
template <int N>
INLINE Many<N> either(Many<N> a, const Many<N>& b) {
  for (int i = 0; i < N; i++) a.v[i] = either(a.v[i], b.v[i]);
  return a;
}

// Each 16 bits AND `mask`.
template <int MASK>
INLINE Bytes keep16(Bytes v) {
  static constexpr Number mask(MASK << 16 | MASK);
  return both(v, load(&mask));
}

// The same operations on 16 bytes, one row.
INLINE __m128i shr(__m128i v, int n) { return _mm_srli_epi16(v, n); }
INLINE __m128i shl(__m128i v, int n) { return _mm_slli_epi16(v, n); }
INLINE __m128i keep(__m128i v, int mask) { return _mm_and_si128(v, _mm_set1_epi8((char)mask)); }
INLINE __m128i either(__m128i a, __m128i b) { return _mm_or_si128(a, b); }

constexpr int LANES = WIDTH / 4;
constexpr int TILE = WIDTH / 16;  // rows that share a vector: each has 16 bytes of it, or four floats
// Number of tiles that are multiplied together with TOKENS tokens, so that loaded activations are shared.
template <int BITS, int TOKENS>
constexpr int TILES = WIDTH == 32 ? (TOKENS == 1 ? 2 : 1) : (TOKENS == 1 && BITS < 4 ? 4 : 2);
constexpr int MOST_ROWS = 16;
