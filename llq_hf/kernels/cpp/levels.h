// 2-bit codes that select one of a group's levels. The bits stand for two binary weights, whose sum is the level (dual
// binarization), or for two signs, whose meaning depends on the column (salient or not).
//
// For products, the levels of a row are rounded to 14 bits, step (128 high + low - MIDDLE), with a step for each row.
// The codes select the two digits from one vector. With activations in two digits as well, a product is three integer
// products. The error of this rounding, 6e-5 of the row's largest level, is about that of the activations. Sums of two
// binary weights are not rounded for one token: there the product is that of the two planes of bits.
#pragma once
#include <functional>

#include "activations.h"
#include "halves.h"
#include "pool.h"

// Mirrored by kernels/native.py.
struct Levels {
  const uint8_t* weight;
  int64_t row_bytes;
  const void* scale;       // [rows, groups, 2]: for each plane; [rows, groups, 4]: for low, mid, first and second salient sign
  const void* mean;        // [rows, groups, 3 or 4]: for low, mid, salient (both signs together, or each); null with 2 scales
  const uint8_t* salient;  // packed bits [columns]; null: none
  int32_t rows, columns, groups, group_size, dtype, means;
};

struct LevelWeight {
  static constexpr int MIDDLE = 1 << 13, PER = LANES / 4;  // groups whose levels are computed at once
  const Levels& w;
  int blocks, tail;
  std::vector<int> group_of;       // of each slot
  std::vector<uint8_t> salient;    // 4 for salient columns, else 0: where their levels begin

  // What is computed for a chunk of rows, for each group.
  struct State {
    std::vector<float> scale, mean, table;  // table: 8 levels
    std::vector<float> plane[2];  // Tiled: the weight of each bit, divided by its place value
    std::vector<float> step;      // for each row
    std::vector<uint8_t> digits;  // [tile][group][row of the tile][8 high, 8 low]
  };

  explicit LevelWeight(const Levels& w)
      : w(w), blocks(w.columns / BLOCK), tail(w.columns % BLOCK),
        group_of(groups_of_slots(blocks, w.group_size, w.groups, [](int k) { return k; })), salient(w.columns) {
    if (w.salient)
      for (int i = 0; i < w.columns; i++) salient[i] = 4 * code_at(w.salient, i, w.columns, 1);
  }
  int rows() const { return w.rows; }
  int columns() const { return w.columns; }
  const uint8_t* row(int r) const { return w.weight + r * w.row_bytes; }

  // Reads scales and means as floats. Returns the number of groups in these rows.
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

  // Computes levels in the order of torch's operations, so that they are equal bit for bit.
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

  // The weights of the two bits, for sums of binary weights.
  void read_planes(State& s, int first, int last) const {
    const Tiled tiled(w.groups);
    for (auto& plane : s.plane) plane.resize(tiled.size(last - first));
    with_row_ends(first, last, [&](int r, auto dtype, const uint8_t* scale, const uint8_t*) {
      float* to[2] = {s.plane[0].data() + tiled.row(r), s.plane[1].data() + tiled.row(r)};
      for (int g = 0; g < w.groups; g += 4) {
        const __m256 pairs = load_eight<dtype>(scale + g * 2 * size_of(dtype));
        const __m128 a = _mm256_castps256_ps128(pairs), b = _mm256_extractf128_ps(pairs, 1);
        _mm_storeu_ps(to[0] + g * TILE, _mm_shuffle_ps(a, b, 0x88));
        _mm_storeu_ps(to[1] + g * TILE, _mm_mul_ps(_mm_shuffle_ps(a, b, 0xdd), _mm_set1_ps(0.5f)));
      }
    });
  }

  // All levels, rounded to 14 bits.
  void read_digits(State& s, int first, int last) const {
    constexpr float MOST = MIDDLE - 4;
    s.step.assign(last - first + MOST_ROWS, 0);
    s.digits.resize((int64_t)(last - first + MOST_ROWS) * w.groups * 16);
    with_row_ends(first, last, [&](int r, auto dtype, const uint8_t* scale, const uint8_t* mean) {
      uint8_t* digits = s.digits.data() + ((int64_t)r / TILE * w.groups * TILE + r % TILE) * 16;
      Floats most = set(1e-30f);
      for (int g = 0; g < w.groups; g += PER) most = greater(most, largest_of<dtype>(scale, mean, g));
      s.step[r] = largest(most) / MOST;
      const Floats inverse = set(1 / s.step[r]);
      for (int g = 0; g < w.groups; g += PER) {
        const Bytes made = digits_of<dtype>(scale, mean, g, inverse);
        const int here = std::min(PER, w.groups - g);
#pragma GCC unroll 4
        for (int i = 0; i < PER; i++)
          if (i < here) _mm_storeu_si128((__m128i*)(digits + (int64_t)(g + i) * WIDTH), lane16(made, i));
      }
    });
  }

