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
  Blocks blocks;
  std::vector<int> group_of;  // of each slot, by its first column
  // Equal pieces of a block that belong to one group each: 1, 2, 4 or 8; 0: not even slots do. Where there are 4 or 8,
  // products see each piece as a group of its own, so that scales lie in the order of the pieces.
  int pieces, places;          // places: groups as products see them
  std::vector<int> place_of;   // of each slot

  explicit Part(const Uniform& w)
      : w(w), blocks(w.columns), group_of(groups_of_slots(blocks.all(), w.group_size, w.groups, [&](int k) { return source(k); })),
        pieces(pieces_of(w)), places(pieces > 2 ? blocks.all() * pieces : w.groups), place_of(group_of) {
    if (pieces > 2)
      for (size_t i = 0; i < place_of.size(); i++) place_of[i] = i * pieces / SLOTS;
  }
  int source(int k) const { return w.blocks ? w.blocks[k] : k; }
  const uint8_t* row(int r) const { return w.weight + r * w.row_bytes; }
  // The value of one unit in a zero's code.
  float zero_step() const { return w.zero ? w.zero_step : w.zero_value; }
  // Whether places are groups, but for some without columns behind the last one.
  bool in_order() const { return pieces <= 2 || w.group_size * pieces == BLOCK; }

 private:
  static int pieces_of(const Uniform& w) {
    for (int pieces = 1; pieces <= SLOTS; pieces *= 2)
      if (w.groups == 1 || w.group_size % (BLOCK / pieces) == 0) return pieces;
    return 0;
  }
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

  // The same in the order of tiles, for products. What has no columns gets zeros, as it must be finite.
  void read_tiles(const Part& part, int first, int last) {
    const Uniform& w = part.w;
    const Tiled tiled(part.places);
    scale_tile.resize(tiled.size(last - first));
    zero_tile.resize(scale_tile.size());
    if (!part.in_order()) return spread_tiles(part, first, last);
    const int64_t from = (int64_t)first * w.groups;
    const auto dtype = (Dtype)w.scale_dtype;
    const auto* scales = (const uint8_t*)w.scale + from * size_of(dtype);
    if (dtype == NONE) std::fill(scale_tile.begin(), scale_tile.end(), w.scale_value);
    const uint8_t* codes = read_zeros(w, from, (int64_t)(last - first) * w.groups);
    const int groups = w.groups, rest = groups % 4;  // for the compiler, the stores below might change w.groups
    const __m128i some = _mm_cmpgt_epi32(_mm_set1_epi32(rest), _mm_setr_epi32(0, 1, 2, 3));
    for (int r = 0; r < last - first; r++, codes += groups, scales += groups * size_of(dtype)) {
      float* scale = scale_tile.data() + tiled.row(r);
      uint8_t* zero = zero_tile.data() + tiled.row(r);
      fetch(scales + AHEAD, groups * size_of(dtype));
      for (int g = 0; g < groups; g += 4) memcpy(zero + g * TILE, codes + g, 4);  // codes_ is long enough
      for (int g = 0; dtype == F16 && g + 4 <= groups; g += 4)
        _mm_storeu_ps(scale + g * TILE, _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)(scales + 2 * g))));
      for (int g = 0; dtype == F32 && g + 4 <= groups; g += 4)
        _mm_storeu_ps(scale + g * TILE, _mm_loadu_ps((const float*)scales + g));
      if (dtype == NONE) continue;
      const int g = groups - rest;
      if (rest) {
        uint64_t v = 0;
        if (dtype == F16 && first + r + 3 < w.rows) {
          memcpy(&v, scales + 2 * g, 8);
        } else if (dtype == F16) {  // nothing may follow the last rows
          memcpy(&v, scales + 2 * g, 2 * rest);
        }
        const __m128 own = dtype == F16 ? _mm_cvtph_ps(_mm_cvtsi64_si128(v)) : _mm_maskload_ps((const float*)scales + g, some);
        _mm_storeu_ps(scale + g * TILE, _mm_and_ps(own, _mm_castsi128_ps(some)));
      }
      for (int i = padded(groups); i < part.places; i += 4) _mm_storeu_ps(scale + i * TILE, _mm_setzero_ps());
    }
  }

 private:
  std::vector<uint8_t> codes_;  // of zeros, and some room

  // read_tiles where a group is no piece of a block, as 48 columns are.
  void spread_tiles(const Part& part, int first, int last) {
    const Tiled tiled(part.places);
    read(part.w, first, last);
    for (int r = 0; r < last - first; r++)
      for (int i = 0; i < part.places; i++) {
        const int64_t from = (int64_t)r * part.w.groups + part.group_of[i * SLOTS / part.pieces];
        scale_tile[tiled.at(r, i)] = scale[from];
        zero_tile[tiled.at(r, i)] = (uint8_t)zero[from];
      }
  }

  // `count` codes from code `from` on; ones if all zeros are equal.
  const uint8_t* read_zeros(const Uniform& w, int64_t from, int64_t count) {
    if (!w.zero) {
      codes_.assign(count + 4, 1);
      return codes_.data();
    }
    read_codes(w.zero, (int64_t)w.rows * w.groups, w.zero_bits, from, from + count, codes_);
    return codes_.data() + from % BLOCK;
  }
};

