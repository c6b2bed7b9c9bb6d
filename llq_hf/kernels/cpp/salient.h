// Binarized weights, a sign for each and two levels for every row and group, but for a list of salient ones that have 8 bits
// and a grid of their row: the sign, and 7 bits beside it.
//
// The list holds positions in the flat matrix as Elias and Fano do: low bits as they are; high parts in unary, position k as
// a one at bit (high part + k). Rows find their part of it by counting zeros.
//
// For products the listed codes of a row become a row of bytes, marked by their top bit. That makes three products of
// integers: of the positive signs of what is not listed, of the marks, and of the codes.
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

// Codes first..last of a list of `count`, from out[first % BLOCK] on.
inline void read_codes(const uint8_t* p, int64_t count, int bits, int64_t first, int64_t last, std::vector<uint8_t>& out) {
  const int64_t begin = first / BLOCK * BLOCK, whole = std::min(count / BLOCK * BLOCK, (last + BLOCK - 1) / BLOCK * BLOCK);
  out.resize(last - begin + BLOCK);
  with_bits(bits, [&](auto width) {
    for (int64_t i = begin; i < whole; i += BLOCK) ordered_codes<width>(p + i / BLOCK * 16 * width, out.data() + i - begin);
  });
  for (int64_t i = std::max(whole, begin); i < last; i++) out[i - begin] = code_at(p, i, count, bits);
}

struct SalientWeight {
  static constexpr int SPAN = 32;  // blocks whose zeros are counted together
  const Salient& w;
  int blocks;
  std::vector<int> group_of;   // of each block
  std::vector<int64_t> zeros;  // before each span

  // Of some rows: levels by group; and the salient weights, row by row.
  struct State {
    std::vector<float> scale, mean, own_scale;
    std::vector<int32_t> position;  // from the first row on; a larger one than any comes last
    std::vector<uint8_t> low, code, marks;
    int64_t skipped;  // codes before the one that belongs to position[0]
    int next;         // the first of the next row: rows are read in order
    std::vector<float> positive, listed, base;  // [groups], of one row: what products count, and what all columns have
  };

  explicit SalientWeight(const Salient& w) : w(w), blocks(w.columns / BLOCK), group_of(blocks), zeros{0} {
    for (int k = 0; k < blocks; k++) group_of[k] = std::min(k * BLOCK / w.group_size, w.groups - 1);
    const int64_t whole = w.unary / BLOCK;
    for (int64_t b = 0; b < whole; b += SPAN) {
      const int64_t end = std::min(whole, b + SPAN);
      int64_t ones = 0;
      for (int64_t i = b; i < end; i++) ones += ones_of(i);
      zeros.push_back(zeros.back() + (end - b) * BLOCK - ones);
    }
  }
  int rows() const { return w.rows; }
  int columns() const { return w.columns; }
  const uint8_t* row(int r) const { return w.weight + r * w.row_bytes; }
  int ones_of(int64_t block) const {
    uint64_t v[2];
    memcpy(v, w.high + 16 * block, 16);
    return __builtin_popcountll(v[0]) + __builtin_popcountll(v[1]);
  }

  // The bits of a block in their order.
  void bits_of(int64_t block, uint64_t* out) const {
    const __m128i v = _mm_loadu_si128((const __m128i*)(w.high + 16 * block));
    out[0] = out[1] = 0;
    for (int f = 0; f < 8; f++) {  // bit f of the 16 bytes stands for positions 16 f ..
      const uint64_t part = (uint16_t)_mm_movemask_epi8(_mm_sll_epi16(v, _mm_cvtsi32_si128(7 - f)));
      out[f / 4] |= part << f % 4 * 16;
    }
  }
  // Those of the last bits, which are no block.
  void tail_bits(uint64_t* out) const {
    out[0] = out[1] = 0;
    for (int64_t i = w.unary / BLOCK * BLOCK; i < w.unary; i++)
      out[i % BLOCK / 64] |= (uint64_t)code_at(w.high, i, w.unary, 1) << i % 64;
  }

  // Where the ones of high part `high` begin, or a little before: a block, and how many ones come before it.
  struct Place {
    int64_t block, ones;
  };
  Place place(int64_t high) const {
    const int64_t span = std::lower_bound(zeros.begin() + 1, zeros.end(), high) - zeros.begin() - 1;
    int64_t passed = zeros[span], block = span * SPAN;
    for (const int64_t whole = w.unary / BLOCK; block < whole; block++) {
      const int here = BLOCK - ones_of(block);
      if (passed + here >= high) break;
      passed += here;
    }
    return {block, block * BLOCK - passed};
  }

