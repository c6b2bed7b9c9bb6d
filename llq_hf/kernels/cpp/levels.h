// Codes of 2 bits that pick one of a group's levels, whatever these are: sums of two binary weights (dual binarization), or
// two signs whose meaning depends on the column (salient or not).
//
// A level is linear in the code's bits b0, b1 and their product: value = l0 + (l1 - l0) b0 + (l2 - l0) b1 + (l3 - l2 - l1 +
// l0) b0 b1. So the dot product with x is one of each plane of bits, and no level is looked up. Salient columns have four
// levels of their own, which add up (their product's factor is 0), and activations of their own, zero elsewhere.
#pragma once
#include <functional>

#include "activations.h"
#include "halves.h"
#include "pool.h"

// Mirrored by kernels/native.py.
struct Levels {
  const uint8_t* weight;
  int64_t row_bytes;
  const void* scale;       // [rows, groups, 2]: of each plane; [rows, groups, 4]: of low, mid, first and second salient sign
  const void* mean;        // [rows, groups, 3 or 4]: of low, mid, salient (both signs together, or each); null with 2 scales
  const uint8_t* salient;  // packed bits [columns]; null: none
  int32_t rows, columns, groups, group_size, dtype, means;
};

struct LevelWeight {
  static constexpr int TERMS = 5;  // plain: b0, b1, b0 b1; salient: b0, b1
  const Levels& w;
  int blocks, tail;
  std::vector<int> group_of;       // of each block
  std::vector<uint8_t> salient;    // 4 for salient columns, else 0: where their levels begin

  // Of some rows, for every group.
  struct State {
    std::vector<float> scale, mean, table;  // table: 8 levels
    std::vector<float> factor[TERMS], plain, own;  // [rows][groups]; plain, own: the first level of either kind
  };

  explicit LevelWeight(const Levels& w)
      : w(w), blocks(w.columns / BLOCK), tail(w.columns % BLOCK), group_of(blocks), salient(w.columns) {
    for (int k = 0; k < blocks; k++) group_of[k] = std::min(k * BLOCK / w.group_size, w.groups - 1);
    if (w.salient)
      for (int i = 0; i < w.columns; i++) salient[i] = 4 * code_at(w.salient, i, w.columns, 1);
  }
  int rows() const { return w.rows; }
  int columns() const { return w.columns; }
  const uint8_t* row(int r) const { return w.weight + r * w.row_bytes; }

  // Scales and means as floats; how many groups there are in these rows.
  int64_t read_levels(State& s, int first, int last) const {
    const int64_t from = (int64_t)first * w.groups, count = (int64_t)(last - first) * w.groups;
    const auto dtype = (Dtype)w.dtype;
    const int scales = w.mean ? 4 : 2;
    s.scale.resize(count * scales);
    to_floats((const uint8_t*)w.scale + from * scales * size_of(dtype), dtype, count * scales, s.scale.data());
    if (w.mean) {
      s.mean.resize(count * w.means);
      to_floats((const uint8_t*)w.mean + from * w.means * size_of(dtype), dtype, count * w.means, s.mean.data());
    }
    return count;
  }

  // In the order of torch's operations, so that levels are the same to the last bit.
  void read(State& s, int first, int last) const {
    const int64_t count = read_levels(s, first, last);
    const int scales = w.mean ? 4 : 2;
    s.table.resize(count * 8);
    for (int64_t i = 0; i < count; i++) {
      float* t = s.table.data() + 8 * i;
      const float* a = s.scale.data() + scales * i;
      if (!w.mean) {
        const float levels[8] = {0, a[0], a[1], a[0] + a[1], 0, 0, 0, 0};
        memcpy(t, levels, sizeof levels);
        continue;
      }
      const float* m = s.mean.data() + w.means * i;
      const float first_mean = w.means == 4 ? m[2] : 0, second_mean = m[w.means - 1];
      const float low = first_mean - a[2], high = first_mean + a[2];
      const float levels[8] = {m[0] - a[0],  m[0] + a[0],  m[1] - a[1],  m[1] + a[1],
                               low + (second_mean - a[3]), low + (second_mean + a[3]),
                               high + (second_mean - a[3]), high + (second_mean + a[3])};
      memcpy(t, levels, sizeof levels);
    }
  }

  // What the bits of codes are multiplied with.
  void read_factors(State& s, int first, int last) const {
    const int64_t count = read_levels(s, first, last);
    for (auto& factor : s.factor) factor.resize(count);
    const float *a = s.scale.data(), *m = s.mean.data();
    float *f0 = s.factor[0].data(), *f1 = s.factor[1].data(), *f2 = s.factor[2].data();
    if (!w.mean) {
      for (int64_t i = 0; i < count; i++) {
        f0[i] = a[2 * i];
        f1[i] = a[2 * i + 1];
      }
      return;
    }
    s.plain.resize(count);
    s.own.resize(count);
    float *f3 = s.factor[3].data(), *f4 = s.factor[4].data(), *plain = s.plain.data(), *own = s.own.data();
    for (int64_t i = 0; i < count; i++) {
      plain[i] = m[i * w.means] - a[4 * i];
      f0[i] = 2 * a[4 * i];
      f1[i] = (m[i * w.means + 1] - a[4 * i + 1]) - plain[i];
      f2[i] = 2 * (a[4 * i + 1] - a[4 * i]);
      own[i] = m[i * w.means + w.means - 1] + (w.means == 4 ? m[i * w.means + 2] : 0) - a[4 * i + 2] - a[4 * i + 3];
      f3[i] = 2 * a[4 * i + 3];
      f4[i] = 2 * a[4 * i + 2];
    }
  }