// out[token][r - first] += rows first..last times the blocks of x, in digits. Each of PIECES pieces of a block belongs to
// one group.
template <int BITS, int TOKENS, int PIECES>
void dot_digits(const Part& part, const Grids& grids, const Digits& x, int token, int first, int last, float* out) {
  constexpr int R = TILES<BITS, TOKENS>, END = SLOTS / PIECES;
  const int stride = last - first;
  const Tiled tiled(part.places);
  alignas(64) uint8_t tails[Rows<R>::COUNT * 16 * BITS];
  for (int r = first; r < last; r += R * TILE) {
    Rows<R> rows(part.w.weight, part.w.row_bytes, part.blocks.bytes(BITS), r, last - 1);
    const float* scale = grids.scale_tile.data() + tiled.row(r - first);
    const uint8_t* zero = grids.zero_tile.data() + tiled.row(r - first);
    Floats sums[R][TOKENS], less[R][TOKENS];
    for (int j = 0; j < R; j++)
      for (int t = 0; t < TOKENS; t++) sums[j][t] = less[j][t] = set(0);
    for (int k = 0; k < part.blocks.all(); k++) {
      const bool tail = k == part.blocks.whole;
      if (tail) rows.template turn_to_tails<BITS>(part.blocks, tails);
      const int* place_of = &part.place_of[k * SLOTS];
      Sum<BITS> high[R][TOKENS], low[R][TOKENS];
      Floats four_scales[R], own[R][TOKENS];  // own: sums of this block, not yet times its steps
      rows.template each_slot_of<BITS>(tail ? 0 : k, [&](int slot, Many<R> q) {
        for (int t = 0; t < TOKENS; t++) {
          const int8_t* digits = x.block(token + t, k) + 16 * slot;
          const Bytes a = both16(digits), b = both16(digits + BLOCK);
          for (int j = 0; j < R; j++) {
            high[j][t].add(q.v[j], a);
            low[j][t].add(q.v[j], b);
          }
        }
        if (slot % END != END - 1) return;
        const int piece = slot / END;
        const unsigned g = PIECES > 2 ? k * PIECES + piece : place_of[slot];
        for (int j = 0; j < R; j++) {
          const float* scales = scale + j * tiled.span + g / 4 * LANES;
          if (PIECES > 2 && piece % 4 == 0) four_scales[j] = loadf(scales);
          const Floats s = PIECES > 2 ? spread_known(four_scales[j], piece % 4) : spread(loadf(scales), g % 4);
          for (int t = 0; t < TOKENS; t++) {
            const Floats sum = joined(high[j][t].ints(), low[j][t].ints());
            high[j][t] = low[j][t] = {};
            own[j][t] = piece ? fma(sum, s, own[j][t]) : mul(sum, s);
            if (piece == PIECES - 1) sums[j][t] = fma(own[j][t], set(x.steps(token + t)[k]), sums[j][t]);
          }
        }
      });
    }
    for (int64_t g = 0; g < tiled.span; g += LANES) {
      for (int j = 0; j < R; j++) {
        const Floats offset = mul(loadf(scale + j * tiled.span + g), floats(zero + j * tiled.span + g));
        for (int t = 0; t < TOKENS; t++) less[j][t] = fma(offset, four(x.sums(token + t) + g / TILE), less[j][t]);
      }
    }
    for (int j = 0; j < R; j++) {
      for (int t = 0; t < TOKENS; t++) {
        const Floats y = sub(sums[j][t], mul(less[j][t], set(part.zero_step())));
        add_totals(y, last - r - j * TILE, out + t * stride + r + j * TILE - first);
      }
    }
  }
}

