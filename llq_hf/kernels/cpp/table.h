// Codes that pick one of a table of levels that the whole matrix shares, times a scale for every group of weights, plus a
// shift: NormalFloat. Scales and shifts may themselves be 8-bit codes of a map, times a step for 256 of them.
//
// 4-bit codes lie as bitsandbytes puts them, the first of two in the high half of a byte; narrower ones in blocks of 128.
// Activations stay fp32: 16 levels are one vector (two with AVX2), and looking them up costs less than integers would.
#pragma once
#include "activations.h"
#include "halves.h"
#include "pool.h"

// Mirrored by kernels/native.py.
struct Numbers {
  const void* values;  // fp32, or uint8 codes of `map`
  const float* map;    // [256]; null: values are fp32
  const float* step;   // of 256 codes each
  const float* mean;   // what is added, or null
};

struct Table {
  const uint8_t* weight;
  const float* levels;   // [2^bits]
  Numbers scale, shift;  // [rows, groups]; shift.values null: none
  int32_t rows, columns, groups, group_size, bits;
};

// Numbers from..from + count as floats, in the order of torch's operations.
inline void read_numbers(const Numbers& n, int64_t from, int64_t count, std::vector<float>& out) {
  out.resize(count);
  if (!n.map) {
    memcpy(out.data(), (const float*)n.values + from, count * 4);
    return;
  }
  const uint8_t* codes = (const uint8_t*)n.values + from;
  for (int64_t i = 0; i < count; i++) out[i] = n.map[codes[i]] * n.step[(from + i) >> 8];
  if (n.mean)
    for (int64_t i = 0; i < count; i++) out[i] += *n.mean;
}

struct TableWeight {
  const Table& w;
  Sixteen levels;

  // Of some rows, for every group.
  struct State {
    std::vector<float> scale, shift;
  };

  explicit TableWeight(const Table& w) : w(w) {
    alignas(64) float all[16] = {};
    memcpy(all, w.levels, (1 << w.bits) * sizeof(float));
    levels = Sixteen(all);
  }
  int rows() const { return w.rows; }
  int columns() const { return w.columns; }
  const uint8_t* row(int r) const { return w.weight + (int64_t)r * w.columns * w.bits / 8; }

  void read(State& s, int first, int last) const {
    const int64_t from = (int64_t)first * w.groups, count = (int64_t)(last - first) * w.groups;
    read_numbers(w.scale, from, count, s.scale);
    if (w.shift.values) read_numbers(w.shift, from, count, s.shift);
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

// x [tokens, columns] as the products read it: of every 2 LANES columns the even ones, then the odd ones; and its sums by
// group.
struct Halved {
  std::vector<float> x, group_sum;

  void read(const float* from, int64_t columns, int tokens, int group_size) {
    x.resize(tokens * columns);
    group_sum.assign(tokens * columns / group_size, 0);
    for (int64_t i = 0; i < tokens * columns; i++) {
      const int at = i % (2 * LANES);
      x[i - at + at / 2 + at % 2 * LANES] = from[i];
      group_sum[i / group_size] += from[i];  // groups divide the columns
    }
  }
};

// out[token][r - first] of T tokens, of 4-bit codes. Two rows share every load of x.
template <int T>
void dot_table(const TableWeight& weight, const TableWeight::State& state, const Halved& x, int token, int first, int last,
               float* out) {
  constexpr int R = 2;
  const Table& w = weight.w;
  const Sixteen levels = weight.levels;
  const float* from = x.x.data() + (int64_t)token * w.columns;
  for (int r = first; r < last; r += R) {
    const uint8_t* p[R];
    int64_t begin[R];
    Floats sums[R][T];
    for (int j = 0; j < R; j++) {
      const int row = std::min(r + j, last - 1);
      p[j] = weight.row(row);
      begin[j] = (int64_t)(row - first) * w.groups;
      for (int t = 0; t < T; t++) sums[j][t] = set(0);
    }
    for (int g = 0, i = 0; g < w.groups; g++) {
      Floats group[R][T];
      for (int j = 0; j < R; j++)
        for (int t = 0; t < T; t++) group[j][t] = set(0);
      for (const int end = i + w.group_size; i < end; i += 2 * LANES) {
        Floats even[R], odd[R];
        for (int j = 0; j < R; j++) {
          _mm_prefetch((const char*)p[j] + AHEAD, _MM_HINT_T0);
          const Bytes pair = widened(p[j]);  // what stands above the low 4 bits is not looked at
          even[j] = levels.at(high_half(pair));
          odd[j] = levels.at(pair);
          p[j] += LANES;
        }
        for (int t = 0; t < T; t++) {
          const Floats a = loadf(from + (int64_t)t * w.columns + i), b = loadf(from + (int64_t)t * w.columns + i + LANES);
          for (int j = 0; j < R; j++) group[j][t] = fma(odd[j], b, fma(even[j], a, group[j][t]));
        }
      }
      for (int j = 0; j < R; j++)
        for (int t = 0; t < T; t++) sums[j][t] = fma(group[j][t], set(state.scale[begin[j] + g]), sums[j][t]);
    }
    for (int j = 0; j < R && r + j < last; j++) {
      for (int t = 0; t < T; t++) {
        float y = total(sums[j][t]);
        if (w.shift.values)
          y += dot(state.shift.data() + begin[j], x.group_sum.data() + (int64_t)(token + t) * w.groups, w.groups);
        out[(int64_t)t * (last - first) + r + j - first] = y;
      }
    }
  }
}
