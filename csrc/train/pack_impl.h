// Copies of a matrix product's operands, in strips that are read from front to back. The inner
// dimension is passed in blocks.
#pragma once

#include "base/buffer.h"
#include "base/simd.h"
#include "base/standard.h"
#include "base/tile.h"
#include "train/matmul.h"

namespace PUNA_ISA {

// Of AVX-512's 32 registers 24 hold sums, of the 16 smaller ones 12.
constexpr int TILE_ROWS = W == 16 ? 8 : 6, TILE_VECTORS = W == 16 ? 3 : 2;
constexpr int TILE_COLUMNS = TILE_VECTORS * W;
// Floats. A block of b, and one of a where it is packed, share 1 MB of second-level cache.
constexpr int64_t MAX_INNER_BLOCK = 2 * CHAIN, BLOCK_FLOATS = 1 << 17;

// Packs a (rows, inner), which begins at `a`, in strips of TILE_ROWS; in a strip the rows lie side
// by side. The last strip is filled up with zeros.
inline void pack_rows(const puna::MatMul& p, const float* a, int64_t rows, int64_t inner,
                      float* to) {
  for (int64_t first = 0; first < rows; first += TILE_ROWS, a += TILE_ROWS * p.a_row) {
    const int64_t count = std::min<int64_t>(TILE_ROWS, rows - first);
    for (int64_t k = 0; k < inner; ++k, to += TILE_ROWS) {
      const float* from = a + k * p.a_inner;
      if (count == TILE_ROWS && p.a_row == 1) {
        std::memcpy(to, from, TILE_ROWS * sizeof(float));
      } else {
        for (int64_t m = 0; m < count; ++m) to[m] = from[m * p.a_row];
        for (int64_t m = count; m < TILE_ROWS; ++m) to[m] = 0.0f;
      }
    }
  }
}

// Packs b (inner, columns), which begins at `b`, in strips of TILE_COLUMNS, the last one filled up
// with zeros. Dense columns are transposed W by W: one number at a time took 4 times as long.
inline void pack_columns(const puna::MatMul& p, const float* b, int64_t inner, int64_t columns,
                         float* to) {
  for (int64_t first = 0; first < columns; first += W) {
    const int64_t count = std::min<int64_t>(W, columns - first), strip = first / TILE_COLUMNS;
    float* const into = to + strip * TILE_COLUMNS * inner + first % TILE_COLUMNS;
    const float* const from = b + first * p.b_column;
    int64_t k = 0;
    for (; count == W && p.b_inner == 1 && k + W <= inner; k += W)
      transpose(from + k, p.b_column, into + k * TILE_COLUMNS, TILE_COLUMNS);
    for (; k < inner; ++k) {
      float* const row = into + k * TILE_COLUMNS;
      for (int64_t j = 0; j < count; ++j) row[j] = from[k * p.b_inner + j * p.b_column];
      for (int64_t j = count; j < W; ++j) row[j] = 0.0f;
    }
  }
}

inline int64_t inner_block_count(const puna::MatMul& p) {
  return std::max<int64_t>(1, ceil_div(p.inner, MAX_INNER_BLOCK));
}

// Blocks are whole chains, but for the last one: an even split would be another order of the sums.
inline Range inner_block(const puna::MatMul& p, int64_t number) {
  const int64_t begin = number * MAX_INNER_BLOCK;
  return {begin, std::min(p.inner, begin + MAX_INNER_BLOCK)};
}

// All of b, packed: for each inner block its strips of columns, one after the other.
class PackedColumns {
 public:
  static int64_t strips(const puna::MatMul& p) { return ceil_div(p.columns, TILE_COLUMNS); }
  static int64_t size(const puna::MatMul& p) { return strips(p) * TILE_COLUMNS * p.inner; }

  // A piece is one strip of one inner block.
  static int64_t pieces(const puna::MatMul& p) { return strips(p) * inner_block_count(p); }

  static void pack_piece(const puna::MatMul& p, int64_t piece, float* to) {
    const int64_t column = piece % strips(p) * TILE_COLUMNS;
    const Range inner = inner_block(p, piece / strips(p));
    pack_columns(p, p.b + inner.begin * p.b_inner + column * p.b_column, inner.end - inner.begin,
                 std::min<int64_t>(TILE_COLUMNS, p.columns - column),
                 to + offset(p, inner, column));
  }

  // Where the strip that begins with `column` lies.
  static int64_t offset(const puna::MatMul& p, Range inner, int64_t column) {
    return inner.begin * strips(p) * TILE_COLUMNS + column * (inner.end - inner.begin);
  }
};

}  // namespace PUNA_ISA
