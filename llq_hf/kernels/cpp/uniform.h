// Uniform codes: value = scale (code - zero), a scale and a zero for every row and group of columns.
//
// Rows are read as they lie in the file. A weight may come in several parts of different widths, each over blocks of columns
// of its own (mixed precision); their sums add up.
#pragma once
#include <functional>

#include "activations.h"
#include "halves.h"
#include "pool.h"

// Mirrored by kernels/native.py.
struct Uniform {
  const uint8_t* weight;  // where the first row of this part begins
  int64_t row_bytes;      // from row to row
  const void* scale;      // [rows, groups] of scale_dtype; NONE: scale_value for all
  const uint8_t* zero;    // packed codes [rows * groups]; null: zero_value for all
  const int32_t* blocks;  // which 128 columns each block of this part stands for; null: all, in order
  int32_t rows, columns, bits, groups, group_size, scale_dtype, zero_bits;
  float scale_value, zero_value, zero_step;
};

struct Part {
  const Uniform& w;
  int blocks, tail;             // whole blocks, and columns behind them
  std::vector<int> group_of;    // of each block; -1: it belongs to several groups
  bool halves = false;          // whether one does

  explicit Part(const Uniform& w) : w(w), blocks(w.columns / BLOCK), tail(w.columns % BLOCK), group_of(blocks) {
    for (int k = 0; k < blocks; k++) {
      const int64_t column = (int64_t)source(k) * BLOCK;
      group_of[k] = group(column) == group(column + BLOCK - 1) ? group(column) : -1;
      halves |= group_of[k] < 0;
    }
  }
  int source(int k) const { return w.blocks ? w.blocks[k] : k; }
  int group(int64_t column) const { return std::min<int64_t>(column / w.group_size, w.groups - 1); }
  // Where groups are of half blocks at least.
  int group_of_half(int k, int half) const { return group((int64_t)source(k) * BLOCK + half * BLOCK / 2); }
  const uint8_t* row(int r) const { return w.weight + r * w.row_bytes; }
};

// Scales and zeros of some rows, by group, as floats.
struct Grids {
  std::vector<float> scale, zero, offset;  // [rows of the chunk][groups]; offset is scale * zero

  void read(const Uniform& w, int first, int last) {
    const int64_t from = (int64_t)first * w.groups, count = (int64_t)(last - first) * w.groups;
    scale.resize(count);
    zero.resize(count);
    if (w.scale_dtype == NONE) {
      std::fill(scale.begin(), scale.end(), w.scale_value);
    } else {
      const auto dtype = (Dtype)w.scale_dtype;
      to_floats((const uint8_t*)w.scale + from * size_of(dtype), dtype, count, scale.data());
    }
    if (w.zero) {
      read_zeros(w, from, count);
    } else {
      std::fill(zero.begin(), zero.end(), w.zero_value);
    }
    offset.resize(count);
    for (int64_t i = 0; i < count; i++) offset[i] = scale[i] * zero[i];
  }

 private:
  void read_zeros(const Uniform& w, int64_t from, int64_t count) {
    const int64_t total = (int64_t)w.rows * w.groups, whole = total / BLOCK * BLOCK;
    alignas(64) uint8_t block[BLOCK];
    for (int64_t i = 0; i < count;) {
      const int64_t at = from + i, start = at / BLOCK * BLOCK;
      if (start >= whole) {
        zero[i++] = (float)code_at(w.zero, at, total, w.zero_bits) * w.zero_step;
        continue;
      }
      with_bits(w.zero_bits, [&](auto bits) { ordered_codes<bits>(w.zero + start / 8 * w.zero_bits, block); });
      const int64_t here = std::min(start + BLOCK - at, count - i);
      for (int64_t j = 0; j < here; j++) zero[i + j] = (float)block[at - start + j] * w.zero_step;
      i += here;
    }
  }
};

