// Binarized weights, a sign for each and two levels for every row and group, but for a list of salient ones that have 8 bits
// and a grid of their row: the sign, and 7 bits beside it.
//
// The list holds positions in the flat matrix as Elias and Fano do: low bits as they are; high parts in unary, position k as
// a one at bit (high part + k). Rows find their part of it by counting zeros.
#pragma once
#include "activations.h"
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
  std::vector<int64_t> zeros;  // before each span

  // Of some rows: levels by group; and the salient weights, row by row.
  struct State {
    std::vector<float> scale, mean, own_scale;
    std::vector<int32_t> position, begin;  // position: from the first row on; begin: of each row among them
    std::vector<uint8_t> low, code;
    int64_t skipped;  // codes before the first one
  };

  explicit SalientWeight(const Salient& w) : w(w), blocks(w.columns / BLOCK), zeros{0} {
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
  bool has_halves() const { return false; }
  void decode_halves(const State&, int, int, Dtype, uint16_t*) const {}

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

  // The salient weights of the flat positions from..to - 1; the number of the first.
  int64_t read_positions(State& s, int64_t from, int64_t to) const {
    const Place start = place(from >> w.low_bits);
    const int64_t last = to >> w.low_bits, whole = w.unary / BLOCK, origin = start.block * BLOCK;
    int64_t found = 0;
    for (int64_t block = start.block; block <= whole; block++) {
      s.position.resize(found + BLOCK);
      int32_t* out = s.position.data() + found;
      uint64_t bits[2];
      block < whole ? bits_of(block, bits) : tail_bits(bits);
      for (int half = 0; half < 2; half++)
        for (uint64_t v = bits[half]; v; v &= v - 1) *out++ = block * BLOCK - origin + 64 * half + __builtin_ctzll(v);
      found = out - s.position.data();
      if ((block + 1) * BLOCK - (start.ones + found) > last) break;  // zeros so far: all high parts up to `last` are seen
    }
    s.position.resize(found);
    if (w.low_bits) read_codes(w.low, w.count, w.low_bits, start.ones, start.ones + found, s.low);
    const int64_t zeros_before = origin - start.ones;
    const uint8_t* low = s.low.data() + start.ones % BLOCK;
    for (int64_t i = 0; i < found; i++) {
      const int64_t high = s.position[i] + zeros_before - i;
      s.position[i] = (int32_t)((high << w.low_bits | (w.low_bits ? low[i] : 0)) - from);
    }
    const auto first = std::lower_bound(s.position.begin(), s.position.end(), 0);
    const int64_t before = first - s.position.begin();
    s.position.erase(std::lower_bound(first, s.position.end(), (int32_t)(to - from)), s.position.end());
    s.position.erase(s.position.begin(), s.position.begin() + before);
    return start.ones + before;
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
    read_codes(w.code, w.count, 7, number, number + s.position.size(), s.code);
    s.skipped = number % BLOCK;
    s.begin.assign(1, 0);
    for (int r = 1; r <= last - first; r++) {
      const auto from = s.position.begin() + s.begin.back();
      s.begin.push_back(std::lower_bound(from, s.position.end(), r * w.columns) - s.position.begin());
    }
  }

  // In the order of torch's operations.
  void decode_row(const State& s, int r, int first, float* out) const {
    static thread_local std::vector<uint8_t> signs;
    signs.resize(w.columns);
    const float *scale = s.scale.data() + (int64_t)(r - first) * w.groups, *mean = s.mean.data() + (int64_t)(r - first) * w.groups;
    for (int k = 0; k < blocks; k++) {
      ordered_codes<1>(row(r) + 16 * k, signs.data() + k * BLOCK);
      const int g = std::min(k * BLOCK / w.group_size, w.groups - 1);
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
    for (int j = s.begin[r - first]; j < s.begin[r - first + 1]; j++) {
      const int i = s.position[j] - base;
      out[i] = own * ((float)(code[j] | signs[i] << 7) - zero);
    }
  }
};