 private:
  // Calls use(row, dtype, its scales, its means). Vectors of PER groups may reach behind the last group, where they
  // find zeros.
  template <typename Use>
  void with_row_ends(int first, int last, Use use) const {
    static thread_local std::vector<uint8_t> end;
    const auto dtype = (Dtype)w.dtype;
    const int64_t scales = (w.mean ? 4 : 2) * w.groups * size_of(dtype), means = w.means * w.groups * size_of(dtype);
    for (int r = first; r < last; r++) {
      const uint8_t *scale = (const uint8_t*)w.scale + r * scales, *mean = (const uint8_t*)w.mean + r * means;
      fetch(scale + AHEAD, scales);
      fetch(mean + AHEAD, means);
      if (w.groups % PER || (int64_t)(w.rows - 1 - r) * w.groups < 2 * PER) {  // no readable memory follows the matrix
        end.assign(scales + means + 2 * WIDTH, 0);
        memcpy(end.data(), scale, scales);
        if (means) memcpy(end.data() + scales + WIDTH, mean, means);
        scale = end.data();
        mean = end.data() + scales + WIDTH;
      }
      if (dtype == F16) {
        use(r - first, std::integral_constant<Dtype, F16>{}, scale, mean);
      } else {
        use(r - first, std::integral_constant<Dtype, F32>{}, scale, mean);
      }
    }
  }

  template <Dtype D>
  INLINE Floats means_of(const uint8_t* mean, int g) const {
    return w.means == 4 ? load_quads<D>(mean + g * 4 * size_of(D)) : load_triples<D>(mean + g * 3 * size_of(D));
  }

  // Bounds of the magnitudes of all levels of PER groups from g on.
  template <Dtype D>
  INLINE Floats largest_of(const uint8_t* scale, const uint8_t* mean, int g) const {
    if (!w.mean) {
      const Floats a = size(load_pairs<D>(scale + g * 2 * size_of(D)));
      return add(a, quad<1, 0, 3, 2>(a));
    }
    // Bounds for low, for mid, and for both salient signs together.
    const Floats each = add(size(load_quads<D>(scale + g * 4 * size_of(D))), size(means_of<D>(mean, g)));
    return fma(quad<0, 1, 3, 3>(each), quads(0, 0, 1, 0), each);
  }

  // The digits of PER groups from g on: [group][8 high, 8 low].
  template <Dtype D>
  INLINE Bytes digits_of(const uint8_t* scale, const uint8_t* mean, int g, Floats inverse) const {
    const Floats turns = quads(-1, 1, -1, 1), halves = quads(-1, -1, 1, 1);
    Floats plain, own = set(0);
    if (!w.mean) {
      const Floats a = mul(load_pairs<D>(scale + g * 2 * size_of(D)), inverse);  // 0, first, second, both
      plain = fma(quad<0, 0, 0, 0>(a), quads(0, 1, 0, 1), fma(quad<1, 1, 1, 1>(a), quads(0, 0, 1, 1), set(MIDDLE)));
    } else {
      const Floats a = mul(load_quads<D>(scale + g * 4 * size_of(D)), inverse);
      const Floats m = fma(means_of<D>(mean, g), inverse, quads(MIDDLE, MIDDLE, MIDDLE, 0));
      plain = fma(quad<0, 0, 1, 1>(a), turns, quad<0, 0, 1, 1>(m));
      own = fma(quad<2, 2, 2, 2>(a), halves, add(quad<2, 2, 2, 2>(m), quad<3, 3, 3, 3>(m)));
      own = fma(quad<3, 3, 3, 3>(a), turns, own);
    }
    const Bytes q = packed32(rounded(plain), rounded(own));
    return packed16(shr(q, 7), keep16<127>(q));
  }

 public:
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
      const Floats table = _mm512_castps256_ps512(_mm256_loadu_ps(tables + 8 * group_of[k * SLOTS]));
      const Bytes levels = halves(table, table, dtype);
      pick<2>(row(r) + 32 * k, levels, salient.data() + k * BLOCK, out + k * BLOCK);
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
      for (int i = 0; i < BLOCK; i += LANES) storef(out + k * BLOCK + i, look_up(tables + 8 * group_of[k * SLOTS], q + i));
    }
    for (int i = blocks * BLOCK; i < w.columns; i++)
      out[i] = tables[8 * std::min(i / w.group_size, w.groups - 1) + (salient[i] | code_at(p, i, w.columns, 2))];
  }
};

