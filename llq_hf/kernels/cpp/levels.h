// Codes of 2 bits that pick one of a group's levels, whatever these are: sums of two binary weights (dual binarization), or
// two signs whose meaning depends on the column (salient or not).
//
// For products the levels of a row and group become numbers of 14 bits, base + step (128 high + low), whose digits are picked
// by code from one vector; with activations in two digits that is three integer products. The error (3e-5 of the levels'
// range) lies below that of the activations.
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
  static constexpr float MOST = 127 * 128 + 127;
  const Levels& w;
  int blocks, tail;
  std::vector<int> group_of;       // of each block
  std::vector<uint8_t> salient;    // 4 for salient columns, else 0: where their levels begin

  // Of some rows, for every group.
  struct State {
    std::vector<float> scale, mean, table;  // table: 8 levels
    std::vector<float> level[8], base, step;  // [rows][groups]
    std::vector<float> base_tile, step_tile;  // Tiled
    std::vector<uint8_t> digits;              // [tile][group][row of the tile][8 high, 8 low]
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

  // The same levels as numbers of 14 bits.
  void read_digits(State& s, int first, int last) const {
    const int64_t count = read_levels(s, first, last);
    const int rows = last - first;
    for (auto& level : s.level) level.resize(count);
    spread_levels(s, count);
    s.base.resize(count);
    s.step.resize(count);
    float *base = s.base.data(), *step = s.step.data();
    const int kinds = w.mean ? 8 : 4;
    std::copy(s.level[0].begin(), s.level[0].end(), base);
    std::copy(s.level[0].begin(), s.level[0].end(), step);
    for (int j = 1; j < kinds; j++) {
      const float* level = s.level[j].data();
      for (int64_t i = 0; i < count; i++) {
        base[i] = std::min(base[i], level[i]);
        step[i] = std::max(step[i], level[i]);
      }
    }
    for (int64_t i = 0; i < count; i++) step[i] = std::max(step[i] - base[i], 1e-30f) * (1.0f / MOST);
    const Tiled tiled(w.groups);
    s.base_tile.resize(tiled.size(rows));
    s.step_tile.resize(tiled.size(rows));
    s.digits.resize((int64_t)(rows + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS * w.groups * 16);
    for (int r = 0; r < rows; r++) {
      write_digits(s, r, kinds);
      for (int g = 0; g < w.groups; g++) {
        s.base_tile[tiled.at(r, g)] = base[(int64_t)r * w.groups + g];
        s.step_tile[tiled.at(r, g)] = step[(int64_t)r * w.groups + g];
      }
    }
  }

  // level[j][i]: level j of row and group i.
  void spread_levels(State& s, int64_t count) const {
    const float *a = s.scale.data(), *m = s.mean.data();
    float* level[8];
    for (int j = 0; j < 8; j++) level[j] = s.level[j].data();
    for (int64_t i = 0; !w.mean && i < count; i++) {
      level[0][i] = 0;
      level[1][i] = a[2 * i];
      level[2][i] = a[2 * i + 1];
      level[3][i] = a[2 * i] + a[2 * i + 1];
    }
    for (int64_t i = 0; w.mean && i < count; i++) {
      const float* mean = m + w.means * i;
      const float middle = mean[w.means - 1] + (w.means == 4 ? mean[2] : 0);
      const float low = middle - a[4 * i + 2], high = middle + a[4 * i + 2];
      level[0][i] = mean[0] - a[4 * i];
      level[1][i] = mean[0] + a[4 * i];
      level[2][i] = mean[1] - a[4 * i + 1];
      level[3][i] = mean[1] + a[4 * i + 1];
      level[4][i] = low - a[4 * i + 3];
      level[5][i] = low + a[4 * i + 3];
      level[6][i] = high - a[4 * i + 3];
      level[7][i] = high + a[4 * i + 3];
    }
  }

  // The digits of row r's levels, LANES groups at a time.
  void write_digits(State& s, int r, int kinds) const {
    uint8_t* to = s.digits.data() + ((int64_t)r / TILE * w.groups * TILE + r % TILE) * 16;
    for (int g = 0; g < w.groups; g += LANES) {
      alignas(64) float buffer[LANES];
      const int here = std::min(LANES, w.groups - g);
      const int64_t at = (int64_t)r * w.groups + g;
      const auto some = [&](const std::vector<float>& from) {
        if (here == LANES) return loadf(from.data() + at);
        std::fill(buffer, buffer + LANES, 1.0f);
        std::copy_n(from.data() + at, here, buffer);
        return loadf(buffer);
      };
      const Floats base = some(s.base), inverse = divided(set(1), some(s.step));
      Bytes words[4] = {zeros(), zeros(), zeros(), zeros()};  // high of levels 0-3, of 4-7, low of both
      for (int j = 0; j < kinds; j++) {
        const Bytes q = rounded(mul(sub(some(s.level[j]), base), inverse));
        words[j / 4] = either(words[j / 4], shl32(shr32(q, 7), j % 4 * 8));
        words[2 + j / 4] = either(words[2 + j / 4], shl32(keep32(q, 127), j % 4 * 8));
      }
      const Bytes a = low32(words[0], words[1]), b = high32(words[0], words[1]);
      const Bytes c = low32(words[2], words[3]), d = high32(words[2], words[3]);
      const Bytes four[4] = {low64(a, c), high64(a, c), low64(b, d), high64(b, d)};  // groups i, i + 4, ...
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        if (i < here) _mm_storeu_si128((__m128i*)(to + (int64_t)(g + i) * TILE * 16), lane16(four[i % 4], i / 4));
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

// out[token][r - first] += rows first..last times the blocks of x. SALIENT: levels depend on the column.
template <int TOKENS, bool SALIENT>
void dot_levels(const LevelWeight& weight, const LevelWeight::State& state, const Digits& x, int token, int first, int last,
                float* out) {
  constexpr int R = TILES<TOKENS>;
  const int stride = last - first, groups = weight.w.groups;
  const Tiled tiled(groups);
  for (int r = first; r < last; r += R * TILE) {
    const Rows<R> rows(weight.w.weight, weight.w.row_bytes, r, last - 1);
    const float *step = state.step_tile.data() + tiled.row(r - first), *base = state.base_tile.data() + tiled.row(r - first);
    const uint8_t* digits = state.digits.data() + (int64_t)(r - first) * groups * 16;
    Floats sums[R][TOKENS];
    for (int j = 0; j < R; j++)
      for (int t = 0; t < TOKENS; t++) sums[j][t] = set(0);
    for (int k = 0; k < weight.blocks; k++) {
      const unsigned g = weight.group_of[k];
      Bytes high[R], low[R];
      for (int j = 0; j < R; j++) {
        high[j] = load(digits + (int64_t)(j * groups + g) * WIDTH);
        low[j] = turned(high[j]);
      }
      Sum<7> high_high[R][TOKENS], high_low[R][TOKENS], low_high[R][TOKENS];
      rows.template each_slot_of<2>(k, weight.w.row_bytes, [&](int slot, Many<R> q) {
        Bytes a[R], b[R];
        for (int j = 0; j < R; j++) {
          if constexpr (SALIENT) q.v[j] = either(q.v[j], both16(weight.salient.data() + k * BLOCK + 16 * slot));
          a[j] = pick(high[j], q.v[j]);
          b[j] = pick(low[j], q.v[j]);
        }
        for (int t = 0; t < TOKENS; t++) {
          const int8_t* of_x = x.block(token + t, k) + 16 * slot;
          const Bytes c = both16(of_x), d = both16(of_x + BLOCK);
          for (int j = 0; j < R; j++) {
            high_high[j][t].add(a[j], c);
            high_low[j][t].add(a[j], d);
            low_high[j][t].add(b[j], c);
          }
        }
      });
      for (int j = 0; j < R; j++) {
        const Floats s = spread(loadf(step + j * tiled.span + g / 4 * LANES), g % 4);
        for (int t = 0; t < TOKENS; t++) {
          const Floats sum = joined(high_high[j][t].ints(), plus(high_low[j][t].ints(), low_high[j][t].ints()));
          sums[j][t] = fma(sum, mul(s, set(128 * x.steps(token + t)[k])), sums[j][t]);
        }
      }
    }
    for (int j = 0; j < R; j++) {
      for (int t = 0; t < TOKENS; t++) {
        for (int64_t g = 0; g < tiled.span; g += LANES)
          sums[j][t] = fma(loadf(base + j * tiled.span + g), four(x.sums(token + t) + g / TILE), sums[j][t]);
        float found[TILE];
        totals(sums[j][t], found);
        for (int i = 0; i < TILE && r + j * TILE + i < last; i++) out[t * stride + r + j * TILE + i - first] += found[i];
      }
    }
  }
}
