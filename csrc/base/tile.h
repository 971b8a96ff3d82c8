// The inner loop of every matrix product of fp32 or bf16: a tile of the result stays in registers
// while the inner dimension passes, vectors of b's columns and one number of a at a time. Of bf16 a
// number is a pair.
#pragma once

#include "base/bf16.h"
#include "base/simd.h"
#include "base/standard.h"

namespace PUNA_ISA {

constexpr int PANEL_WIDTH = 2 * W;               // output columns computed together
constexpr int MAX_TILE_ROWS = W == 16 ? 12 : 6;  // rows together: 24 (12) accumulators fit

// Numbers (or pairs) summed in one go; the sums of such chains are then added in their order. All
// products of fp32 keep to this, in training and in decoding, so that both get the same bits.
// Chains of 512 were off 1.7 times as far as the BLAS's sums, of 256 1.2 times.
constexpr int64_t CHAIN = 256;

template <int ROWS, int VECTORS>
inline void clear(vec (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) sums[m][j] = vec{};
}

// sums (ROWS, VECTORS * W) += a (ROWS, count) b (count, VECTORS * W), of floats or of pairs.
// Numbers of a lie `a_row` apart from row to row and `a_inner` within a row; rows of b lie `b_row`
// apart.
template <typename Number, int ROWS, int VECTORS>
__attribute__((always_inline)) inline void multiply_add(vec (&sums)[ROWS][VECTORS], const Number* a,
                                                        int64_t a_row, int64_t a_inner,
                                                        const Number* b, int64_t b_row,
                                                        int64_t count) {
  for (int64_t i = 0; i < count; ++i, a += a_inner, b += b_row) {
    decltype(load(b)) columns[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) columns[j] = load(b + j * W);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const auto value = broadcast(a[m * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[m][j] = multiply_add(sums[m][j], value, columns[j]);
    }
  }
}

// The same of floats, each row `count` of them side by side, and pairs, `b_row` apart.
template <int ROWS, int VECTORS>
__attribute__((always_inline)) inline void multiply_add_widened(vec (&sums)[ROWS][VECTORS],
                                                                const float* a, int64_t a_row,
                                                                const Pair* b, int64_t b_row,
                                                                int64_t count) {
  const auto add = [&](int64_t i, auto half) __attribute__((always_inline)) {
    vec columns[VECTORS];
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) columns[j] = half(load(b + i / 2 * b_row + j * W));
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const vec value = broadcast(a[m * a_row + i]);
#pragma GCC unroll 4
      for (int j = 0; j < VECTORS; ++j) sums[m][j] = multiply_add(sums[m][j], value, columns[j]);
    }
  };
  for (int64_t i = 0; i < count; ++i) {
    add(i, [](ivec pairs) { return first_of(pairs); });
    if (++i < count) add(i, [](ivec pairs) { return second_of(pairs); });
  }
}

// c (ROWS, VECTORS * W) = sums, or c + sums with `add`.
template <int ROWS, int VECTORS>
__attribute__((always_inline)) inline void store_tile(const vec (&sums)[ROWS][VECTORS], float* c,
                                                      int64_t c_row, bool add) {
#pragma GCC unroll 16
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < VECTORS; ++j) {
      float* to = c + m * c_row + j * W;
      store(to, add ? load(to) + sums[m][j] : sums[m][j]);
    }
}

// Calls use(n) with `rows`, 1 to MAX, as a compile-time constant. One row is found first, as its
// work is the shortest: found last, in calls inside calls, it cost the demo's model 5 of 56 us a
// token.
template <int MAX, int N = 1, typename Use>
__attribute__((always_inline)) inline void dispatch_rows(int rows, Use use) {
  if constexpr (N < MAX)
    if (rows > N) return dispatch_rows<MAX, N + 1>(rows, use);
  use(std::integral_constant<int, N>());
}

}  // namespace PUNA_ISA