  // Where 128 bits are set, counted from `origin`, to out[0..]; how many. 16 more may be written.
  static int ones(const uint64_t* bits, int origin, int32_t* out) {
    int found = 0;
#ifdef __AVX512VNNI__
    const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int i = 0; i < BLOCK; i += 16) {
      const __mmask16 some = bits[i / 64] >> i % 64;
      const __m512i places = _mm512_add_epi32(_mm512_maskz_compress_epi32(some, steps), _mm512_set1_epi32(origin + i));
      _mm512_storeu_si512(out + found, places);
      found += __builtin_popcount(some);
    }
#else
    for (int half = 0; half < 2; half++)
      for (uint64_t v = bits[half]; v; v &= v - 1) out[found++] = origin + 64 * half + __builtin_ctzll(v);
#endif
    return found;
  }

  // The salient weights of the flat positions from..to - 1, and perhaps some before and behind; the number of the first.
  int64_t read_positions(State& s, int64_t from, int64_t to) const {
    const Place start = place(from >> w.low_bits);
    const int64_t last = to >> w.low_bits, whole = w.unary / BLOCK;
    int64_t found = 0;
    for (int64_t block = start.block; block <= whole; block++) {
      if ((int64_t)s.position.size() < found + 2 * BLOCK) s.position.resize(2 * (found + BLOCK));
      uint64_t bits[2];
      block < whole ? bits_of(block, bits) : tail_bits(bits);
      found += ones(bits, (block - start.block) * BLOCK, s.position.data() + found);
      if ((block + 1) * BLOCK - (start.ones + found) > last) break;  // zeros so far: all high parts up to `last` are seen
    }
    s.position.resize(found + 1);
    if (w.low_bits) read_codes(w.low, w.count, w.low_bits, start.ones, start.ones + found, s.low);
    const uint8_t* low = s.low.data() + start.ones % BLOCK;
    const int shift = w.low_bits, rest = from & ((1 << shift) - 1);
    const int32_t high = start.block * BLOCK - start.ones - (from >> shift);  // of the first bit, less that of `from`
    int32_t* position = s.position.data();
    for (int i = 0; shift && i < found; i++) position[i] = ((position[i] + high - i) << shift) + low[i] - rest;
    for (int i = 0; !shift && i < found; i++) position[i] += high - i;
    position[found] = std::numeric_limits<int32_t>::max();
    return start.ones;
  }

  void read(State& s, int first, int last) const {
    const auto dtype = (Dtype)w.dtype;
    const int64_t at = (int64_t)first * w.groups, count = (int64_t)(last - first) * w.groups;
    s.scale.resize(count);
    s.mean.resize(count);
    s.own_scale.resize(last - first);
    to_floats((const uint8_t*)w.scale + at * size_of(dtype), dtype, count, s.scale.data());
    to_floats((const uint8_t*)w.mean + at * size_of(dtype), dtype, count, s.mean.data());
    to_floats((const uint8_t*)w.own_scale + first * size_of(dtype), dtype, last - first, s.own_scale.data());
    const int64_t number = read_positions(s, (int64_t)first * w.columns, (int64_t)last * w.columns);
    read_codes(w.code, w.count, 7, number, number + s.position.size() - 1, s.code);
    s.skipped = number % BLOCK;
    for (s.next = 0; s.position[s.next] < 0;) s.next++;
    s.marks.resize(w.columns + BLOCK);
  }

  // The next row's listed codes where they belong, with the top bit; zeros elsewhere.
  void mark_row(State& s, int r, int first) const {
    std::fill(s.marks.begin(), s.marks.end(), 0);
    uint8_t* marks = s.marks.data() - (int64_t)(r - first) * w.columns;
    const uint8_t* code = s.code.data() + s.skipped;
    const int32_t* position = s.position.data();
    const int32_t end = (r - first + 1) * w.columns;
    int j = s.next;  // on its own: a byte's store may change all that the state holds
    for (; position[j] < end; j++) marks[position[j]] = 0x80 | code[j];
    s.next = j;
  }

  bool has_halves() const {
#ifdef __AVX512VNNI__
    return w.columns % BLOCK == 0;
#else
    return false;
#endif
  }

  // In the order of torch's operations, like decode_row.
  void decode_halves(State& s, int r, int first, Dtype dtype, uint16_t* out) const {
#ifdef __AVX512VNNI__
    dtype == BF16 ? decode_as<BF16>(s, r, first, out) : decode_as<F16>(s, r, first, out);
#endif
  }

#ifdef __AVX512VNNI__
  template <Dtype D>
  void decode_as(State& s, int r, int first, uint16_t* out) const {
    mark_row(s, r, first);
    const uint8_t* marks = s.marks.data();
    const int64_t at = (int64_t)(r - first) * w.groups;
    const float *scale = s.scale.data() + at, *mean = s.mean.data() + at;
    const Floats own = set(s.own_scale[r - first]), zero = set(w.own_zero[r]);
    for (int k = 0; k < blocks; k++) {
      const int g = group_of[k];
      const Floats low = set(mean[g] - scale[g]), high = set(mean[g] + scale[g]);
      each_slot_of_row<1>(row(r) + 16 * k, [&](int slot, __m128i sign) {
        const int i = k * BLOCK + 16 * slot;
        const __m128i mark = _mm_loadu_si128((const __m128i*)(marks + i));
        const __m128i code = either(keep(mark, 127), shl(sign, 7));
        const Floats plain = _mm512_mask_blend_ps(_mm_test_epi8_mask(sign, sign), low, high);
        const Floats v = _mm512_mask_blend_ps(_mm_movepi8_mask(mark), plain, mul(own, sub(floats(code), zero)));
        _mm256_storeu_si256((__m256i*)(out + i), halves(v, D));
      });
    }
  }
