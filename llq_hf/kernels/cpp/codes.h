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
constexpr int ROWS_AHEAD = 4 * AHEAD;  // the same, at least, for rows of codes

// How n columns of a row lie in blocks.
struct Blocks {
  int whole, tail;  // whole blocks, and columns behind them
  explicit Blocks(int columns) : whole(columns / BLOCK), tail(columns % BLOCK) {}
  int all() const { return whole + (tail > 0); }
  int units() const { return (tail + UNIT - 1) / UNIT; }  // of the tail
  int64_t bytes(int bits) const { return (int64_t)(whole * BLOCK + units() * UNIT) / 8 * bits; }
};

// Prefetches memory.
INLINE void fetch(const uint8_t* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char*)p + i, _MM_HINT_T0);
}

// Code i of n that are packed at p. Slow: for the ends of lists.
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

// The columns behind the last whole block, which lie at p in 1 to 4 units, as one more block. Missing codes are zeros.
// Whole 16 bytes are stored, as reading what narrower stores wrote would wait for them.
template <int BITS>
INLINE void tail_block(const uint8_t* p, int units, uint8_t* out) {
  const auto keep16 = [&](int at, __m128i v) { _mm_store_si128((__m128i*)(out + at), v); };
  const auto unit = [&](int u, int from, auto load) { return u < units ? load(p + u * 4 * BITS + from) : _mm_setzero_si128(); };
  constexpr int FOUR = BITS & 8 ? 32 : 0, TWO = FOUR + (BITS & 4 ? 16 : 0), ONE = TWO + (BITS & 2 ? 8 : 0);
  const auto all = [](const uint8_t* p) { return _mm_loadu_si128((const __m128i*)p); };
  if constexpr (BITS & 8)
    for (int i = 0; i < 8; i++) keep16(16 * i, unit(i / 2, i % 2 * 16, all));
  if constexpr (BITS & 4)
    for (int i = 0; i < 4; i++) keep16(4 * FOUR + 16 * i, unit(i, FOUR, all));
  if constexpr (BITS & 2) {  // 8 bytes, whose fields are 8 columns; in a block, even and odd fields are 8 bytes apart
    const auto two_fields = [](const uint8_t* p) {
      const __m128i v = _mm_loadl_epi64((const __m128i*)p), apart = _mm_unpacklo_epi64(v, _mm_srli_epi64(v, 2));
      const __m128i first = _mm_set1_epi8(0x03);
      return _mm_or_si128(_mm_and_si128(apart, first), _mm_and_si128(_mm_srli_epi64(apart, 2), _mm_slli_epi64(first, 2)));
    };
    for (int i = 0; i < 2; i++)
      keep16(4 * TWO + 16 * i, _mm_or_si128(unit(2 * i, TWO, two_fields), _mm_slli_epi64(unit(2 * i + 1, TWO, two_fields), 4)));
  }
  if constexpr (BITS & 1) {  // 4 bytes, whose fields are 4 columns; in a block, four of them are 4 bytes apart
    const auto two_fields = [](const uint8_t* p) {
      int32_t four;
      memcpy(&four, p, 4);
      const __m128i apart = _mm_srlv_epi32(_mm_set1_epi32(four), _mm_setr_epi32(0, 1, 2, 3)), first = _mm_set1_epi8(0x01);
      return _mm_or_si128(_mm_and_si128(apart, first), _mm_and_si128(_mm_srli_epi32(apart, 3), _mm_slli_epi32(first, 1)));
    };
    __m128i found = _mm_setzero_si128();
    for (int u = 3; u >= 0; u--) found = _mm_or_si128(_mm_slli_epi32(found, 2), unit(u, ONE, two_fields));
    keep16(4 * ONE, found);
  }
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

// The last rows of a weight, fewer than `wanted`, with others behind them: a copy that lasts until the next call. Nothing
// may follow the `used` bytes of the last row.
inline const uint8_t* padded_rows(const uint8_t* rows, int64_t row_bytes, int64_t used, int count, int wanted) {
  static thread_local std::vector<uint8_t> copy;
  copy.resize(wanted * row_bytes);
  memcpy(copy.data(), rows, (count - 1) * row_bytes + used);
  return copy.data();
}

// R tiles of rows that are multiplied together.
template <int R>
struct Rows {
  static constexpr int COUNT = R * TILE;
  const uint8_t* p;
  int64_t stride, ahead;  // bytes from row to row; to prefetch ahead: whole steps of these rows, which follow each other

  // Rows from `first` to `last`, of which `used` bytes are read. Those behind the last, if these are too few, have no
  // meaning.
  Rows(const uint8_t* weight, int64_t row_bytes, int64_t used, int first, int last)
      : p(weight + first * row_bytes), stride(row_bytes),
        ahead(COUNT * row_bytes * std::max<int64_t>(1, ROWS_AHEAD / (COUNT * row_bytes))) {
    if (last - first < COUNT - 1) p = padded_rows(p, row_bytes, used, last - first + 1, COUNT);
  }

  // Makes the rows' tails, as blocks in `made` [COUNT][16 * BITS], their only blocks. Prefetches those of later rows.
  template <int BITS>
  __attribute__((noinline)) void turn_to_tails(const Blocks& blocks, uint8_t* made) {
    const uint8_t* from = p + (int64_t)blocks.whole * 16 * BITS;
    for (int i = 0; i < COUNT; i++, from += stride) {
      fetch(from + ahead, 4 * BITS * blocks.units());
      tail_block<BITS>(from, blocks.units(), made + i * 16 * BITS);
    }
    p = made;
    stride = 16 * BITS;
  }

  // Calls use(slot, codes of all rows) for the slots of block k. Prefetches the same block of later rows.
  template <int BITS, typename Use>
  INLINE void each_slot_of(int k, Use use) const {
    const int64_t start = (int64_t)k * 16 * BITS;
    each_slot<BITS>(
        [&](int at) {
          Many<R> found;
          for (int j = 0; j < R; j++) found.v[j] = rows16(p + start + j * TILE * stride + at, stride);
          return found;
        },
        use);
    if (start % 64 >= 16 * BITS) return;  // that cache line was prefetched already
    for (int i = 0; i < COUNT; i++)
      for (int line = 0; line < 16 * BITS; line += 64)
        _mm_prefetch((const char*)p + start + i * stride + ahead + line, _MM_HINT_T1);
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

// The group of each slot's first column, where block k has the columns from 128 * source(k) on.
template <typename Source>
std::vector<int> groups_of_slots(int blocks, int64_t group_size, int groups, Source source) {
  std::vector<int> found(blocks * SLOTS);
  for (int k = 0; k < blocks; k++) {
    int64_t column = (int64_t)source(k) * BLOCK, group = column / group_size;
    for (int slot = 0; slot < SLOTS; slot++, column += BLOCK / SLOTS) {
      while ((group + 1) * group_size <= column) group++;
      found[k * SLOTS + slot] = (int)std::min<int64_t>(group, groups - 1);
    }
  }
  return found;
}

// Calls use(k, where block k begins) for the blocks of a row; that of the tail is made here.
template <int BITS, typename Use>
INLINE void each_block(const uint8_t* row, const Blocks& blocks, Use use) {
  alignas(64) uint8_t made[16 * BITS];
  for (int k = 0; k < blocks.all(); k++) {
    const uint8_t* p = row + (int64_t)k * 16 * BITS;
    if (k == blocks.whole) {
      tail_block<BITS>(p, blocks.units(), made);
      p = made;
    }
    use(k, p);
  }
}

// Codes first..last of `count` that are packed at p, from out[first % BLOCK] on.
inline void read_codes(const uint8_t* p, int64_t count, int bits, int64_t first, int64_t last, std::vector<uint8_t>& out) {
  const int64_t begin = first / BLOCK * BLOCK, whole = std::min(count / BLOCK, (last + BLOCK - 1) / BLOCK) * BLOCK;
  out.resize(last - begin + BLOCK);
  with_bits(bits, [&](auto width) {
    for (int64_t i = begin; i < whole; i += BLOCK) {
      const uint8_t* from = p + i / BLOCK * 16 * width;
      fetch(from + AHEAD, 16 * width);
      ordered_codes<width>(from, out.data() + i - begin);
    }
  });
  if (last <= whole) return;
  with_bits(bits, [&](auto width) {
    alignas(64) uint8_t block[16 * width];
    tail_block<width>(p + whole / 8 * width, (int)(count - whole + UNIT - 1) / UNIT, block);
    ordered_codes<width>(block, out.data() + whole - begin);
  });
}