// out[token][r - first] += the dot products of rows first..last with the blocks of `x`, in digits. HALVES: a block may belong
// to two groups, 64 columns to each.
template <int BITS, int TOKENS, bool HALVES>
void dot_digits(const Part& part, const Grids& grids, const Digits& x, int token, int first, int last, float* out) {
  constexpr int R = ROWS<BITS>, V = VECTORS<BITS>;
  const int groups = part.w.groups, stride = last - first;
  for (int r = first; r < last; r += R) {
    const uint8_t* p[4];
    const float *scale[R], *offset[R];
    for (int i = 0; i < R; i++) {
      const int row = std::min(r + i, last - 1);
      p[i] = part.row(row);
      scale[i] = grids.scale.data() + (int64_t)(row - first) * groups;
      offset[i] = grids.offset.data() + (int64_t)(row - first) * groups;
    }
    Floats sums[TOKENS];
    for (int t = 0; t < TOKENS; t++) sums[t] = set(0);
    for (int k = 0; k < part.blocks; k++) {
      Bytes q[V];
      codes<BITS>(p, q);
      for (int i = 0; i < R; i++) {
        for (int line = 0; line < 16 * BITS; line += 64) _mm_prefetch((const char*)p[i] + AHEAD + line, _MM_HINT_T0);
        p[i] += 16 * BITS;
      }
      constexpr bool apart = HALVES && half_of<BITS>(0) >= 0;  // each half has vectors, and so sums, of its own
      constexpr int parts = apart ? 2 : 1;
      const int a = HALVES ? part.group_of_half(k, 0) : part.group_of[k], b = HALVES ? part.group_of_half(k, 1) : a;
      Floats s[parts];
      if constexpr (apart) {
        s[0] = spread<R>(scale, a);
        s[1] = spread<R>(scale, b);
      } else if constexpr (HALVES) {
        s[0] = spread_halves<R>(scale, a, b);
      } else {
        s[0] = spread<R>(scale, a);
      }
      for (int t = 0; t < TOKENS; t++) {
        const int8_t* digits = x.block(token + t, k);
        const Floats step = set(x.step[(int64_t)(token + t) * x.blocks + k]);
        for (int i = 0; i < parts; i++) {
          Sum<BITS> high, low;
          for (int n = i * V / parts; n < (i + 1) * V / parts; n++) {
            high.add(q[n], digits_of<BITS>(digits, n));
            low.add(q[n], digits_of<BITS>(digits + BLOCK, n));
          }
          sums[t] = fma(joined(high.ints(), low.ints()), mul(s[i], step), sums[t]);
        }
      }
    }
    for (int t = 0; t < TOKENS; t++) {
      float found[R];
      totals<R>(sums[t], found);
      for (int i = 0; i < R && r + i < last; i++)
        out[t * stride + r + i - first] += found[i] - dot(offset[i], x.group_sum.data() + (int64_t)(token + t) * groups, groups);
    }
  }
}

// The fp32 values of block k of a row.
template <int BITS>
INLINE void values(const Part& part, const float* scale, const float* zero, const uint8_t* row, int k, float* out) {
  alignas(64) uint8_t q[BLOCK];
  ordered_codes<BITS>(row + (int64_t)k * 16 * BITS, q);
  const int g = part.group_of[k];
  if (g >= 0) {
    const Floats s = set(scale[g]), z = set(zero[g]);
    for (int i = 0; i < BLOCK; i += LANES) storef(out + i, mul(sub(floats(q + i), z), s));
    return;
  }
  const int64_t column = (int64_t)part.source(k) * BLOCK;
  for (int i = 0; i < BLOCK;) {
    const int own = part.group(column + i);
    const int stop = std::min<int64_t>(BLOCK, (int64_t)(own + 1) * part.w.group_size - column);
    for (; i < stop; i++) out[i] = ((float)q[i] - zero[own]) * scale[own];
  }
}

