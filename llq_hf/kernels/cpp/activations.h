// Activations as the integer kernels read them: 15-bit fixed point in two signed digits, x ~ step (128 high + low), a step
// for every token and block of 128 columns. The error (5e-5 of Gaussian activations, 2e-4 beside an outlier of 30 sigma) lies
// far below what bf16 or fp16 have rounded off already.
#pragma once
#include <cmath>
#include <vector>

#include "codes.h"
#include "numbers.h"

constexpr float TOP = 127 * 128;
constexpr int AHEAD = 4096;  // bytes that are fetched before they are needed: streams cross pages

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

struct Digits {
  int blocks = 0;
  std::vector<int8_t> digits;        // [token][block][high 128, low 128]
  std::vector<float> step;           // [token][block]
  std::vector<float> group_sum;      // [token][group]: the sum of what the digits mean

  const int8_t* block(int token, int k) const { return digits.data() + ((int64_t)token * blocks + k) * 2 * BLOCK; }
};

// x [tokens, columns] in fp32; block k reads the columns from 128 * source(k) on, and its halves belong to group(k, half).
template <typename Source, typename Group>
void split(const float* x, int64_t columns, int tokens, int bits, int blocks, int groups, Source source, Group group,
           Digits& out) {
  out.blocks = blocks;
  out.digits.resize((int64_t)tokens * blocks * 2 * BLOCK);
  out.step.resize((int64_t)tokens * blocks);
  out.group_sum.assign((int64_t)tokens * groups, 0);
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
      for (int place = 0; place < SLOTS; place++) {
        const int at = slot_of(bits, place);
        const float* slot = from + 16 * at;
        for (int j = 0; j < 16; j++) {
          const int q = (int)std::rint(slot[j] * inverse);
          const int h = (q + 64) >> 7;
          high[16 * place + j] = (int8_t)h;
          low[16 * place + j] = (int8_t)(q - 128 * h);
          total[at / (SLOTS / 2)] += q;
        }
      }
      out.step[(int64_t)t * blocks + k] = step;
      for (int half = 0; half < 2; half++)
        out.group_sum[(int64_t)t * groups + group(k, half)] += step * (float)total[half];
    }
  }
}
