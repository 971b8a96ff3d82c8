// Copies of a matrix product's operands, in strips that are read from front to back: floats, or
// rounded to pairs of bf16. The inner dimension is passed in blocks.
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
// Floats or pairs. A block of b, and one of a where it is packed, share 1 MB of second-level cache.
constexpr int64_t MAX_INNER_BLOCK = 2 * CHAIN, BLOCK_FLOATS = 1 << 17;

// How many floats or pairs hold `count` numbers.
template <typename Number>
constexpr int64_t PER_NUMBER = std::is_same_v<Number, Pair> ? 2 : 1;
template <typename Number>
int64_t held_in(int64_t count) {
  return ceil_div(count, PER_NUMBER<Number>);
}

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

#ifdef PUNA_MULTIPLIES_BF16
// `count` pairs of the numbers at `from` and, where there are two, at `from + inner`; zeros behind.
inline void pack_pairs(const float* from, int64_t stride, int64_t count, bool two, int64_t inner,
                       int64_t width, Pair* to) {
  for (int64_t j = 0; j < count; ++j)
    to[j] = to_pair(from[j * stride], two ? from[j * stride + inner] : 0.0f);
  std::fill_n(to + count, width - count, Pair{0});
}

// As above, rounded to pairs. Dense rows stay rows, one after the other: a tile can read those.
inline void pack_rows(const puna::MatMul& p, const float* a, int64_t rows, int64_t inner,
                      Pair* to) {
  const int64_t pairs = pairs_of(inner);
  if (p.a_inner == 1) {
    for (int64_t m = 0; m < rows; ++m) round_row(a + m * p.a_row, inner, to + m * pairs);
    return;
  }
  for (int64_t first = 0; first < rows; first += TILE_ROWS) {
    const int64_t count = std::min<int64_t>(TILE_ROWS, rows - first);
    // Two strips at once: a vector holds the rows of both.
    const bool both = first + W <= rows && p.a_row == 1;
    for (int64_t k = 0; k < pairs; ++k) {
      const float* from = a + first * p.a_row + 2 * k * p.a_inner;
      const bool two = 2 * k + 1 < inner;
      Pair* const strip = to + (first * pairs) + k * TILE_ROWS;
      if (!both) {
        pack_pairs(from, p.a_row, count, two, p.a_inner, TILE_ROWS, strip);
        continue;
      }
      const ivec found = pair_up(load(from), two ? load(from + p.a_inner) : vec{});
      std::memcpy(strip, &found, sizeof found / 2);
      std::memcpy(strip + TILE_ROWS * pairs, reinterpret_cast<const Pair*>(&found) + TILE_ROWS,
                  sizeof found / 2);
    }
    if (both) first += TILE_ROWS;
  }
}

inline void pack_columns(const puna::MatMul& p, const float* b, int64_t inner, int64_t columns,
                         Pair* to) {
  const int64_t pairs = pairs_of(inner);
  for (int64_t first = 0; first < columns; first += W) {
    const int64_t count = std::min<int64_t>(W, columns - first), strip = first / TILE_COLUMNS;
    Pair* const into = to + strip * TILE_COLUMNS * pairs + first % TILE_COLUMNS;
    const float* const from = b + first * p.b_column;
    int64_t k = 0;
    for (; count == W && p.b_inner == 1 && 2 * (k + W) <= inner; k += W) {
      alignas(64) Pair rounded[W * W];
      for (int64_t j = 0; j < W; ++j)
        round_row(from + 2 * k + j * p.b_column, 2 * W, rounded + j * W);
      transpose(reinterpret_cast<const float*>(rounded), W,
                reinterpret_cast<float*>(into + k * TILE_COLUMNS), TILE_COLUMNS);
    }
    for (; k < pairs; ++k) {
      const float* const row = from + 2 * k * p.b_inner;
      const bool two = 2 * k + 1 < inner;
      if (count == W && p.b_column == 1) {
        const ivec found = pair_up(load(row), two ? load(row + p.b_inner) : vec{});
        std::memcpy(into + k * TILE_COLUMNS, &found, sizeof found);
      } else {
        pack_pairs(row, p.b_column, count, two, p.b_inner, W, into + k * TILE_COLUMNS);
      }
    }
  }
}
#endif

template <typename Number>
int64_t inner_block_count(const puna::MatMul& p) {
  return std::max<int64_t>(1, ceil_div(held_in<Number>(p.inner), MAX_INNER_BLOCK));
}

// Blocks are whole chains, but for the last one: an even split would be another order of the sums.
template <typename Number>
Range inner_block(const puna::MatMul& p, int64_t number) {
  constexpr int64_t block = MAX_INNER_BLOCK * PER_NUMBER<Number>;
  return {number * block, std::min(p.inner, (number + 1) * block)};
}

// All of b, packed: for each inner block its strips of columns, one after the other.
template <typename Number>
class PackedColumns {
 public:
  static int64_t strips(const puna::MatMul& p) { return ceil_div(p.columns, TILE_COLUMNS); }
  static int64_t size(const puna::MatMul& p) {
    return strips(p) * TILE_COLUMNS * held_in<Number>(p.inner);
  }

  // A piece is one strip of one inner block.
  static int64_t pieces(const puna::MatMul& p) { return strips(p) * inner_block_count<Number>(p); }

  static void pack_piece(const puna::MatMul& p, int64_t piece, Number* to) {
    const int64_t column = piece % strips(p) * TILE_COLUMNS;
    const Range inner = inner_block<Number>(p, piece / strips(p));
    pack_columns(p, p.b + inner.begin * p.b_inner + column * p.b_column, inner.end - inner.begin,
                 std::min<int64_t>(TILE_COLUMNS, p.columns - column),
                 to + offset(p, inner, column));
  }

  // Where the strip that begins with `column` lies.
  static int64_t offset(const puna::MatMul& p, Range inner, int64_t column) {
    return held_in<Number>(inner.begin) * strips(p) * TILE_COLUMNS +
           column * held_in<Number>(inner.end - inner.begin);
  }
};

}  // namespace PUNA_ISA
