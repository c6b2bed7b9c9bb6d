// Codes of a table of levels that the whole matrix shares (NormalFloat): level times a scale plus a shift, both for
// each group of weights. Scales and shifts may themselves be 8-bit codes of a map, times a step for each 256 of them.
//
// 4-bit codes lie as in bitsandbytes, the first of two in the high half of a byte. Narrower ones lie in blocks of 128.
// For products the levels are rounded to 14 bits, step (128 high + low - MIDDLE), and the codes select the two digits.
#pragma once
#include "activations.h"
#include "halves.h"
#include "pool.h"

// Mirrored by kernels/native.py.
struct Numbers {
  const void* values;  // fp32, or uint8 codes of `map`
  const float* map;    // [256]; null: values are fp32
  const float* step;   // one for each 256 codes
  const float* mean;   // added to all, or null
};

struct Table {
  const uint8_t* weight;
  const float* levels;   // [2^bits]
  Numbers scale, shift;  // [rows, groups]; shift.values null: none
  int32_t rows, columns, groups, group_size, bits;
};

// `count` numbers from number `from` on as floats, in the order of torch's operations.
inline void read_numbers(const Numbers& n, int64_t from, int64_t count, std::vector<float>& out) {
  out.resize(count);
  if (!n.map) {
    memcpy(out.data(), (const float*)n.values + from, count * 4);
    return;
  }
  const uint8_t* codes = (const uint8_t*)n.values + from;
  for (int64_t i = 0; i < count;) {
    const float step = n.step[(from + i) >> 8];
    for (const int64_t end = std::min(count, i + 256 - (from + i) % 256); i < end; i++) out[i] = n.map[codes[i]] * step;
  }
  if (n.mean)
    for (int64_t i = 0; i < count; i++) out[i] += *n.mean;
}

// Four numbers from number `from` on, a multiple of four.
INLINE __m128 four_numbers(const Numbers& n, int64_t from) {
  if (!n.map) return _mm_loadu_ps((const float*)n.values + from);
  const uint8_t* code = (const uint8_t*)n.values + from;
  const __m128 v = _mm_setr_ps(n.map[code[0]], n.map[code[1]], n.map[code[2]], n.map[code[3]]);
  return _mm_add_ps(_mm_mul_ps(v, _mm_set1_ps(n.step[from >> 8])), _mm_set1_ps(n.mean ? *n.mean : 0));
}

struct TableWeight {
  static constexpr int MIDDLE = 1 << 13;
  const Table& w;
  Sixteen levels;
  int blocks;
  std::vector<int> group_of;  // of each slot
  float step;
  alignas(16) uint8_t digits[32];  // 16 high, 16 low

  // What is read for a chunk of rows, for each group; Tiled for products.
  struct State {
    std::vector<float> scale, shift;
  };

  explicit TableWeight(const Table& w) : w(w), blocks(w.columns / BLOCK),
        group_of(groups_of_slots(blocks, w.group_size, w.groups, [](int k) { return k; })), step(1e-30f) {
    alignas(64) float all[16] = {};
    memcpy(all, w.levels, (1 << w.bits) * sizeof(float));
    levels = Sixteen(all);
    for (const float level : all) step = std::fmax(step, std::fabs(level) / (MIDDLE - 1));
    for (int i = 0; i < 16; i++) {
      const int q = (int)std::rint(all[i] / step) + MIDDLE;
      digits[i] = q >> 7;
      digits[16 + i] = q & 127;
    }
  }
  int rows() const { return w.rows; }
  int columns() const { return w.columns; }
  int64_t row_bytes() const { return (int64_t)w.columns * w.bits / 8; }
  const uint8_t* row(int r) const { return w.weight + r * row_bytes(); }

  void read(State& s, int first, int last) const {
    const int64_t from = (int64_t)first * w.groups, count = (int64_t)(last - first) * w.groups;
    read_numbers(w.scale, from, count, s.scale);
    if (w.shift.values) read_numbers(w.shift, from, count, s.shift);
  }

  void read_tiles(State& s, int first, int last) const {
    read_tiles_of(w.scale, first, last, s.scale);
    if (w.shift.values) read_tiles_of(w.shift, first, last, s.shift);
  }

  // Numbers of some rows, Tiled.
  void read_tiles_of(const Numbers& n, int first, int last, std::vector<float>& out) const {
    static thread_local std::vector<float> row;
    const Tiled tiled(w.groups);
    out.assign(tiled.size(last - first), 0);
    for (int r = first; r < last; r++) {
      const int64_t from = (int64_t)r * w.groups;
      float* to = out.data() + tiled.row(r - first);
      if (w.groups % 4 == 0) {
        for (int g = 0; g < w.groups; g += 4) _mm_storeu_ps(to + g * TILE, four_numbers(n, from + g));
        continue;
      }
      read_numbers(n, from, w.groups, row);
      for (int g = 0; g < w.groups; g++) out[tiled.at(r - first, g)] = row[g];
    }
  }

  // The codes of 32 columns from 32 * part on, one byte each.
  INLINE void ordered(const uint8_t* p, int part, uint8_t* q) const {
    const __m128i v = _mm_loadu_si128((const __m128i*)(p + 16 * part)), low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(_mm_srli_epi16(v, 4), low), odd = _mm_and_si128(v, low);
    _mm_storeu_si128((__m128i*)q, _mm_unpacklo_epi8(even, odd));
    _mm_storeu_si128((__m128i*)(q + 16), _mm_unpackhi_epi8(even, odd));
  }