#endif

  // In the order of torch's operations.
  void decode_row(State& s, int r, int first, float* out) const {
    static thread_local std::vector<uint8_t> signs;
    signs.resize(w.columns);
    const int64_t at = (int64_t)(r - first) * w.groups;
    const float *scale = s.scale.data() + at, *mean = s.mean.data() + at;
    for (int k = 0; k < blocks; k++) {
      ordered_codes<1>(row(r) + 16 * k, signs.data() + k * BLOCK);
      const int g = group_of[k];
      alignas(32) const float levels[8] = {mean[g] - scale[g], mean[g] + scale[g]};
      for (int i = k * BLOCK; i < (k + 1) * BLOCK; i += LANES) storef(out + i, look_up(levels, signs.data() + i));
    }
    for (int i = blocks * BLOCK; i < w.columns; i++) {
      signs[i] = code_at(row(r), i, w.columns, 1);
      const int g = std::min(i / w.group_size, w.groups - 1);
      out[i] = signs[i] ? mean[g] + scale[g] : mean[g] - scale[g];
    }
    const float own = s.own_scale[r - first], zero = w.own_zero[r];
    const int base = (r - first) * w.columns;
    const uint8_t* code = s.code.data() + s.skipped;
    for (; s.position[s.next] < base + w.columns; s.next++) {
      const int i = s.position[s.next] - base;
      out[i] = own * ((float)(code[s.next] | signs[i] << 7) - zero);
    }
  }

  // What the products of a row count.
  void read_factors(State& s, int r, int first) const {
    s.positive.resize(w.groups);
    s.listed.resize(w.groups);
    s.base.resize(w.groups);
    const int64_t at = (int64_t)(r - first) * w.groups;
    const float *scale = s.scale.data() + at, *mean = s.mean.data() + at;
    const float offset = s.own_scale[r - first] * w.own_zero[r];
    for (int g = 0; g < w.groups; g++) {
      s.positive[g] = 2 * scale[g];
      s.base[g] = mean[g] - scale[g];
      s.listed[g] = -s.base[g] - offset;
    }
  }
};

// The signs of WIDTH columns from WIDTH * part on, one byte each, where their block's begin at p.
INLINE Bytes signs_of(const uint8_t* p, int part) { return keep(shr_lanes(both16(p), part * TILE), 1); }

// out[token] = row r times x, in digits.
template <int TOKENS>
void dot_salient(const SalientWeight& weight, const SalientWeight::State& s, const Digits& x, int token, int r, int first,
                 float* out, int stride) {
  const Salient& w = weight.w;
  const float own = s.own_scale[r - first];
  const uint8_t* p = weight.row(r);
  Floats sums[TOKENS];
  for (int t = 0; t < TOKENS; t++) sums[t] = set(0);
  for (int k = 0; k < weight.blocks; k++) {
    const int g = weight.group_of[k];
    Sum<1> positive[TOKENS][2], listed[TOKENS][2];
    Sum<8> codes[TOKENS][2];
    for (int part = 0; part < BLOCK / WIDTH; part++) {
      const Bytes mark = load(s.marks.data() + k * BLOCK + part * WIDTH), sign = signs_of(p + 16 * k, part);
      const Bytes is_listed = keep(shr(mark, 7), 1), is_positive = without(sign, is_listed);
      const Bytes code = either(keep(mark, 127), shl(both(sign, is_listed), 7));
      for (int t = 0; t < TOKENS; t++) {
        for (int digit = 0; digit < 2; digit++) {
          const Bytes of_x = load(x.block(token + t, k) + digit * BLOCK + part * WIDTH);
          positive[t][digit].add(is_positive, of_x);
          listed[t][digit].add(is_listed, of_x);
          codes[t][digit].add(code, of_x);
        }
      }
    }
    for (int t = 0; t < TOKENS; t++) {
      Floats sum = mul(joined(positive[t][0].ints(), positive[t][1].ints()), set(s.positive[g]));
      sum = fma(joined(listed[t][0].ints(), listed[t][1].ints()), set(s.listed[g]), sum);
      sum = fma(joined(codes[t][0].ints(), codes[t][1].ints()), set(own), sum);
      sums[t] = fma(sum, set(x.steps(token + t)[k]), sums[t]);
    }
  }
  for (int t = 0; t < TOKENS; t++) out[t * stride] = total(sums[t]) + dot(s.base.data(), x.sums(token + t), w.groups);
}
