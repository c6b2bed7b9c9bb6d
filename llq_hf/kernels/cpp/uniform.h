// Uniform codes: value = scale (code - zero), with a scale and a zero for each row and group of columns.
//
// Rows are read as they lie in the file. A weight may have several parts of different widths, each with its own blocks
// of columns (mixed precision); the product is the sum of theirs.
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
  const int32_t* blocks;  // number of the 128 columns that each block of this part belongs to; null: all, in order
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
  // For groups of at least half a block.
  int group_of_half(int k, int half) const { return group((int64_t)source(k) * BLOCK + half * BLOCK / 2); }
  const uint8_t* row(int r) const { return w.weight + r * w.row_bytes; }
  // The value of one unit in a zero's code.
  float zero_step() const { return w.zero ? w.zero_step : w.zero_value; }
};

// Scales and zeros of a chunk of rows, by group. All parts share them, except for zero_step.
struct Grids {
  std::vector<float> scale, zero;   // [rows of the chunk][groups]
  std::vector<float> scale_tile;    // Tiled
  std::vector<uint8_t> zero_tile;

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
    const uint8_t* codes = read_zeros(w, from, count);
    for (int64_t i = 0; i < count; i++) zero[i] = codes[i];
  }

  // The same in the order of tiles.
  void read_tiles(const Uniform& w, int first, int last) {
    const int64_t from = (int64_t)first * w.groups;
    const Tiled tiled(w.groups);
    const auto dtype = (Dtype)w.scale_dtype;
    const auto* scales = (const uint8_t*)w.scale + from * size_of(dtype);
    scale_tile.resize(tiled.size(last - first));
    zero_tile.resize(scale_tile.size());
    // The padding must hold finite numbers; an earlier weight may have left others there.
    if (dtype == NONE || w.groups % 4) std::fill(scale_tile.begin(), scale_tile.end(), w.scale_value);
    const uint8_t* codes = read_zeros(w, from, (int64_t)(last - first) * w.groups);
    const int groups = w.groups;  // for the compiler, the stores below might change w.groups
    for (int r = 0; r < last - first; r++, codes += groups, scales += groups * size_of(dtype)) {
      float* scale = scale_tile.data() + tiled.row(r);
      uint8_t* zero = zero_tile.data() + tiled.row(r);
      fetch(scales + AHEAD, groups * size_of(dtype));
      for (int g = 0; g + 4 <= groups; g += 4) memcpy(zero + g * TILE, codes + g, 4);
      for (int g = 0; dtype == F16 && g + 4 <= groups; g += 4)
        _mm_storeu_ps(scale + g * TILE, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)(scales + 2 * g))));
      for (int g = 0; dtype == F32 && g + 4 <= groups; g += 4)
        _mm_storeu_ps(scale + g * TILE, _mm_loadu_ps((const float*)scales + g));
      for (int g = groups / 4 * 4; g < groups; g++) {
        scale_tile[tiled.at(r, g)] = w.scale_value;
        if (dtype != NONE) to_floats(scales + g * size_of(dtype), dtype, 1, &scale_tile[tiled.at(r, g)]);
        zero_tile[tiled.at(r, g)] = codes[g];
      }
    }
  }

 private:
  std::vector<uint8_t> codes_;  // of zeros

  // `count` codes from code `from` on; ones if all zeros are equal.
  const uint8_t* read_zeros(const Uniform& w, int64_t from, int64_t count) {
    if (!w.zero) {
      codes_.assign(count, 1);
      return codes_.data();
    }
    read_codes(w.zero, (int64_t)w.rows * w.groups, w.zero_bits, from, from + count, codes_);
    return codes_.data() + from % BLOCK;
  }
};