// The columns behind the last whole block of a row: out [tail].
inline void tail_values(const Part& part, const float* scale, const float* zero, const uint8_t* row, float* out) {
  const int first = part.blocks * BLOCK;
  for (int i = 0; i < part.tail; i++) {
    const int g = part.group(first + i);
    out[i] = ((float)code_at(row, first + i, part.w.columns, part.w.bits) - zero[g]) * scale[g];
  }
}

// The codes of a row less `centre`, in int8.
inline void centred_row(const Part& part, int r, int centre, uint8_t* out) {
  const uint8_t* p = part.row(r);
  const int bits = part.w.bits, columns = part.w.columns;
  const __m128i all = _mm_set1_epi8((char)centre);
  with_bits(bits, [&](auto width) {
    for (int k = 0; k < part.blocks; k++)
      each_slot<width>(p + (int64_t)k * 16 * width, [&](int slot, __m128i q) {
        _mm_storeu_si128((__m128i*)(out + k * BLOCK + 16 * slot), _mm_sub_epi8(q, all));
      });
  });
  for (int i = part.blocks * BLOCK; i < columns; i++) out[i] = code_at(p, i, columns, bits) - centre;
}

// All parts of a weight.
struct UniformWeight {
  using State = std::vector<Grids>;  // of some rows, by part
  std::vector<Part> parts;
  int all_columns;

  UniformWeight(const Uniform* given, int count, int columns) : parts(given, given + count), all_columns(columns) {}
  int rows() const { return parts[0].w.rows; }
  int columns() const { return all_columns; }

  void read(State& state, int first, int last) const {
    if (state.size() < parts.size()) state.resize(parts.size());
    for (size_t i = 0; i < parts.size(); i++) state[i].read(parts[i].w, first, last);
  }

  // Whether decode_halves serves: groups are of half blocks at least.
  bool has_halves() const {
#ifdef __AVX512VNNI__
    for (const Part& part : parts)
      if (part.w.bits > MOST_LEVELS_BITS || part.tail || (part.halves && part.w.group_size % (BLOCK / 2))) return false;
    return true;
#else
    return false;
#endif
  }

  void decode_halves(const State& state, int r, int first, Dtype dtype, uint16_t* out) const {
#ifdef __AVX512VNNI__
    const Floats low = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), high = add(low, set(16));
    for (size_t i = 0; i < parts.size(); i++) {
      const Part& part = parts[i];
      const int64_t at = (int64_t)(r - first) * part.w.groups;
      const float *scale = state[i].scale.data() + at, *zero = state[i].zero.data() + at;
      const auto levels_of = [&](int g) {
        const Floats s = set(scale[g]), z = set(zero[g]);
        return halves(mul(sub(low, z), s), mul(sub(high, z), s), dtype);
      };
      with_bits(std::min(part.w.bits, MOST_LEVELS_BITS), [&](auto bits) {
        Bytes a = load(out), b = a;
        for (int k = 0; k < part.blocks; k++) {
          const int g = part.group_of[k];
          if (k == 0 || g < 0 || g != part.group_of[k - 1]) {
            a = levels_of(part.group_of_half(k, 0));
            b = g < 0 ? levels_of(part.group_of_half(k, 1)) : a;
          }
          pick<bits>(part.row(r) + (int64_t)k * 16 * bits, a, b, nullptr, out + (int64_t)part.source(k) * BLOCK);
        }
      });
    }
#endif
  }

  void decode_row(const State& state, int r, int first, float* out) const {
    for (size_t i = 0; i < parts.size(); i++) {
      const Part& part = parts[i];
      const int64_t at = (int64_t)(r - first) * part.w.groups;
      const float *scale = state[i].scale.data() + at, *zero = state[i].zero.data() + at;
      with_bits(part.w.bits, [&](auto bits) {
        for (int k = 0; k < part.blocks; k++)
          values<bits>(part, scale, zero, part.row(r), k, out + (int64_t)part.source(k) * BLOCK);
      });
      tail_values(part, scale, zero, part.row(r), out + (int64_t)part.blocks * BLOCK);
    }
  }
};