  void decode_row(const State& s, int r, int first, float* out) const {
    const int64_t at = (int64_t)(r - first) * w.groups;
    const uint8_t* p = row(r);
    alignas(64) uint8_t q[BLOCK];
    for (int i = 0; i < w.columns; i += LANES) {
      if (w.bits == 4 && i % 32 == 0) ordered(p, i / 32, q + i % BLOCK);
      if (w.bits != 4 && i % BLOCK == 0)
        with_bits(w.bits, [&](auto bits) { ordered_codes<bits>(p + i / BLOCK * 16 * bits, q); });
      Floats v = mul(levels.at(widened(q + i % BLOCK)), set(s.scale[at + i / w.group_size]));
      if (w.shift.values) v = add(v, set(s.shift[at + i / w.group_size]));
      storef(out + i, v);
    }
  }

  bool has_halves() const {
#ifdef __AVX512VNNI__
    return w.bits == 4;
#else
    return false;
#endif
  }

  void decode_halves(const State& s, int r, int first, Dtype dtype, uint16_t* out) const {
#ifdef __AVX512VNNI__
    const int64_t at = (int64_t)(r - first) * w.groups;
    const uint8_t* p = row(r);
    for (int g = 0; g < w.groups; g++) {
      Floats own = mul(levels.all, set(s.scale[at + g]));
      if (w.shift.values) own = add(own, set(s.shift[at + g]));
      const Bytes table = halves(own, own, dtype);
      for (int i = g * w.group_size; i < (g + 1) * w.group_size; i += 32) {
        alignas(32) uint8_t q[32];
        ordered(p, i / 32, q);
        for (int j = 0; j < 32; j += 16)
          _mm256_storeu_si256((__m256i*)(out + i + j), pick16(_mm_load_si128((const __m128i*)(q + j)), table));
      }
    }
#endif
  }
};

// In each 32 columns the odd ones, then the even ones: the order in which slots of 4-bit codes decode here.
inline void halve(const float* x, int64_t count, std::vector<float>& out) {
  out.resize(count);
  for (int64_t i = 0; i < count; i += UNIT) {
    for (int j = 0; j < UNIT / 2; j++) {
      out[i + j] = x[i + 2 * j + 1];
      out[i + UNIT / 2 + j] = x[i + 2 * j];
    }
  }
}

// out[token][r - first] += rows first..last times the blocks of x, in digits. Codes have 4 bits, groups at least 64
// columns.
template <int TOKENS>
void dot_table(const TableWeight& weight, const TableWeight::State& state, const Digits& x, int token, int first, int last,
               float* out) {
  constexpr int R = TILES<4, TOKENS>, HALF = SLOTS / 2;
  const int stride = last - first;
  const Tiled tiled(weight.w.groups);
  const Bytes high = both16(weight.digits), low = both16(weight.digits + 16);
  for (int r = first; r < last; r += R * TILE) {
    const Rows<R> rows(weight.row(0), weight.row_bytes(), weight.row_bytes(), r, last - 1);
    const int64_t at = tiled.row(r - first);
    Floats sums[R][TOKENS];
    Sum<7> high_high[R][TOKENS], cross[R][TOKENS];
    for (int j = 0; j < R; j++)
      for (int t = 0; t < TOKENS; t++) sums[j][t] = set(0);
    for (int k = 0; k < weight.blocks; k++) {
      rows.template each_slot_of<4>(k, [&](int slot, Many<R> q) {
        Bytes a[R], b[R];
        for (int j = 0; j < R; j++) {
          a[j] = pick(high, q.v[j]);
          b[j] = pick(low, q.v[j]);
        }
        for (int t = 0; t < TOKENS; t++) {
          const int8_t* of_x = x.block(token + t, k) + 16 * slot;
          const Bytes c = both16(of_x), d = both16(of_x + BLOCK);
          for (int j = 0; j < R; j++) {
            high_high[j][t].add(a[j], c);
            cross[j][t].add(a[j], d);
            cross[j][t].add(b[j], c);
          }
        }
        if (slot % HALF != HALF - 1) return;
        const unsigned g = weight.group_of[k * SLOTS + slot];
        for (int j = 0; j < R; j++) {
          const Floats s = spread(loadf(state.scale.data() + at + j * tiled.span + g / 4 * LANES), g % 4);
          for (int t = 0; t < TOKENS; t++) {
            const Floats sum = joined(high_high[j][t].ints(), cross[j][t].ints());
            sums[j][t] = fma(sum, mul(s, set(128 * x.steps(token + t)[k])), sums[j][t]);
            high_high[j][t] = cross[j][t] = {};
          }
        }
      });
    }
    for (int j = 0; j < R; j++) {
      for (int t = 0; t < TOKENS; t++) {
        Floats less = set(0), shift = set(0);
        for (int64_t g = 0; g < tiled.span; g += LANES) {
          const Floats of_x = four(x.sums(token + t) + g / TILE);
          less = fma(loadf(state.scale.data() + at + j * tiled.span + g), of_x, less);
          if (weight.w.shift.values) shift = fma(loadf(state.shift.data() + at + j * tiled.span + g), of_x, shift);
        }
        const Floats y = fma(sub(sums[j][t], mul(less, set(TableWeight::MIDDLE))), set(weight.step), shift);
        add_totals(y, last - r - j * TILE, out + t * stride + r + j * TILE - first);
      }
    }
  }
}
