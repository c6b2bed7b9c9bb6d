// Binarized weights: each has a sign, and each row and group two levels. The exception is a list of salient weights,
// which have 8 bits (the sign and 7 more) on a grid of their row.
//
// The list holds positions in the flat matrix in Elias-Fano form: low bits as they are, high parts in unary (position
// number k is a one at bit high part + k). A row finds its part of the list by counting zeros: the zero behind the last
// high part of a *cell* marks the beginning of the next cell. A cell is 128 columns, or the range of one high part if
// that is larger.
//
// Products first treat all weights as binarized, like any plane of bits. Then they correct the listed weights, cell by
// cell: four rows at once (two with AVX2), 16 weights of each, whose activations are gathered from the 128 of the
// block.
#pragma once
#include <limits>

#include "activations.h"
#include "halves.h"
#include "pool.h"

// Mirrored by kernels/native.py.
struct Salient {
  const uint8_t* weight;
  int64_t row_bytes;
  const void *scale, *mean;  // [rows, groups] of dtype
  const void* own_scale;     // [rows] of dtype
  const uint8_t* own_zero;   // [rows]
  const uint8_t* code;       // packed over [count]
  const uint8_t* high;       // packed bits [unary]
  const uint8_t* low;        // packed over [count]
  int64_t count, unary;
  int32_t rows, columns, groups, group_size, dtype, low_bits;
};

// The listed weights of some cells: place in the cell, and code. Cell c has those from begin[c - first] up to the next
// begin.
struct List {
  std::vector<uint8_t> place, code, low;
  std::vector<int32_t> begin;
  int64_t first;
};

// The bits at `place` of each row's block of a 1-bit plane, whose 16 bytes are `rows`. A byte of the result is 0 or 255.
INLINE Bytes bits_at(Bytes rows, Bytes place) {
  return tested(pick(rows, keep(place, 15)), pick(eights(0x8040201008040201), keep(shr(place, 4), 7)));
}

struct SalientWeight {
  static constexpr int SPAN = 64;  // words whose zeros are counted together
  const Salient& w;
  int blocks, cell, parts;     // columns of a cell, and high parts
  std::vector<int> group_of;   // of each slot
  std::vector<int64_t> zeros;  // before each span

  // What is read for a chunk of rows: levels by group, and the salient weights.
  struct State {
    std::vector<float> scale, mean, own_scale;
    List list;
    // For products, Tiled. positive: the value of a positive sign; base: of all columns; listed: of a listed weight,
    // without its code.
    std::vector<float> positive, base, listed;
  };

  explicit SalientWeight(const Salient& w)
      : w(w), blocks(w.columns / BLOCK), cell(std::max(BLOCK, 1 << w.low_bits)), parts(cell >> w.low_bits),
        group_of(groups_of_slots(blocks, w.group_size, w.groups, [](int k) { return k; })), zeros{0} {
    const int64_t whole = w.unary / BLOCK * 2;
    for (int64_t i = 0; i < whole; i += SPAN) {
      const int64_t end = std::min(whole, i + SPAN);
      zeros.push_back(zeros.back() + (end - i) * 64 - ones_of(i, end));
    }
  }
  int rows() const { return w.rows; }
  int columns() const { return w.columns; }
  const uint8_t* row(int r) const { return w.weight + r * w.row_bytes; }

  // The number of ones in some 64-bit words, two of which are a block. The order of bits in a block does not matter.
  int64_t ones_of(int64_t first, int64_t last) const {
    int64_t ones = 0;
    for (int64_t i = first; i < last; i++) {
      uint64_t v;
      memcpy(&v, w.high + 8 * i, 8);
      ones += __builtin_popcountll(v);
    }
    return ones;
  }

  // The bits of a block in order, zeros behind the last one.
  void bits_of(int64_t block, uint64_t* out) const {
    fetch(w.high + 16 * block + AHEAD, 16);
    if (block < w.unary / BLOCK) return planes(_mm_loadu_si128((const __m128i*)(w.high + 16 * block)), out);
    out[0] = out[1] = 0;
    for (int64_t i = block * BLOCK; i < w.unary; i++)
      out[i % BLOCK / 64] |= (uint64_t)code_at(w.high, i, w.unary, 1) << i % 64;
  }

