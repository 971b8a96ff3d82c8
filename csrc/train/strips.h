// Products of a few vectors' width, of floats or of pairs: attention's.
#pragma once

#include "base/tile.h"

namespace PUNA_ISA {

// c (ROWS, VECTORS * W) = a (ROWS, count) b (count, VECTORS * W), or c + that with `add`.
template <int ROWS, int VECTORS, typename Number>
inline void tile_product(const Number* a, int64_t a_row, int64_t a_inner, const Number* b,
                         int64_t b_row, int64_t count, float* c, int64_t c_row, bool add) {
  vec sums[ROWS][VECTORS];
  clear(sums);
  multiply_add(sums, a, a_row, a_inner, b, b_row, count);
  store_tile(sums, c, c_row, add);
}

// 24 of 32 registers hold sums, or 12 of 16.
constexpr int tile_rows(int vectors) { return (W == 16 ? 24 : 12) / (vectors < 2 ? 2 : vectors); }

template <int VECTORS, typename Number>
inline void multiply_strip(int64_t rows, const Number* a, int64_t a_row, int64_t a_inner,
                           const Number* b, int64_t b_row, int64_t count, float* c, int64_t c_row,
                           bool add) {
  constexpr int ROWS = tile_rows(VECTORS);
  for (int64_t r = 0; r < rows; r += ROWS)
    dispatch_rows<ROWS>(static_cast<int>(std::min<int64_t>(ROWS, rows - r)), [&](auto n) {
      tile_product<n, VECTORS>(a + r * a_row, a_row, a_inner, b, b_row, count, c + r * c_row, c_row,
                               add);
    });
}

// c (rows, vectors * W) = a (rows, count) b (count, vectors * W), or c + that with `add`. Numbers
// of a lie `a_row` apart from row to row and `a_inner` within a row.
template <typename Number>
inline void multiply(int64_t rows, int vectors, const Number* a, int64_t a_row, int64_t a_inner,
                     const Number* b, int64_t b_row, int64_t count, float* c, int64_t c_row,
                     bool add) {
  for (; vectors >= 4; vectors -= 4, b += 4 * W, c += 4 * W)
    multiply_strip<4>(rows, a, a_row, a_inner, b, b_row, count, c, c_row, add);
  if (vectors == 3) multiply_strip<3>(rows, a, a_row, a_inner, b, b_row, count, c, c_row, add);
  if (vectors == 2) multiply_strip<2>(rows, a, a_row, a_inner, b, b_row, count, c, c_row, add);
  if (vectors == 1) multiply_strip<1>(rows, a, a_row, a_inner, b, b_row, count, c, c_row, add);
}

// A head's keys, each `size` numbers or pairs: one after the other, or as a cache has them, in
// blocks of W tokens, (size, W) each.
template <typename Number>
struct Keys {
  const Number* data;
  int64_t size;
  bool in_blocks;

  const Number* of(int64_t t) const {
    return in_blocks ? data + t / W * W * size + t % W : data + t * size;
  }
  int64_t row() const { return in_blocks ? 1 : size; }
  int64_t inner() const { return in_blocks ? W : 1; }
  // The end of those up to `end` that are one matrix with key t.
  int64_t matrix_end(int64_t t, int64_t end) const {
    return in_blocks ? std::min(end, t / W * W + W) : end;
  }
};

}  // namespace PUNA_ISA
