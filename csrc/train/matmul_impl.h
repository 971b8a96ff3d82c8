// Matrix products in blocks that stay in the caches.
//
// Operands are packed only where their memory order does not suit the inner loop. Of a linear
// layer's three products the forward packs its weights (their columns are far apart), the weights'
// gradient packs d_y (so are its inner elements), the inputs' gradient nothing. Packing both, as is
// usual, cost 4096 x 192 by 192 a tenth. The order in which an element is summed does not depend on
// the other rows, the tile or the threads.
#pragma once

#include "base/tile.h"
#include "train/pack_impl.h"

namespace PUNA_ISA {

struct MatMulTile {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t b_inner, inner;
  float* c;
  int64_t c_row, rows, columns;
  bool add;
};

// Stores the part of the sums that lies inside of c.
template <int VECTORS>
inline void store_inside(const MatMulTile& t, const vec (&sums)[TILE_ROWS][VECTORS], bool add) {
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

// PACKED: a's rows lie side by side, in a strip; otherwise its inner elements do. Not inlined: in
// the middle of a block's loops its strides would not stay in registers.
template <int VECTORS, bool PACKED>
__attribute__((noinline)) void multiply_tile(const MatMulTile& t) {
  const int64_t a_row = PACKED ? 1 : t.a_row, a_inner = PACKED ? TILE_ROWS : 1;
  int64_t done = 0;
  do {
    vec sums[TILE_ROWS][VECTORS];
    clear(sums);
    multiply_add(sums, t.a + done * a_inner, a_row, a_inner, t.b + done * t.b_inner, t.b_inner,
                 std::min(CHAIN, t.inner - done));
    store_inside(t, sums, t.add || done > 0);
    done += CHAIN;
  } while (done < t.inner);
}

template <int VECTORS = TILE_VECTORS>
inline void multiply_tile(const MatMulTile& t, bool packed) {
  if constexpr (VECTORS > 1)
    if (t.columns <= (VECTORS - 1) * W) return multiply_tile<VECTORS - 1>(t, packed);
  packed ? multiply_tile<VECTORS, true>(t) : multiply_tile<VECTORS, false>(t);
}

// A range of rows and columns by one thread. b comes from `packed`, or from where it is; then
// `workspace`, 2 * BLOCK_FLOATS, takes what must be packed of a and b.
class BlockedProduct {
 public:
  BlockedProduct(const puna::MatMul& p, Range rows, Range columns, float* workspace,
                 const float* packed = nullptr)
      : p_(p), rows_(rows), columns_(columns), workspace_(workspace), packed_(packed) {}

  static bool packs_rows(const puna::MatMul& p) { return p.a_inner != 1; }
  static bool packs_columns(const puna::MatMul& p) { return p.b_column != 1; }

  void run() {
    for (int64_t number = 0; number < inner_block_count(p_); ++number) {
      inner_ = inner_block(p_, number);
      run_inner_block();
    }
  }

 private:
  int64_t inner() const { return inner_.end - inner_.begin; }

  // How many rows or columns fill a block, in whole tiles.
  int64_t block_size(int64_t tile) const {
    return BLOCK_FLOATS / std::max<int64_t>(1, inner()) / tile * tile;
  }

  void run_inner_block() {
    const bool packs = packs_rows(p_);
    const int64_t step = packs ? block_size(TILE_ROWS) : rows_.end - rows_.begin;
    const int64_t column_step = block_size(TILE_COLUMNS);
    for (int64_t row = rows_.begin; row < rows_.end; row += step) {
      const Range rows{row, std::min(row + step, rows_.end)};
      const float* a = p_.a + row * p_.a_row + inner_.begin * p_.a_inner;
      if (packs) pack_rows(p_, a, rows.end - row, inner(), workspace_);
      for (int64_t column = columns_.begin; column < columns_.end; column += column_step)
        run_block(rows, {column, std::min(column + column_step, columns_.end)},
                  packs ? workspace_ : a);
    }
  }

  // Columns of b: strips one after the other where they are packed, side by side where not.
  struct Columns {
    const float* data;
    bool packed;
  };

  Columns columns_of_b(Range columns) {
    if (packed_) return {packed_ + PackedColumns::offset(p_, inner_, columns.begin), true};
    const float* b = p_.b + inner_.begin * p_.b_inner + columns.begin * p_.b_column;
    if (p_.b_column == 1) return {b, false};
    pack_columns(p_, b, inner(), columns.end - columns.begin, workspace_ + BLOCK_FLOATS);
    return {workspace_ + BLOCK_FLOATS, true};
  }

  void run_block(Range rows, Range columns, const float* a) {
    const Columns b = columns_of_b(columns);
    const int64_t count = columns.end - columns.begin;
    // Where b is not packed, loading a last vector that is not full would read past its end.
    const bool packs_last = !b.packed && count % W;
    const int64_t last = (count - 1) / TILE_COLUMNS * TILE_COLUMNS;
    float* const last_strip = workspace_ + BLOCK_FLOATS;
    if (packs_last) pack_columns(p_, b.data + last, inner(), count - last, last_strip);
    for (int64_t row = rows.begin; row < rows.end; row += TILE_ROWS) {
      const Strip strip = strip_of_a(rows, row, a);
      for (int64_t column = 0; column < count; column += TILE_COLUMNS) {
        const bool is_packed_last = packs_last && column == last;
        const float* data =
            is_packed_last ? last_strip : b.data + column * (b.packed ? inner() : 1);
        multiply_tile(
            {strip.data, p_.a_row, data, is_packed_last || b.packed ? TILE_COLUMNS : p_.b_inner,
             inner(), p_.c + row * p_.columns + columns.begin + column, p_.columns, strip.rows,
             std::min<int64_t>(TILE_COLUMNS, count - column), p_.add || inner_.begin > 0},
            strip.packed);
      }
    }
  }

  // Up to TILE_ROWS rows of a.
  struct Strip {
    const float* data;
    int64_t rows;
    bool packed;
  };

  // The strip at `row`, where `rows` begin at `a`. A strip that is not full is packed: a tile reads
  // all its rows.
  Strip strip_of_a(Range rows, int64_t row, const float* a) {
    const int64_t count = std::min<int64_t>(TILE_ROWS, rows.end - row), before = row - rows.begin;
    if (packs_rows(p_)) return {a + before * inner(), count, true};
    const float* from = a + before * p_.a_row;
    if (count == TILE_ROWS) return {from, count, false};
    pack_rows(p_, from, count, inner(), last_rows_);
    return {last_rows_, count, true};
  }

  const puna::MatMul& p_;
  const Range rows_, columns_;
  float* const workspace_;
  const float* const packed_;
  Range inner_{0, 0};
  alignas(64) float last_rows_[TILE_ROWS * MAX_INNER_BLOCK];
};

// How many threads split the rows, and how many the columns, so that no two of them pack the same.
struct ThreadGrid {
  int rows, columns;

  ThreadGrid(const puna::MatMul& p, int threads) {
    const auto tiles = [](int64_t count, int64_t tile) {
      return static_cast<int>(std::clamp<int64_t>(ceil_div(count, tile), 1, 1 << 20));
    };
    const int max_rows = tiles(p.rows, TILE_ROWS), max_columns = tiles(p.columns, TILE_COLUMNS);
    if (BlockedProduct::packs_columns(p)) {
      columns = std::min(threads, max_columns);
      rows = std::min(threads / columns, max_rows);
    } else {
      rows = std::min(threads, max_rows);
      columns = std::min(threads / rows, max_columns);
    }
  }
};

// As `split`, where each part begins at a multiple of `unit`.
inline Range split_units(int64_t count, int64_t unit, int part, int parts) {
  const Range units = split(ceil_div(count, unit), part, parts);
  return {std::min(count, units.begin * unit), std::min(count, units.end * unit)};
}

// Rows of a piece of work; few rows make small pieces, so that every thread has some.
inline int64_t rows_per_piece(int64_t rows, int threads) {
  const int64_t tiles = rows / (2 * threads * TILE_ROWS);
  return std::min<int64_t>(64, std::max<int64_t>(1, tiles) * TILE_ROWS);
}

constexpr int64_t WORKSPACE = 2 * BLOCK_FLOATS;  // floats a thread

// Each thread takes one fixed part: best where b is so large that it should be read once a thread
// and not once a piece, and where a is packed, which makes pieces expensive.
inline void matmul_fixed_parts(const puna::MatMul& p, const ThreadGrid& grid, float* workspaces) {
  const int parts = grid.rows * grid.columns;
  puna::parallel(parts, [&](int first, int step) {
    for (int part = first; part < parts; part += step)  // OpenMP may grant fewer threads
      BlockedProduct(p, split_units(p.rows, TILE_ROWS, part / grid.columns, grid.rows),
                     split_units(p.columns, W, part % grid.columns, grid.columns),
                     workspaces + part * WORKSPACE)
          .run();
  });
}

// The threads take pieces of some rows until none is left.
inline void matmul_queued_rows(const puna::MatMul& p, int threads, float* workspaces,
                               float* packed) {
  const int64_t piece = rows_per_piece(p.rows, threads);
  puna::WorkQueue queue;
  puna::parallel(threads, [&](int thread, int count) {
    if (packed)
      queue.for_each(count, PackedColumns::pieces(p),
                     [&](int64_t i) { PackedColumns::pack_piece(p, i, packed); });
    queue.for_each(count, ceil_div(p.rows, piece), [&](int64_t i) {
      BlockedProduct(p, {i * piece, std::min((i + 1) * piece, p.rows)}, {0, p.columns},
                     workspaces + thread * WORKSPACE, packed)
          .run();
    });
  });
}

inline void matmul(const puna::MatMul& p, int threads) {
  // Kept by the calling thread: a new allocation cost 500 page faults a product.
  thread_local Buffer memory;
  thread_local int64_t capacity = 0;
  const ThreadGrid grid(p, threads);
  const bool queued = grid.rows * grid.columns > 1 && !BlockedProduct::packs_rows(p) &&
                      p.rows >= 64 * threads && PackedColumns::size(p) <= 8 * BLOCK_FLOATS;
  const int64_t packed = queued && BlockedProduct::packs_columns(p) ? PackedColumns::size(p) : 0;
  const int64_t wanted = threads * WORKSPACE + packed;
  if (capacity < wanted) {
    memory = allocate(wanted);
    capacity = wanted;
  }
  float* const workspaces = memory.get();
  if (queued)
    matmul_queued_rows(p, threads, workspaces, packed ? workspaces + threads * WORKSPACE : nullptr);
  else
    matmul_fixed_parts(p, grid, workspaces);
}

}  // namespace PUNA_ISA