  // A block with at most `high` zeros before it, and their number.
  struct Start {
    int64_t block, zeros;
  };
  Start start_of(int64_t high) const {
    const int64_t span = std::lower_bound(zeros.begin() + 1, zeros.end(), high) - zeros.begin() - 1;
    Start at{span * SPAN / 2, zeros[span]};
    for (const int64_t whole = w.unary / BLOCK; at.block < whole; at.block++) {
      const int64_t here = BLOCK - ones_of(2 * at.block, 2 * at.block + 2);
      if (at.zeros + here >= high) break;
      at.zeros += here;
    }
    return at;
  }

  // The list of cells first..last.
  void read_list(int64_t first, int64_t last, List& list) const {
    const Start at = start_of(first * parts);
    const int64_t before = at.block * BLOCK - at.zeros, origin = before / BLOCK * BLOCK;  // ones before; first index of the list
    const int shift = w.low_bits, log_parts = __builtin_ctz(parts), most = 63 / parts + 1;  // cells that begin in a word
    int64_t ones = before - origin, zeros = at.zeros;
    list.first = zeros >> log_parts;
    list.begin.assign(last - list.first + 2 + 2 * most + 16, w.count - origin);
    if (first == 0) list.begin[0] = 0;
    int32_t* begin = list.begin.data();
    for (int64_t block = at.block; zeros < last * parts && block * BLOCK < w.unary; block++) {
      if ((int64_t)list.place.size() < ones + 3 * BLOCK) list.place.resize(2 * ones + 3 * BLOCK);
      uint8_t* places = list.place.data() + ones;
      uint64_t bits[2];
      bits_of(block, bits);
      for (const uint64_t word : bits) {
        int32_t* here = begin + (zeros >> log_parts) + 1 - list.first;
        const int n = parts - 1 - (zeros & (parts - 1));  // number of the zero behind the cell's last high part
        ones_before_zeros(word, n, parts, most, here);    // the next word overwrites those that are too many
        for (int i = 0; i < most; i++) here[i] += ones;
        zeros_before_ones(word, places);
        for (int i = 0; i < 64; i += WIDTH)
          store(places + i, shl(keep(plus8(load(places + i), zeros), parts - 1), shift));
        const int found = __builtin_popcountll(word);
        places += found;
        ones += found;
        zeros += 64 - found;
      }
    }
    for (int64_t c = std::max(first, (zeros >> log_parts) + 1); c <= last; c++) begin[c - list.first] = w.count - origin;
    if (w.low_bits) {
      read_codes(w.low, w.count, w.low_bits, before, origin + ones, list.low);
      uint8_t* place = list.place.data();
      const uint8_t* low = list.low.data();
      for (int64_t i = before - origin; i < ones; i++) place[i] |= low[i];
    }
    read_codes(w.code, w.count, 7, before, origin + ones, list.code);
  }

  void read(State& s, int first, int last) const {
    const auto dtype = (Dtype)w.dtype;
    const int64_t at = (int64_t)first * w.groups, count = (int64_t)(last - first) * w.groups;
    s.scale.resize(count);
    s.mean.resize(count);
    s.own_scale.assign(last - first + MOST_ROWS, 0);
    to_floats((const uint8_t*)w.scale + at * size_of(dtype), dtype, count, s.scale.data());
    to_floats((const uint8_t*)w.mean + at * size_of(dtype), dtype, count, s.mean.data());
    to_floats((const uint8_t*)w.own_scale + first * size_of(dtype), dtype, last - first, s.own_scale.data());
    read_list((int64_t)first * w.columns / cell, ((int64_t)last * w.columns + cell - 1) / cell, s.list);
  }

  // positive, base and listed of whole tiles.
  void read_factors(State& s, int first, int last) const {
    const Tiled tiled(w.groups);
    for (auto* all : {&s.positive, &s.base, &s.listed}) all->assign(tiled.size(last - first), 0);
    for (int r = 0; r < last - first; r++) {
      const int64_t from = (int64_t)r * w.groups, to = tiled.row(r);
      const float *scale = s.scale.data() + from, *mean = s.mean.data() + from;
      const float offset = s.own_scale[r] * w.own_zero[first + r];
      int g = 0;
      for (; g + 4 <= w.groups; g += 4) {
        const __m128 alpha = _mm_loadu_ps(scale + g), base = _mm_sub_ps(_mm_loadu_ps(mean + g), alpha);
        _mm_storeu_ps(&s.positive[to + g * TILE], _mm_add_ps(alpha, alpha));
        _mm_storeu_ps(&s.base[to + g * TILE], base);
        _mm_storeu_ps(&s.listed[to + g * TILE], _mm_sub_ps(_mm_set1_ps(-offset), base));
      }
      for (; g < w.groups; g++) {
        s.positive[tiled.at(r, g)] = 2 * scale[g];
        s.base[tiled.at(r, g)] = mean[g] - scale[g];
        s.listed[tiled.at(r, g)] = -offset - (mean[g] - scale[g]);
      }
    }
  }