// The values of block k of a row, which begins at p, in fp32.
template <int BITS>
INLINE void values(const Part& part, const float* scale, const float* zero, const uint8_t* p, int k, float* out) {
  alignas(64) uint8_t q[BLOCK];
  ordered_codes<BITS>(p, q);
  const float step = part.zero_step();
  const int64_t column = (int64_t)part.source(k) * BLOCK;
  int g = part.group_of[k * SLOTS];
  for (int i = 0; i < BLOCK; g++) {
    const bool all = g + 1 >= part.w.groups;
    const int stop = all ? BLOCK : (int)std::min<int64_t>(BLOCK, (int64_t)(g + 1) * part.w.group_size - column);
    const float s = scale[g], z = zero[g] * step;
    for (; i + LANES <= stop; i += LANES) storef(out + i, mul(sub(floats(q + i), set(z)), set(s)));
    for (; i < stop; i++) out[i] = ((float)q[i] - z) * s;
  }
}

// The codes of a row minus `centre`, in int8.
inline void centred_row(const Part& part, int r, int centre, uint8_t* out) {
  const __m128i all = _mm_set1_epi8((char)centre);
  with_bits(part.w.bits, [&](auto bits) {
    each_block<bits>(part.row(r), part.blocks, [&](int k, const uint8_t* p) {
      alignas(16) uint8_t made[BLOCK];
      each_slot_of_row<bits>(p, [&](int slot, __m128i q) {
        _mm_store_si128((__m128i*)(made + 16 * slot), _mm_sub_epi8(q, all));
      });
      memcpy(out + k * BLOCK, made, k == part.blocks.whole ? part.blocks.tail : BLOCK);
    });
  });
}

// All parts of a weight.
struct UniformWeight {
  using State = Grids;
  std::vector<Part> parts;
  int all_columns;

  UniformWeight(const Uniform* given, int count, int columns) : parts(given, given + count), all_columns(columns) {}
  int rows() const { return parts[0].w.rows; }
  int columns() const { return all_columns; }

  void read(State& state, int first, int last) const { state.read(parts[0].w, first, last); }

  // Whether decode_halves can be used: no slot belongs to two groups.
  bool has_halves() const {
#ifdef __AVX512VNNI__
    return std::all_of(parts.begin(), parts.end(), [](const Part& part) { return part.pieces > 0; });
#else
    return false;
#endif
  }

  void decode_halves(const State& state, int r, int first, Dtype dtype, uint16_t* out) const {
#ifdef __AVX512VNNI__
    for (const Part& part : parts) {
      const int64_t at = (int64_t)(r - first) * part.w.groups;
      with_bits(part.w.bits, [&](auto bits) {
        block_halves<bits>(part, state.scale.data() + at, state.zero.data() + at, r, dtype, out);
      });
    }
#endif
  }

  // `out` has room for whole blocks.
  void decode_row(const State& state, int r, int first, float* out) const {
    for (const Part& part : parts) {
      const int64_t at = (int64_t)(r - first) * part.w.groups;
      const float *scale = state.scale.data() + at, *zero = state.zero.data() + at;
      with_bits(part.w.bits, [&](auto bits) {
        each_block<bits>(part.row(r), part.blocks, [&](int k, const uint8_t* p) {
          values<bits>(part, scale, zero, p, k, out + (int64_t)part.source(k) * BLOCK);
        });
      });
    }
  }

 private:
#ifdef __AVX512VNNI__
  // Codes of few bits select one of their group's levels; of others, each value is computed.
  template <int BITS>
  static void block_halves(const Part& part, const float* scale, const float* zero, int r, Dtype dtype, uint16_t* out) {
    const Floats low = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), high = add(low, set(16));
    const float step = part.zero_step();
    int group = -1;
    Floats s = set(0), z = s;
    Bytes levels = zeros();
    each_block<BITS>(part.row(r), part.blocks, [&](int k, const uint8_t* p) {
      alignas(64) uint16_t made[BLOCK];
      const bool tail = k == part.blocks.whole;
      uint16_t* to = out + (int64_t)part.source(k) * BLOCK;
      uint16_t* here = tail ? made : to;
      each_slot_of_row<BITS>(p, [&](int slot, __m128i q) {
        if (const int g = part.group_of[k * SLOTS + slot]; g != group) {
          group = g;
          s = set(scale[g]);
          z = set(zero[g] * step);
          if constexpr (BITS <= MOST_LEVELS_BITS)
            levels = join(halves(mul(sub(low, z), s), dtype), halves(mul(sub(BITS > 4 ? high : low, z), s), dtype));
        }
        const __m256i v = BITS <= MOST_LEVELS_BITS ? pick16(q, levels) : halves(mul(sub(floats(q), z), s), dtype);
        _mm256_storeu_si256((__m256i*)(here + 16 * slot), v);
      });
      if (tail) memcpy(to, made, part.blocks.tail * sizeof *to);
    });
  }
#endif
};