// out[token][r - first] += rows first..last times the blocks of x, in digits. HALVES: groups have at least 64 columns,
// instead of whole blocks.
template <int BITS, int TOKENS, bool HALVES>
void dot_digits(const Part& part, const Grids& grids, const Digits& x, int token, int first, int last, float* out) {
  constexpr int R = TILES<BITS, TOKENS>, PARTS = HALVES ? 2 : 1;
  const int stride = last - first;
  const Tiled tiled(part.w.groups);
  for (int r = first; r < last; r += R * TILE) {
    const Rows<R> rows(part.w.weight, part.w.row_bytes, r, last - 1);
    const float* scale = grids.scale_tile.data() + tiled.row(r - first);
    const uint8_t* zero = grids.zero_tile.data() + tiled.row(r - first);
    Floats sums[R][TOKENS], less[R][TOKENS];
    for (int j = 0; j < R; j++)
      for (int t = 0; t < TOKENS; t++) sums[j][t] = less[j][t] = set(0);
    for (int k = 0; k < part.blocks; k++) {
      Sum<BITS> high[PARTS][R][TOKENS], low[PARTS][R][TOKENS];
      rows.template each_slot_of<BITS>(k, part.w.row_bytes, [&](int slot, Many<R> q) {
        const int half = slot * PARTS / SLOTS;
        for (int t = 0; t < TOKENS; t++) {
          const int8_t* digits = x.block(token + t, k) + 16 * slot;
          const Bytes a = both16(digits), b = both16(digits + BLOCK);
          for (int j = 0; j < R; j++) {
            high[half][j][t].add(q.v[j], a);
            low[half][j][t].add(q.v[j], b);
          }
        }
      });
      for (int half = 0; half < PARTS; half++) {
        const unsigned g = HALVES ? part.group_of_half(k, half) : part.group_of[k];
        for (int j = 0; j < R; j++) {
          const Floats s = spread(loadf(scale + j * tiled.span + g / 4 * LANES), g % 4);
          for (int t = 0; t < TOKENS; t++) {
            const Floats sum = joined(high[half][j][t].ints(), low[half][j][t].ints());
            sums[j][t] = fma(sum, mul(s, set(x.steps(token + t)[k])), sums[j][t]);
          }
        }
      }
    }
    for (int j = 0; j < R; j++) {
      for (int64_t g = 0; g < tiled.span; g += LANES) {
        const Floats offset = mul(loadf(scale + j * tiled.span + g), floats(zero + j * tiled.span + g));
        for (int t = 0; t < TOKENS; t++) less[j][t] = fma(offset, four(x.sums(token + t) + g / TILE), less[j][t]);
      }
      for (int t = 0; t < TOKENS; t++) {
        const Floats y = sub(sums[j][t], mul(less[j][t], set(part.zero_step())));
        add_totals(y, last - r - j * TILE, out + t * stride + r + j * TILE - first);
      }
    }
  }
}

// The values of block k of a row, in fp32.
template <int BITS>
INLINE void values(const Part& part, const float* scale, const float* zero, const uint8_t* row, int k, float* out) {
  alignas(64) uint8_t q[BLOCK];
  ordered_codes<BITS>(row + (int64_t)k * 16 * BITS, q);
  const int g = part.group_of[k];
  const float step = part.zero_step();
  if (g >= 0) {
    const Floats s = set(scale[g]), z = set(zero[g] * step);
    for (int i = 0; i < BLOCK; i += LANES) storef(out + i, mul(sub(floats(q + i), z), s));
    return;
  }
  const int64_t column = (int64_t)part.source(k) * BLOCK;
  for (int i = 0; i < BLOCK;) {
    const int own = part.group(column + i);
    const int stop = std::min<int64_t>(BLOCK, (int64_t)(own + 1) * part.w.group_size - column);
    for (; i < stop; i++) out[i] = ((float)q[i] - zero[own] * step) * scale[own];
  }
}

// The columns behind the last whole block of a row: out [tail].
inline void tail_values(const Part& part, const float* scale, const float* zero, const uint8_t* row, float* out) {
  const int first = part.blocks * BLOCK;
  for (int i = 0; i < part.tail; i++) {
    const int g = part.group(first + i);
    out[i] = ((float)code_at(row, first + i, part.w.columns, part.w.bits) - zero[g] * part.zero_step()) * scale[g];
  }
}

