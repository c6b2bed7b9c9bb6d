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

// Codes of a flat list, decoded 128 at a time.
struct Stream {
  const uint8_t* p;
  int64_t count, block = -1;
  int bits;
  uint8_t q[BLOCK];

  Stream(const uint8_t* p, int64_t count, int bits) : p(p), count(count), bits(bits) {}
  int at(int64_t k) {
    if (!bits) return 0;
    if (k / BLOCK != block) {
      block = k / BLOCK;
      if ((block + 1) * BLOCK <= count) {
        with_bits(bits, [&](auto width) { ordered_codes<width>(p + block * 16 * width, q); });
      } else {
        for (int64_t i = block * BLOCK; i < count; i++) q[i % BLOCK] = code_at(p, i, count, bits);
      }
    }
    return q[k % BLOCK];
  }
};

struct SalientWeight {
  static constexpr int SPAN = 32;  // blocks whose zeros are counted together
  const Salient& w;
  int blocks;
  std::vector<int64_t> zeros;  // before each span

  // Of some rows: levels by group, and the salient weights, row by row.
  struct State {
    std::vector<float> scale, mean, own_scale;
    std::vector<int32_t> column, begin;  // begin: of each row in column and code
    std::vector<uint8_t> code;
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

  // Calls put(k, position) for the salient weights from flat position `from` on, until it says false.
  template <typename Put>
  void listed(int64_t from, Put put) const {
    const int64_t wanted = from >> w.low_bits;  // zeros to pass
    const int64_t span = std::lower_bound(zeros.begin() + 1, zeros.end(), wanted) - zeros.begin() - 1;
    int64_t passed = zeros[span], block = span * SPAN;
    const int64_t whole = w.unary / BLOCK;
    while (block < whole && passed + BLOCK - ones_of(block) < wanted) passed += BLOCK - ones_of(block++);
    Stream low(w.low, w.count, w.low_bits);
    for (int64_t k = block * BLOCK - passed; block <= whole; block++) {
      uint64_t bits[2];
      block < whole ? bits_of(block, bits) : tail_bits(bits);
      for (int half = 0; half < 2; half++) {
        for (uint64_t v = bits[half]; v; v &= v - 1, k++) {
          const int64_t high = block * BLOCK + 64 * half + __builtin_ctzll(v) - k;
          if (high < wanted) continue;
          const int64_t position = high << w.low_bits | low.at(k);
          if (position >= from && !put(k, position)) return;
        }
      }
    }
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
    s.column.clear();
    s.code.clear();
    s.begin.assign(1, 0);
    const int64_t end = (int64_t)last * w.columns;
    int64_t row_begin = (int64_t)first * w.columns;
    Stream code(w.code, w.count, 7);
    listed(row_begin, [&](int64_t k, int64_t position) {
      if (position >= end) return false;
      for (; position >= row_begin + w.columns; row_begin += w.columns) s.begin.push_back(s.column.size());
      s.column.push_back(position - row_begin);
      s.code.push_back(code.at(k));
      return true;
    });
    s.begin.resize(last - first + 1, s.column.size());
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
    for (int j = s.begin[r - first]; j < s.begin[r - first + 1]; j++) {
      const int i = s.column[j];
      out[i] = own * ((float)(s.code[j] | signs[i] << 7) - zero);
    }
  }
};
