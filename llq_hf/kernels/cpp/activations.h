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

// x [tokens, columns] in fp32; block k reads the columns from 128 * source(k) on, and its halves belong to group(k,
// half).
template <typename Source, typename Group>
void split(const float* x, int64_t columns, int tokens, int blocks, int groups, Source source, Group group, Digits& out) {
  out.blocks = blocks;
  out.stride = padded(groups);
  out.digits.resize((int64_t)tokens * blocks * 2 * BLOCK);
  out.step.resize((int64_t)tokens * blocks);
  out.group_sum.assign((int64_t)tokens * out.stride, 0);
  for (int t = 0; t < tokens; t++) {
    for (int k = 0; k < blocks; k++) {
      const float* from = x + t * columns + (int64_t)source(k) * BLOCK;
      float most = 0;
      bool whole = true;
      for (int i = 0; i < BLOCK; i++) {
        most = std::fmax(most, std::fabs(from[i]));
        whole &= from[i] == std::rint(from[i]);
      }
      if (whole && most <= 127) most = 127;  // the high digit is the number itself: products of integers are exact
      const float step = most / TOP, inverse = most > 0 ? TOP / most : 0;
      int8_t* high = out.digits.data() + ((int64_t)t * blocks + k) * 2 * BLOCK;
      int8_t* low = high + BLOCK;
      int total[2] = {0, 0};
      for (int half = 0; half < 2; half++) {
        for (int i = half * BLOCK / 2; i < (half + 1) * BLOCK / 2; i++) {
          const int q = (int)std::rint(from[i] * inverse);
          const int h = (q + 64) >> 7;
          high[i] = (int8_t)h;
          low[i] = (int8_t)(q - 128 * h);
          total[half] += q;
        }
      }
      out.step[(int64_t)t * blocks + k] = step;
      for (int half = 0; half < 2; half++)
        out.group_sum[(int64_t)t * out.stride + group(k, half)] += step * (float)total[half];
    }
  }
}
