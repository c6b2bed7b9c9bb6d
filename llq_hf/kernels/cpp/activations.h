// Activations in the form that the integer kernels read: 15-bit fixed point in two signed digits, x ~ step (128 high +
// low), with a step for each token and block of 128 columns. The relative error is 5e-5 with Gaussian activations, and
// 2e-4 in a block with an outlier of 30 sigma. Both are far below the rounding of bf16 and fp16.
#pragma once
#include <cmath>
#include <vector>

#include "codes.h"
#include "numbers.h"

constexpr float TOP = 127 * 128;

// The dot product of n floats.
inline float dot(const float* a, const float* b, int64_t n) {
  Floats sums[4] = {set(0), set(0), set(0), set(0)};
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int j = 0; j < 4; j++) sums[j] = fma(loadf(a + i + j * LANES), loadf(b + i + j * LANES), sums[j]);
  for (; i + LANES <= n; i += LANES) sums[0] = fma(loadf(a + i), loadf(b + i), sums[0]);
  float rest = 0;
  for (; i < n; i++) rest += a[i] * b[i];
  return total(add(add(sums[0], sums[1]), add(sums[2], sums[3]))) + rest;
}

constexpr int padded(int groups) { return (groups + 3) / 4 * 4; }

// The order in which tiles read numbers [rows][groups]: [tile][group / 4][row of the tile][4 groups]. Rows and groups
// are padded to whole tiles and fours. The values in the padding do not matter, as the sums of activations are zero
// there.
struct Tiled {
  int64_t span;  // of a tile
  explicit Tiled(int groups) : span(padded(groups) * TILE) {}
  int64_t size(int rows) const { return (rows + MOST_ROWS - 1) / MOST_ROWS * (MOST_ROWS / TILE) * span; }
  int64_t row(int r) const { return r / TILE * span + r % TILE * 4; }
  int64_t at(int r, int group) const { return row(r) + group / 4 * LANES + group % 4; }
};

// Adds the sums of a tile's rows to out[0..], for at most `rows` rows.
INLINE void add_totals(Floats v, int rows, float* out) {
  float found[TILE];
  totals(v, found);
  for (int i = 0; i < TILE && i < rows; i++) out[i] += found[i];
}

struct Digits {
  int blocks = 0, stride = 0;
  std::vector<int8_t> digits;    // [token][block][high 128, low 128]
  std::vector<float> step;       // [token][block]
  std::vector<float> group_sum;  // [token][stride]: the sum of each group's activations, then zeros

  const int8_t* block(int token, int k) const { return digits.data() + ((int64_t)token * blocks + k) * 2 * BLOCK; }
  const float* steps(int token) const { return step.data() + (int64_t)token * blocks; }
  const float* sums(int token) const { return group_sum.data() + (int64_t)token * stride; }
};

// One block of activations, [128] floats, in digits: high and low [128]. Returns the step; group_sum[group[slot]] gets
// the sums of the slots.
INLINE float split_block(const float* x, const int* group, int8_t* high, int8_t* low, float* group_sum) {
  Floats most = set(0), odd = set(0), bad = set(0);
  for (int i = 0; i < BLOCK; i += LANES) {
    const Floats v = loadf(x + i);
    bad = fma(v, set(0), bad);  // NaN where an activation is NaN or infinite; so is y then
    most = greater(size(v), most);
    odd = greater(size(sub(v, whole(v))), odd);
  }
  float top = largest(most);
  if (largest(odd) == 0 && top <= 127) top = 127;  // the high digit is the number itself: products of integers are exact
  const float step = top / TOP + total(bad), inverse = top > 0 ? TOP / top : 0;
  for (int slot = 0; slot < SLOTS; slot++) {
    Bytes total = zeros();
    for (int i = 16 * slot; i < 16 * (slot + 1); i += LANES) {
      const Bytes q = rounded(mul(loadf(x + i), set(inverse)));
      const Bytes h = shifted32<7>(plus(q, ints(64)));
      total = plus(total, q);
      store_narrow(high + i, h);
      store_narrow(low + i, minus32(q, shl32<7>(h)));
    }
    group_sum[group[slot]] += step * (float)total32(total);
  }
  return step;
}

// x [tokens, columns] in fp32; block k reads the columns from 128 * source(k) on, zeros behind the last one, and its
// slots belong to the groups group_of[8 k ..]. Of the first `rests` tokens, what rounding leaves is written behind the
// last token, as tokens of their own; returns whether anything was left.
template <typename Source>
bool split(float* x, int64_t columns, int tokens, int rests, int blocks, int groups, const std::vector<int>& group_of,
           Source source, Digits& out) {
  bool left = false;
  out.blocks = blocks;
  out.stride = padded(groups);
  out.digits.resize((int64_t)(tokens + rests) * blocks * 2 * BLOCK);
  out.step.resize((int64_t)(tokens + rests) * blocks);
  out.group_sum.assign((int64_t)(tokens + rests) * out.stride, 0);
  for (int t = 0; t < tokens + rests; t++) {
    for (int k = 0; k < blocks; k++) {
      alignas(64) float end[BLOCK];
      const int64_t column = (int64_t)source(k) * BLOCK, here = std::min<int64_t>(BLOCK, columns - column);
      float* from = x + t * columns + column;
      if (here < BLOCK) {
        memset(end, 0, sizeof end);
        memcpy(end, from, here * sizeof(float));
      }
      int8_t* high = out.digits.data() + ((int64_t)t * blocks + k) * 2 * BLOCK;
      const float step = split_block(here < BLOCK ? end : from, &group_of[(int64_t)k * SLOTS], high, high + BLOCK,
                                     &out.group_sum[(int64_t)t * out.stride]);
      out.step[(int64_t)t * blocks + k] = step;
      if (t >= rests) continue;
      float* rest = from + tokens * columns;
      for (int i = 0; i < here; i++) {
        rest[i] = std::fma(-step, (float)(128 * high[i] + high[BLOCK + i]), from[i]);
        left |= rest[i] != 0;
      }
    }
  }
  return left;
}
