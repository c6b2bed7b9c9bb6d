// Orthogonal transforms in two factors (kernels/views.py: Transform): a vector is permuted, seen as an [a, b] matrix,
// multiplied from the left and from the right, and permuted again. All in fp32.
#pragma once
#include <vector>

#include "numbers.h"

// Mirrored by kernels/native.py.
struct Turn {
  const int32_t* from;   // [a b]: indices of the numbers that come first, second, ...
  const float* left;     // [a, a]
  const float* right;    // [b, b], b a multiple of 16
  const int32_t* to;     // [a b]: indices of the products that come first, second, ...
  int32_t a, b;
};

// c [m, n] = l [m, k] r [k, n], for ROWS rows and VECTORS vectors of columns.
template <int ROWS, int VECTORS>
INLINE void multiply_panel(const float* l, const float* r, float* c, int k, int n) {
  Floats sums[ROWS][VECTORS];
  for (auto& row : sums)
    for (Floats& v : row) v = set(0);
  for (int i = 0; i < k; i++, r += n) {
    Floats of_r[VECTORS];
    for (int j = 0; j < VECTORS; j++) of_r[j] = loadf(r + j * LANES);
    for (int row = 0; row < ROWS; row++)
      for (int j = 0; j < VECTORS; j++) sums[row][j] = fma(set(l[row * k + i]), of_r[j], sums[row][j]);
  }
  for (int row = 0; row < ROWS; row++)
    for (int j = 0; j < VECTORS; j++) storef(c + row * n + j * LANES, sums[row][j]);
}

template <int ROWS>
INLINE void multiply_rows(const float* l, const float* r, float* c, int k, int n) {
  constexpr int MOST = WIDTH == 64 ? 4 : 2;
  int j = 0;
  for (; j + MOST * LANES <= n; j += MOST * LANES) multiply_panel<ROWS, MOST>(l, r + j, c + j, k, n);
  for (; j < n; j += LANES) multiply_panel<ROWS, 1>(l, r + j, c + j, k, n);
}

inline void multiply(const float* l, const float* r, float* c, int m, int k, int n) {
  int row = 0;
  for (; row + 4 <= m; row += 4) multiply_rows<4>(l + row * k, r, c + row * n, k, n);
  for (; row < m; row++) multiply_rows<1>(l + row * k, r, c + row * n, k, n);
}

// y = factor * the transform of x, in place.
inline void turn(const Turn& turn, float factor, float* x) {
  static thread_local std::vector<float> first, second;
  const int n = turn.a * turn.b;
  first.resize(n);
  second.resize(n);
  for (int i = 0; i < n; i++) first[i] = x[turn.from[i]];
  multiply(turn.left, first.data(), second.data(), turn.a, turn.a, turn.b);
  multiply(second.data(), turn.right, first.data(), turn.a, turn.b, turn.b);
  for (int i = 0; i < n; i++) x[i] = factor * first[turn.to[i]];
}
