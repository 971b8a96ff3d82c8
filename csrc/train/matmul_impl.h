// Matrix products in blocks that stay in the caches. A tile of the result is held in registers
// while a block of the inner dimension passes: vectors of b's columns, one number of a at a time.
//
// Only what does not lie well is copied. Of a linear layer's three products the forward copies its
// weights (their columns are far apart), the weights' gradient copies d_y (so are its inner
// elements), the inputs' gradient nothing. Copying both, as is usual, cost 4096 x 192 by 192 a
// tenth. An element is summed in the same order whatever the other rows, the tile or the threads.
#pragma once

#include "base/matrix.h"
#include "base/simd.h"
#include "base/standard.h"
#include "train/matmul.h"

namespace PUNA_ISA {

// Of AVX-512's 32 registers 24 sum, of 16 smaller ones 12.
constexpr int TILE_ROWS = W == 16 ? 8 : 6, TILE_VECTORS = W == 16 ? 3 : 2;
constexpr int TILE_COLUMNS = TILE_VECTORS * W;
// Floats. A block of b, and one of a where it is copied, share 1 MB of second-level cache.
constexpr int64_t MATMUL_INNER = 512, MATMUL_BLOCK = 1 << 17;
// Numbers summed in one go. Sums of 512 were off 1.7 times as far as the BLAS's, of 256 1.2 times.
constexpr int64_t CHAIN = 256;

struct Tile {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_inner, inner;
  float* c;
  int64_t c_row, rows, columns;
  bool add;
};

template <int VECTORS>
inline void put(const Tile& t, const vec (&sums)[TILE_ROWS][VECTORS], bool add) {
#pragma GCC unroll 8
  for (int m = 0; m < TILE_ROWS; ++m) {
    if (m >= t.rows) return;
#pragma GCC unroll 3
    for (int j = 0; j < VECTORS; ++j) {
      float* c = t.c + m * t.c_row + j * W;
      if (t.columns >= (j + 1) * W) {
        store(c, add ? load(c) + sums[m][j] : sums[m][j]);
      } else {
        for (int64_t i = 0; i < t.columns - j * W; ++i)
          c[i] = add ? c[i] + sums[m][j][i] : sums[m][j][i];
      }
    }
  }
}

// COPIED: a's rows lie side by side, in a strip; otherwise its inner elements do.
template <int VECTORS, bool COPIED>
inline void sum_tile(const Tile& t) {
  const int64_t row = COPIED ? 1 : t.a_row, next = COPIED ? TILE_ROWS : 1;
  const float *a = t.a, *b = t.b;
  int64_t done = 0;
  do {
    vec sums[TILE_ROWS][VECTORS];
#pragma GCC unroll 8
    for (int m = 0; m < TILE_ROWS; ++m)
#pragma GCC unroll 3
      for (int j = 0; j < VECTORS; ++j) sums[m][j] = vec{};
    const int64_t count = std::min(CHAIN, t.inner - done);
    for (int64_t k = 0; k < count; ++k, a += next, b += t.b_inner) {
      vec columns[VECTORS];
#pragma GCC unroll 3
      for (int j = 0; j < VECTORS; ++j) columns[j] = load(b + j * W);
#pragma GCC unroll 8
      for (int m = 0; m < TILE_ROWS; ++m) {
        const vec value = all(a[m * row]);
#pragma GCC unroll 3
        for (int j = 0; j < VECTORS; ++j) sums[m][j] += value * columns[j];
      }
    }
    put(t, sums, t.add || done > 0);
    done += CHAIN;
  } while (done < t.inner);
}

template <int VECTORS = TILE_VECTORS>
inline void sum_tile(const Tile& t, bool copied) {
  if constexpr (VECTORS > 1)
    if (t.columns <= (VECTORS - 1) * W) return sum_tile<VECTORS - 1>(t, copied);
  copied ? sum_tile<VECTORS, true>(t) : sum_tile<VECTORS, false>(t);
}

// a (rows, inner) at `a`, in strips of TILE_ROWS, the last one filled up with zeros: its rows side
// by side.
inline void copy_rows(const puna::MatMul& p, const float* a, int64_t rows, int64_t inner,
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

// b (inner, columns) at `b`, in strips of TILE_COLUMNS, the last one filled up with zeros. Columns
// that are dense are turned W by W: one by one, a number took 4 times as long.
inline void copy_columns(const puna::MatMul& p, const float* b, int64_t inner, int64_t columns,
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

// The inner dimension is passed in cuts of at most MATMUL_INNER.
inline int64_t cut_count(const puna::MatMul& p) {
  return std::max<int64_t>(1, (p.inner + MATMUL_INNER - 1) / MATMUL_INNER);
}

inline Range cut(const puna::MatMul& p, int64_t number) {
  return share(p.inner, static_cast<int>(number), static_cast<int>(cut_count(p)));
}

// All of b, copied: for each cut its strips of columns, one after the other.
class Packed {
 public:
  static int64_t strips(const puna::MatMul& p) {
    return (p.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
  }
  static int64_t size(const puna::MatMul& p) { return strips(p) * TILE_COLUMNS * p.inner; }
  static int64_t pieces(const puna::MatMul& p) { return strips(p) * cut_count(p); }

  static void copy_piece(const puna::MatMul& p, int64_t piece, float* to) {
    const int64_t column = piece % strips(p) * TILE_COLUMNS;
    const Range inner = cut(p, piece / strips(p));
    copy_columns(p, p.b + inner.begin * p.b_inner + column * p.b_column, inner.end - inner.begin,
                 std::min<int64_t>(TILE_COLUMNS, p.columns - column), to + at(p, inner, column));
  }

  // Where the strip that begins with `column` lies.
  static int64_t at(const puna::MatMul& p, Range inner, int64_t column) {
    return inner.begin * strips(p) * TILE_COLUMNS + column * (inner.end - inner.begin);
  }
};

// A range of rows and columns by one thread. b comes from `packed`, or from where it is; then
// `room`, 2 * MATMUL_BLOCK floats, takes what must be copied of a and b.
class Blocks {
 public:
  Blocks(const puna::MatMul& p, Range rows, Range columns, float* room,
         const float* packed = nullptr)
      : p_(p), rows_(rows), columns_(columns), room_(room), packed_(packed) {}

  static bool copies_rows(const puna::MatMul& p) { return p.a_inner != 1; }
  static bool copies_columns(const puna::MatMul& p) { return p.b_column != 1; }

  void run() {
    for (int64_t number = 0; number < cut_count(p_); ++number) {
      inner_ = cut(p_, number);
      run_inner();
    }
  }

 private:
  int64_t inner() const { return inner_.end - inner_.begin; }

  // As many as fill a block, in whole tiles.
  int64_t step(int64_t tile) const {
    return MATMUL_BLOCK / std::max<int64_t>(1, inner()) / tile * tile;
  }

  void run_inner() {
    const bool copies = copies_rows(p_);
    const int64_t most = copies ? step(TILE_ROWS) : rows_.end - rows_.begin;
    for (int64_t row = rows_.begin; row < rows_.end; row += most) {
      const Range rows{row, std::min(row + most, rows_.end)};
      const float* a = p_.a + row * p_.a_row + inner_.begin * p_.a_inner;
      if (copies) copy_rows(p_, a, rows.end - row, inner(), room_);
      for (int64_t column = columns_.begin; column < columns_.end; column += step(TILE_COLUMNS))
        run_block(rows, {column, std::min(column + step(TILE_COLUMNS), columns_.end)},
                  copies ? room_ : a);
    }
  }

  // Strips of b: one after the other where they were copied, or side by side where they are.
  struct Columns {
    const float* at;
    bool copied;
  };

  Columns columns_of(Range columns) {
    if (packed_) return {packed_ + Packed::at(p_, inner_, columns.begin), true};
    const float* b = p_.b + inner_.begin * p_.b_inner + columns.begin * p_.b_column;
    if (p_.b_column == 1) return {b, false};
    copy_columns(p_, b, inner(), columns.end - columns.begin, room_ + MATMUL_BLOCK);
    return {room_ + MATMUL_BLOCK, true};
  }

  void run_block(Range rows, Range columns, const float* a) {
    const Columns b = columns_of(columns);
    const int64_t count = columns.end - columns.begin;
    // A last strip of part of a vector would be read past its end.
    const bool copies_last = !b.copied && count % W;
    const int64_t last = (count - 1) / TILE_COLUMNS * TILE_COLUMNS;
    if (copies_last) copy_columns(p_, b.at + last, inner(), count - last, room_ + MATMUL_BLOCK);
    for (int64_t row = rows.begin; row < rows.end; row += TILE_ROWS) {
      const Strip strip = strip_of(rows, row, a);
      for (int64_t done = 0; done < count; done += TILE_COLUMNS) {
        const bool copy = copies_last && done == last;
        const float* at = copy ? room_ + MATMUL_BLOCK : b.at + done * (b.copied ? inner() : 1);
        sum_tile({strip.a, p_.a_row, at, copy || b.copied ? TILE_COLUMNS : p_.b_inner, inner(),
                  p_.c + row * p_.columns + columns.begin + done, p_.columns, strip.rows,
                  std::min<int64_t>(TILE_COLUMNS, count - done), p_.add || inner_.begin > 0},
                 strip.copied);
      }
    }
  }

  struct Strip {
    const float* a;
    int64_t rows;
    bool copied;
  };

  // From `row` on, of `rows` at `a`. One that is not full is copied: a tile reads all its rows.
  Strip strip_of(Range rows, int64_t row, const float* a) {
    const int64_t count = std::min<int64_t>(TILE_ROWS, rows.end - row), before = row - rows.begin;
    if (copies_rows(p_)) return {a + before * inner(), count, true};
    const float* from = a + before * p_.a_row;
    if (count == TILE_ROWS) return {from, count, false};
    copy_rows(p_, from, count, inner(), last_);
    return {last_, count, true};
  }

  const puna::MatMul& p_;
  const Range rows_, columns_;
  float* const room_;
  const float* const packed_;
  Range inner_{0, 0};
  alignas(64) float last_[TILE_ROWS * MATMUL_INNER];
};

// How many threads share the rows, and how many the columns: what one of them copies, no other
// should copy again.
struct Grid {
  int rows, columns;

  Grid(const puna::MatMul& p, int threads) {
    const auto tiles = [](int64_t count, int64_t tile) {
      return static_cast<int>(std::min<int64_t>(1 << 20, (count + tile - 1) / tile));
    };
    const int most_rows = std::max(1, tiles(p.rows, TILE_ROWS));
    const int most_columns = std::max(1, tiles(p.columns, TILE_COLUMNS));
    if (Blocks::copies_columns(p)) {
      columns = std::min(threads, most_columns);
      rows = std::min(threads / columns, most_rows);
    } else {
      rows = std::min(threads, most_rows);
      columns = std::min(threads / rows, most_columns);
    }
  }
};

// A share of `count` that begins at a multiple of `unit`.
inline Range share_units(int64_t count, int64_t unit, int part, int parts) {
  const Range whole = share((count + unit - 1) / unit, part, parts);
  return {std::min(count, whole.begin * unit), std::min(count, whole.end * unit)};
}

inline int64_t pieces_of(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Rows of a piece of work; few rows make small pieces, so that every thread has some.
inline int64_t piece_rows(int64_t rows, int threads) {
  const int64_t tiles = rows / (2 * threads * TILE_ROWS);
  return std::min<int64_t>(64, std::max<int64_t>(1, tiles) * TILE_ROWS);
}

constexpr int64_t ROOM = 2 * MATMUL_BLOCK;

// Each thread its share: where b is so large that it is better read once a thread than once a
// piece, and where a is copied, which makes pieces dear.
inline void matmul_in_shares(const puna::MatMul& p, const Grid& grid, float* rooms) {
  const int parts = grid.rows * grid.columns;
  puna::parallel(parts, [&](int first, int step) {
    for (int part = first; part < parts; part += step)  // fewer threads may have come
      Blocks(p, share_units(p.rows, TILE_ROWS, part / grid.columns, grid.rows),
             share_units(p.columns, W, part % grid.columns, grid.columns), rooms + part * ROOM)
          .run();
  });
}

inline void matmul_in_pieces(const puna::MatMul& p, int threads, float* rooms, float* packed) {
  const int64_t each = piece_rows(p.rows, threads);
  puna::Pieces pieces;
  puna::parallel(threads, [&](int part, int parts) {
    if (packed)
      pieces.each(parts, Packed::pieces(p), [&](int64_t i) { Packed::copy_piece(p, i, packed); });
    pieces.each(parts, pieces_of(p.rows, each), [&](int64_t i) {
      Blocks(p, {i * each, std::min((i + 1) * each, p.rows)}, {0, p.columns}, rooms + part * ROOM,
             packed)
          .run();
    });
  });
}

inline void matmul(const puna::MatMul& p, int threads) {
  // Kept by the thread that calls: made anew, it cost 500 page faults a product.
  thread_local Buffer memory;
  thread_local int64_t held = 0;
  const Grid grid(p, threads);
  const bool in_pieces = grid.rows * grid.columns > 1 && !Blocks::copies_rows(p) &&
                         p.rows >= 64 * threads && Packed::size(p) <= 8 * MATMUL_BLOCK;
  const int64_t packed = in_pieces && Blocks::copies_columns(p) ? Packed::size(p) : 0;
  const int64_t wanted = threads * ROOM + packed;
  if (held < wanted) {
    memory = buffer(wanted);
    held = wanted;
  }
  float* const rooms = memory.get();
  if (in_pieces)
    matmul_in_pieces(p, threads, rooms, packed ? rooms + threads * ROOM : nullptr);
  else
    matmul_in_shares(p, grid, rooms);
}

}  // namespace PUNA_ISA