// The codes of a row minus `centre`, in int8.
inline void centred_row(const Part& part, int r, int centre, uint8_t* out) {
  const uint8_t* p = part.row(r);
  const int bits = part.w.bits, columns = part.w.columns;
  const __m128i all = _mm_set1_epi8((char)centre);
  with_bits(bits, [&](auto width) {
    for (int k = 0; k < part.blocks; k++)
      each_slot_of_row<width>(p + (int64_t)k * 16 * width, [&](int slot, __m128i q) {
        _mm_storeu_si128((__m128i*)(out + k * BLOCK + 16 * slot), _mm_sub_epi8(q, all));
      });
  });
  for (int i = part.blocks * BLOCK; i < columns; i++) out[i] = code_at(p, i, columns, bits) - centre;
}

#ifdef __AVX512VNNI__
// Decodes a row to halves where codes have too many levels for a table.
template <int BITS>
void compute(const Part& part, const float* scale, const float* zero, int r, Dtype dtype, uint16_t* out) {
  for (int k = 0; k < part.blocks; k++) {
    uint16_t* to = out + (int64_t)part.source(k) * BLOCK;
    Floats s[2], z[2];
    for (int half = 0; half < 2; half++) {
      const int g = part.group_of[k] < 0 ? part.group_of_half(k, half) : part.group_of[k];
      s[half] = set(scale[g]);
      z[half] = set(zero[g] * part.zero_step());
    }
    each_slot_of_row<BITS>(part.row(r) + (int64_t)k * 16 * BITS, [&](int slot, __m128i q) {
      const int half = slot / (SLOTS / 2);
      _mm256_storeu_si256((__m256i*)(to + 16 * slot), halves(mul(sub(floats(q), z[half]), s[half]), dtype));
    });
  }
}
#endif

// All parts of a weight.
struct UniformWeight {
  using State = Grids;
  std::vector<Part> parts;
  int all_columns;

  UniformWeight(const Uniform* given, int count, int columns) : parts(given, given + count), all_columns(columns) {}
  int rows() const { return parts[0].w.rows; }
  int columns() const { return all_columns; }

  void read(State& state, int first, int last) const { state.read(parts[0].w, first, last); }

  // Whether decode_halves can be used: groups have at least half a block.
  bool has_halves() const {
#ifdef __AVX512VNNI__
    for (const Part& part : parts)
      if (part.tail || (part.halves && part.w.group_size % (BLOCK / 2))) return false;
    return true;
#else
    return false;
#endif
  }

  void decode_halves(const State& state, int r, int first, Dtype dtype, uint16_t* out) const {
#ifdef __AVX512VNNI__
    const Floats low = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), high = add(low, set(16));
    for (const Part& part : parts) {
      const int64_t at = (int64_t)(r - first) * part.w.groups;
      const float *scale = state.scale.data() + at, *zero = state.zero.data() + at;
      const auto levels_of = [&](int g) {
        const Floats s = set(scale[g]), z = set(zero[g] * part.zero_step());
        return halves(mul(sub(low, z), s), mul(sub(high, z), s), dtype);
      };
      if (part.w.bits > MOST_LEVELS_BITS) {
        with_bits(part.w.bits, [&](auto bits) { compute<bits>(part, scale, zero, r, dtype, out); });
        continue;
      }
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
    for (const Part& part : parts) {
      const int64_t at = (int64_t)(r - first) * part.w.groups;
      const float *scale = state.scale.data() + at, *zero = state.zero.data() + at;
      with_bits(part.w.bits, [&](auto bits) {
        for (int k = 0; k < part.blocks; k++)
          values<bits>(part, scale, zero, part.row(r), k, out + (int64_t)part.source(k) * BLOCK);
      });
      tail_values(part, scale, zero, part.row(r), out + (int64_t)part.blocks * BLOCK);
    }
  }
};