  // Calls use(column, 8-bit code) for the listed weights of a row.
  template <typename Use>
  INLINE void each_listed(const State& s, int r, Use use) const {
    const int64_t from = (int64_t)r * w.columns, to = from + w.columns;
    const uint8_t* signs = row(r);
    const uint8_t *place = s.list.place.data(), *code = s.list.code.data();
    for (int64_t c = from / cell; c * cell < to; c++) {
      const int64_t column = c * cell - from;
      const int end = s.list.begin[c + 1 - s.list.first];
      for (int i = s.list.begin[c - s.list.first]; i < end; i++) {
        const int64_t at = column + place[i];
        if (at < 0 || at >= w.columns) continue;  // it belongs to a neighbouring row
        const int sign = at < blocks * BLOCK ? signs[at / BLOCK * 16 + at % 16] >> at % BLOCK / 16 & 1
                                             : code_at(signs, at, w.columns, 1);
        use(at, code[i] | sign << 7);
      }
    }
  }

  bool has_halves() const {
#ifdef __AVX512VNNI__
    return w.columns % BLOCK == 0 && cell == BLOCK;
#else
    return false;
#endif
  }

  // decode_halves and decode_row compute in the order of torch's operations.
  void decode_halves(const State& s, int r, int first, Dtype dtype, uint16_t* out) const {
#ifdef __AVX512VNNI__
    const int64_t at = (int64_t)(r - first) * w.groups;
    const float *scale = s.scale.data() + at, *mean = s.mean.data() + at;
    for (int k = 0; k < blocks; k++) {
      const int g = group_of[k * SLOTS];
      const Floats two = _mm512_mask_blend_ps(2, set(mean[g] - scale[g]), set(mean[g] + scale[g]));
      const Bytes levels = halves(two, two, dtype);
      pick<1>(row(r) + 16 * k, levels, nullptr, out + k * BLOCK);
    }
    const Floats own = set(s.own_scale[r - first]), zero = set(w.own_zero[r]);
    const Floats steps = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    alignas(32) uint16_t values[256];
    for (int i = 0; i < 256; i += LANES)
      _mm256_store_si256((__m256i*)(values + i), halves(mul(own, sub(add(steps, set(i)), zero)), dtype));
    const int32_t* begin = s.list.begin.data() + (int64_t)r * blocks - s.list.first;
    alignas(64) uint8_t codes[WIDTH];
    for (int k = 0; k < blocks; k++, out += BLOCK) {
      const Bytes signs = both16(row(r) + 16 * k);
      for (int i = begin[k]; i < begin[k + 1]; i += WIDTH) {
        const uint8_t* place = s.list.place.data() + i;
        store(codes, either(load(s.list.code.data() + i), keep(bits_at(signs, load(place)), 128)));
        const int here = std::min(WIDTH, begin[k + 1] - i);
        for (int j = 0; j < here; j++) out[place[j]] = values[codes[j]];
      }
    }
#endif
  }

  void decode_row(const State& s, int r, int first, float* out) const {
    alignas(64) uint8_t signs[BLOCK];
    const int64_t at = (int64_t)(r - first) * w.groups;
    const float *scale = s.scale.data() + at, *mean = s.mean.data() + at;
    for (int k = 0; k < blocks; k++) {
      ordered_codes<1>(row(r) + 16 * k, signs);
      const int g = group_of[k * SLOTS];
      alignas(32) const float levels[8] = {mean[g] - scale[g], mean[g] + scale[g]};
      for (int i = 0; i < BLOCK; i += LANES) storef(out + k * BLOCK + i, look_up(levels, signs + i));
    }
    for (int i = blocks * BLOCK; i < w.columns; i++) {
      const int g = std::min(i / w.group_size, w.groups - 1);
      out[i] = code_at(row(r), i, w.columns, 1) ? mean[g] + scale[g] : mean[g] - scale[g];
    }
    const float own = s.own_scale[r - first], zero = w.own_zero[r];
    each_listed(s, r, [&](int64_t column, int code) { out[column] = own * ((float)code - zero); });
  }
};