// out[token][r - first] += rows first..last times the blocks of x, for sums of two binary weights.
template <int TOKENS>
void dot_planes(const LevelWeight& weight, const LevelWeight::State& state, const Digits& x, int token, int first, int last,
                float* out) {
  constexpr int R = TILES<4, TOKENS>;
  const int stride = last - first;
  const Tiled tiled(weight.w.groups);
  for (int r = first; r < last; r += R * TILE) {
    const Rows<R> rows(weight.w.weight, weight.w.row_bytes, weight.w.row_bytes, r, last - 1);
    const int64_t at = tiled.row(r - first);
    Floats sums[R][TOKENS];
    for (int j = 0; j < R; j++)
      for (int t = 0; t < TOKENS; t++) sums[j][t] = set(0);
    for (int k = 0; k < weight.blocks; k++) {
      const unsigned g = weight.group_of[k * SLOTS];
      Sum<2> high[2][R][TOKENS], low[2][R][TOKENS];
      rows.template each_slot_of<2>(k, [&](int slot, Many<R> q) {
        const Many<R> plane[2] = {keep(q, 1), keep(q, 2)};  // the second has place value 2, so its scale was halved
        for (int t = 0; t < TOKENS; t++) {
          const int8_t* digits = x.block(token + t, k) + 16 * slot;
          const Bytes a = both16(digits), b = both16(digits + BLOCK);
          for (int bit = 0; bit < 2; bit++) {
            for (int j = 0; j < R; j++) {
              high[bit][j][t].add(plane[bit].v[j], a);
              low[bit][j][t].add(plane[bit].v[j], b);
            }
          }
        }
      });
      for (int bit = 0; bit < 2; bit++) {
        for (int j = 0; j < R; j++) {
          const Floats s = spread(loadf(state.plane[bit].data() + at + j * tiled.span + g / 4 * LANES), g % 4);
          for (int t = 0; t < TOKENS; t++) {
            const Floats sum = joined(high[bit][j][t].ints(), low[bit][j][t].ints());
            sums[j][t] = fma(sum, mul(s, set(x.steps(token + t)[k])), sums[j][t]);
          }
        }
      }
    }
    for (int j = 0; j < R; j++) {
      for (int t = 0; t < TOKENS; t++) {
        add_totals(sums[j][t], last - r - j * TILE, out + t * stride + r + j * TILE - first);
      }
    }
  }
}

// out[token][r - first] += rows first..last times the blocks of x. SALIENT: levels depend on the column.
template <int TOKENS, bool SALIENT>
void dot_levels(const LevelWeight& weight, const LevelWeight::State& state, const Digits& x, int token, int first, int last,
                float* out) {
  constexpr int R = TILES<4, TOKENS>;
  const int stride = last - first, groups = weight.w.groups;
  float all[TOKENS] = {};  // sums of x, to subtract the MIDDLE that was added to each level
  for (int t = 0; t < TOKENS; t++)
    for (int g = 0; g < groups; g++) all[t] += x.sums(token + t)[g];
  for (int r = first; r < last; r += R * TILE) {
    const Rows<R> rows(weight.w.weight, weight.w.row_bytes, weight.w.row_bytes, r, last - 1);
    const uint8_t* digits = state.digits.data() + (int64_t)(r - first) * groups * 16;
    Floats sums[R][TOKENS];
    for (int j = 0; j < R; j++)
      for (int t = 0; t < TOKENS; t++) sums[j][t] = set(0);
    for (int k = 0; k < weight.blocks; k++) {
      const unsigned g = weight.group_of[k * SLOTS];
      Bytes high[R], low[R];
      for (int j = 0; j < R; j++) {
        high[j] = load(digits + (int64_t)(j * groups + g) * WIDTH);
        low[j] = turned(high[j]);
      }
      Sum<7> high_high[R][TOKENS], high_low[R][TOKENS], low_high[R][TOKENS];
      rows.template each_slot_of<2>(k, [&](int slot, Many<R> q) {
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
        for (int t = 0; t < TOKENS; t++) {
          const Floats sum = joined(high_high[j][t].ints(), plus(high_low[j][t].ints(), low_high[j][t].ints()));
          sums[j][t] = fma(sum, set(128 * x.steps(token + t)[k]), sums[j][t]);
        }
      }
    }
    for (int j = 0; j < R; j++) {
      const float* step = state.step.data() + r + j * TILE - first;
      for (int t = 0; t < TOKENS; t++) {
        const Floats less = quads(LevelWeight::MIDDLE * all[t], 0, 0, 0);
        add_totals(mul(sub(sums[j][t], less), each_row(step)), last - r - j * TILE, out + t * stride + r + j * TILE - first);
      }
    }
  }
}
