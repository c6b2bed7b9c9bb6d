// Codes of b bits as kernels/bitpack.py packs them: blocks of 128 in planes of 8, 4, 2 and 1 bits, the rest in units of
// 32.
//
// A *slot* is 16 neighbouring columns of a row, one code in each of 16 bytes. A field of a plane's 16-byte chunk is a
// whole slot, and fields are in the order of the columns, so no code ever moves between lanes.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "simd.h"

constexpr int BLOCK = 128, SLOTS = 8, UNIT = 32;
constexpr int AHEAD = 4096;  // bytes to prefetch ahead: a whole page, as the data crosses pages

// Prefetches memory.
INLINE void fetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + i, _MM_HINT_T0);
}

// Code i of n that are packed at p. Slow: for tails of rows.
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

// The `width` bits of every byte from bit n on, moved to bit `to`.
template <typename Vector>
INLINE Vector field(Vector v, int n, int to, int width) {
  if (n != to) v = n > to ? shr(v, n - to) : shl(v, to - n);
  return width < 8 ? keep(v, ((1 << width) - 1) << to) : v;
}

// Calls use(slot, its codes) for the slots of a block, in order. at16(i) returns the block's bytes i .. i + 15, of one
// row or of each row of a tile.
template <int BITS, typename At, typename Use>
INLINE void each_slot(At at16, Use use) {
  constexpr int WIDE = BITS >= 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1, FIELDS = 8 / WIDE;
  constexpr bool two = WIDE > 2 && BITS & 2, one = WIDE > 1 && BITS & 1;
  using Vector = decltype(at16(0));
  Vector high, middle, low;
  if constexpr (one) low = at16(16 * (BITS - 1));
#pragma GCC unroll 8
  for (int slot = 0; slot < SLOTS; slot++) {
    if (slot % FIELDS == 0) high = at16(slot / FIELDS * 16);
    Vector q = field(high, slot % FIELDS * WIDE, BITS - WIDE, WIDE);
    if constexpr (two) {
      if (slot % 4 == 0) middle = at16(64 + slot / 4 * 16);
      q = either(q, field(middle, slot % 4 * 2, one, 2));
    }
    if constexpr (one) q = either(q, field(low, slot, 0, 1));
    use(slot, q);
  }
}

// The same for one row whose block begins at p.
template <int BITS, typename Use>
INLINE void each_slot_of_row(const uint8_t* p, Use use) {
  each_slot<BITS>([&](int at) { return _mm_loadu_si128((const __m128i*)(p + at)); }, use);
}

// Pointers to R tiles of rows that are multiplied together.
template <int R>
struct Rows {
  const uint8_t* p[R * TILE];

  // Rows from `first` on. Row `last` stands in for the rows behind it.
  Rows(const uint8_t* weight, int64_t row_bytes, int first, int last) {
    for (int i = 0; i < R * TILE; i++) p[i] = weight + std::min(first + i, last) * row_bytes;
  }

  // Calls use(slot, codes of all rows) for the slots of block k. Prefetches the same block of the next rows, which
  // follow in memory.
  template <int BITS, typename Use>
  INLINE void each_slot_of(int k, int64_t row_bytes, Use use) const {
    const int64_t start = (int64_t)k * 16 * BITS;
    each_slot<BITS>(
        [&](int at) {
          Many<R> found;
          for (int j = 0; j < R; j++) found.v[j] = rows16(p + j * TILE, start + at);
          return found;
        },
        use);
    if (start % 64 >= 16 * BITS) return;  // that cache line was prefetched already
    for (int i = 0; i < R * TILE; i++)
      for (int line = 0; line < 16 * BITS; line += 64)
        _mm_prefetch((const char*)p[i] + start + R * TILE * row_bytes + line, _MM_HINT_T1);
  }
};

// The codes of one block of one row in the order of the columns.
template <int BITS>
INLINE void ordered_codes(const uint8_t* p, uint8_t* out) {
  each_slot_of_row<BITS>(p, [&](int slot, __m128i q) { _mm_storeu_si128((__m128i*)(out + 16 * slot), q); });
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

// Codes first..last of `count` that are packed at p, from out[first % BLOCK] on.
inline void read_codes(const uint8_t* p, int64_t count, int bits, int64_t first, int64_t last, std::vector<uint8_t>& out) {
  const int64_t begin = first / BLOCK * BLOCK, whole = std::min(count / BLOCK * BLOCK, (last + BLOCK - 1) / BLOCK * BLOCK);
  out.resize(last - begin + BLOCK);
  with_bits(bits, [&](auto width) {
    for (int64_t i = begin; i < whole; i += BLOCK) {
      const uint8_t* from = p + i / BLOCK * 16 * width;
      fetch(from + AHEAD, 16 * width);
      ordered_codes<width>(from, out.data() + i - begin);
    }
  });
  for (int64_t i = std::max(whole, begin); i < last; i++) out[i - begin] = code_at(p, i, count, bits);
}