  bool has_halves() const {
#ifdef __AVX512VNNI__
    return tail == 0;
#else
    return false;
#endif
  }

  void decode_halves(const State& s, int r, int first, Dtype dtype, uint16_t* out) const {
#ifdef __AVX512VNNI__
    const float* tables = s.table.data() + (int64_t)(r - first) * w.groups * 8;
    for (int k = 0; k < blocks; k++) {
      const Floats table = _mm512_castps256_ps512(_mm256_loadu_ps(tables + 8 * group_of[k]));
      const Bytes levels = halves(table, table, dtype);
      pick<2>(row(r) + 32 * k, levels, levels, salient.data() + k * BLOCK, out + k * BLOCK);
    }
#endif
  }

  void decode_row(const State& s, int r, int first, float* out) const {
    const float* tables = s.table.data() + (int64_t)(r - first) * w.groups * 8;
    const uint8_t* p = row(r);
    alignas(64) uint8_t q[BLOCK];
    for (int k = 0; k < blocks; k++) {
      ordered_codes<2>(p + 32 * k, q);
      for (int i = 0; i < BLOCK; i++) q[i] |= salient[k * BLOCK + i];
      for (int i = 0; i < BLOCK; i += LANES) storef(out + k * BLOCK + i, look_up(tables + 8 * group_of[k], q + i));
    }
    for (int i = blocks * BLOCK; i < w.columns; i++)
      out[i] = tables[8 * std::min(i / w.group_size, w.groups - 1) + (salient[i] | code_at(p, i, w.columns, 2))];
  }
};

// The dot product of bytes q with a block of digits, for every lane.
template <int VECTORS_>
INLINE Floats block_sum(const Bytes* q, const int8_t* digits) {
  Sum<1> high, low;
  for (int n = 0; n < VECTORS_; n++) {
    high.add(q[n], digits_of<2>(digits, n));
    low.add(q[n], digits_of<2>(digits + BLOCK, n));
  }
  return joined(high.ints(), low.ints());
}

// out[token][r - first] += rows first..last times the blocks of x. SIGNS: levels are arbitrary, and `own` holds the salient
// activations; without, a level is the sum of what its bits stand for.
template <bool SIGNS>
void dot_levels(const LevelWeight& weight, const LevelWeight::State& state, const Digits& x, const Digits& own, int token,
                int first, int last, float* out) {
  constexpr int R = ROWS<2>, V = VECTORS<2>;
  const int groups = weight.w.groups;
  const int64_t at = (int64_t)token * weight.blocks;
  const float *step = x.step.data() + at, *own_step = SIGNS ? own.step.data() + at : nullptr;
  for (int r = first; r < last; r += R) {
    const uint8_t* p[R];
    const float* factor[LevelWeight::TERMS][R];
    int64_t begin[R];
    for (int i = 0; i < R; i++) {
      const int row = std::min(r + i, last - 1);
      p[i] = weight.row(row);
      begin[i] = (int64_t)(row - first) * groups;
      for (int j = 0; j < LevelWeight::TERMS; j++) factor[j][i] = state.factor[j].data() + begin[i];
    }
    Floats sums = set(0);
    for (int k = 0; k < weight.blocks; k++) {
      const Bytes v = plane2(p);
      for (int i = 0; i < R; i++) {
        _mm_prefetch((const char*)p[i] + AHEAD, _MM_HINT_T0);
        p[i] += 32;
      }
      Bytes b0[V], b1[V], b01[V];
      for (int f = 0; f < V; f++) {
        b0[f] = keep(shr(v, 2 * f), 1);
        b1[f] = keep(shr(v, 2 * f + 1), 1);
        if constexpr (SIGNS) b01[f] = both(b0[f], b1[f]);
      }
      const int g = weight.group_of[k];
      const int8_t* digits = x.block(token, k);
      Floats sum = mul(block_sum<V>(b0, digits), spread<R>(factor[0], g));
      sum = fma(block_sum<V>(b1, digits), spread<R>(factor[1], g), sum);
      if constexpr (SIGNS) sum = fma(block_sum<V>(b01, digits), spread<R>(factor[2], g), sum);
      sums = fma(sum, set(step[k]), sums);
      if (SIGNS && own_step[k] != 0) {
        const int8_t* salient = own.block(token, k);
        sum = mul(block_sum<V>(b0, salient), spread<R>(factor[3], g));
        sum = fma(block_sum<V>(b1, salient), spread<R>(factor[4], g), sum);
        sums = fma(sum, set(own_step[k]), sums);
      }
    }
    float found[R];
    totals<R>(sums, found);
    for (int i = 0; i < R && r + i < last; i++) {
      float y = found[i];
      if (SIGNS) {
        y += dot(state.plain.data() + begin[i], x.group_sum.data() + (int64_t)token * groups, groups);
        y += dot(state.own.data() + begin[i], own.group_sum.data() + (int64_t)token * groups, groups);
      }
      out[r + i - first] += y;
    }
  }
}