// Up to 16 listed weights of one cell, for each row of a tile.
struct Listed {
  Bytes place, code, some;  // some: 255 where there is a listed weight

  INLINE Listed(const List& list, const int32_t* const* begin, int passed) {
    static constexpr uint8_t masks[32] = {255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255};
    const uint8_t *places[TILE], *codes[TILE], *mask[TILE];
    for (int i = 0; i < TILE; i++) {
      const int64_t at = begin[i][0] + passed;
      places[i] = list.place.data() + at;
      codes[i] = list.code.data() + at;
      mask[i] = masks + 16 - std::max<int64_t>(0, std::min<int64_t>(begin[i][1] - at, 16));
    }
    place = each16(places);
    code = each16(codes);
    some = each16(mask);
  }
};

// out[token][r - first] += rows first..last times the blocks of x, in digits.
template <int TOKENS>
void dot_salient(const SalientWeight& weight, const SalientWeight::State& s, const Digits& x, int token, int first, int last,
                 float* out) {
  const Salient& w = weight.w;
  const int stride = last - first;
  const Tiled tiled(w.groups);
  const Bytes one = eights(0x0101010101010101);
  for (int r = first; r < last; r += TILE) {
    const Rows<1> rows(w.weight, w.row_bytes, w.row_bytes, r, last - 1);
    const int64_t at = tiled.row(r - first);
    const Floats own = each_row(s.own_scale.data() + r - first);
    const int32_t* begin_of[TILE];  // the last row stands in for rows behind it
    for (int i = 0; i < TILE; i++)
      begin_of[i] = s.list.begin.data() + (int64_t)std::min(r + i, last - 1) * weight.blocks - s.list.first;
    Floats sums[TOKENS];
    for (int t = 0; t < TOKENS; t++) sums[t] = set(0);
    for (int k = 0; k < weight.blocks; k++) {
      Sum<1> positive[TOKENS][2], listed[TOKENS][2];
      Sum<8> codes[TOKENS][2];
      rows.template each_slot_of<1>(k, [&](int slot, Many<1> q) {
        for (int t = 0; t < TOKENS; t++)
          for (int digit = 0; digit < 2; digit++)
            positive[t][digit].add(q.v[0], both16(x.block(token + t, k) + digit * BLOCK + 16 * slot));
      });
      const Bytes signs = rows16(rows.p + 16 * k, rows.stride);
      const int32_t* begin[TILE];
      int most = 0;
      for (int i = 0; i < TILE; i++) {
        begin[i] = begin_of[i] + k;
        most = std::max(most, begin[i][1] - begin[i][0]);
      }
      for (int passed = 0; passed < most; passed += 16) {
        const Listed list(s.list, begin, passed);
        const Bytes sign = both(bits_at(signs, list.place), list.some);
        const Bytes code = either(both(list.code, list.some), keep(sign, 128));
        const Bytes is_listed = both(list.some, one), is_positive = both(sign, one);
        for (int t = 0; t < TOKENS; t++) {
          for (int digit = 0; digit < 2; digit++) {
            const Bytes of_x = gather128(x.block(token + t, k) + digit * BLOCK, list.place);
            positive[t][digit].add(is_positive, minus(of_x));
            listed[t][digit].add(is_listed, of_x);
            codes[t][digit].add(code, of_x);
          }
        }
      }
      const unsigned g = weight.group_of[k * SLOTS];
      const Floats of_positive = spread(loadf(s.positive.data() + at + g / 4 * LANES), g % 4);
      const Floats of_listed = spread(loadf(s.listed.data() + at + g / 4 * LANES), g % 4);
      for (int t = 0; t < TOKENS; t++) {
        Floats sum = mul(joined(positive[t][0].ints(), positive[t][1].ints()), of_positive);
        sum = fma(joined(listed[t][0].ints(), listed[t][1].ints()), of_listed, sum);
        sum = fma(joined(codes[t][0].ints(), codes[t][1].ints()), own, sum);
        sums[t] = fma(sum, set(x.steps(token + t)[k]), sums[t]);
      }
    }
    for (int t = 0; t < TOKENS; t++) {
      for (int64_t g = 0; g < tiled.span; g += LANES)
        sums[t] = fma(loadf(s.base.data() + at + g), four(x.sums(token + t) + g / TILE), sums[t]);
      add_totals(sums[t], last - r, out + t * stride + r - first);
    }
  }
}
