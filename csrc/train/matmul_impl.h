// Matrix products in blocks that stay in the caches.
//
// Operands are packed only where their memory order does not suit the inner loop. Of a linear
// layer's three products the forward packs its weights (their columns are far apart), the weights'
// gradient packs d_y (so are its inner elements), the inputs' gradient nothing. Packing both, as is
// usual, cost 4096 x 192 by 192 a tenth. Products of bf16 round both while they pack them. The
// order in which an element is summed does not depend on the other rows, the tile or the threads.
#pragma once

#include "base/tile.h"
#include "train/pack_impl.h"

namespace PUNA_ISA {

// Of floats, or of pairs of bf16, which `inner` counts then.
template <typename Number>
struct MatMulTile {
  const Number* a;
  int64_t a_row;
  const Number* b;
  int64_t b_inner, inner;
  float* c;
  int64_t c_row, rows, columns;
  bool add;
};

// Stores the part of the sums that lies inside of c.
template <typename Number, int VECTORS>
inline void store_inside(const MatMulTile<Number>& t, const vec (&sums)[TILE_ROWS][VECTORS],
                         bool add) {
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
template <int VECTORS, bool PACKED, typename Number>
__attribute__((noinline)) void multiply_tile(const MatMulTile<Number>& t) {
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

template <int VECTORS = TILE_VECTORS, typename Number>
inline void multiply_tile(const MatMulTile<Number>& t, bool packed) {
  if constexpr (VECTORS > 1)
    if (t.columns <= (VECTORS - 1) * W) return multiply_tile<VECTORS - 1>(t, packed);
  packed ? multiply_tile<VECTORS, true>(t) : multiply_tile<VECTORS, false>(t);
}

// A range of rows and columns by one thread. b comes from `packed`, or from where it is; then
// `workspace`, 2 * BLOCK_FLOATS, takes what must be packed of a and b. As pairs of bf16 both are.
template <typename Number>
class BlockedProduct {
  static constexpr bool ROUNDS = std::is_same_v<Number, Pair>;

 public:
  BlockedProduct(const puna::MatMul& p, Range rows, Range columns, float* workspace,
                 const Number* packed = nullptr)
      : p_(p),
        rows_(rows),
        columns_(columns),
        workspace_(reinterpret_cast<Number*>(workspace)),
        packed_(packed) {}

  static bool has_strips(const puna::MatMul& p) { return p.a_inner != 1; }
  static bool packs_columns(const puna::MatMul& p) { return ROUNDS || p.b_column != 1; }

  void run() {
    for (int64_t number = 0; number < inner_block_count<Number>(p_); ++number) {
      inner_ = inner_block<Number>(p_, number);
      run_inner_block();
    }
  }

 private:
  int64_t inner() const { return inner_.end - inner_.begin; }
  int64_t held() const { return held_in<Number>(inner()); }

  // How many rows or columns fill a block, in whole tiles.
  int64_t block_size(int64_t tile) const {
    return BLOCK_FLOATS / std::max<int64_t>(1, held()) / tile * tile;
  }

  void run_inner_block() {
    const bool packs = ROUNDS || has_strips(p_);
    const int64_t step = packs ? block_size(TILE_ROWS) : rows_.end - rows_.begin;
    const int64_t column_step = block_size(TILE_COLUMNS);
    for (int64_t row = rows_.begin; row < rows_.end; row += step) {
      const Range rows{row, std::min(row + step, rows_.end)};
      const Number* a = rows_of_a(rows);
      for (int64_t column = columns_.begin; column < columns_.end; column += column_step)
        run_block(rows, {column, std::min(column + column_step, columns_.end)}, a);
    }
  }

  const Number* rows_of_a(Range rows) {
    const float* a = p_.a + rows.begin * p_.a_row + inner_.begin * p_.a_inner;
    if constexpr (!ROUNDS)
      if (!has_strips(p_)) return a;
    pack_rows(p_, a, rows.end - rows.begin, inner(), workspace_);
    return workspace_;
  }

  // Columns of b: strips one after the other where they are packed, side by side where not.
  struct Columns {
    const Number* data;
    bool packed;
  };

  Columns columns_of_b(Range columns) {
    if (packed_) return {packed_ + PackedColumns<Number>::offset(p_, inner_, columns.begin), true};
    const float* b = p_.b + inner_.begin * p_.b_inner + columns.begin * p_.b_column;
    if constexpr (!ROUNDS)
      if (!packs_columns(p_)) return {b, false};
    pack_columns(p_, b, inner(), columns.end - columns.begin, workspace_ + BLOCK_FLOATS);
    return {workspace_ + BLOCK_FLOATS, true};
  }

  void run_block(Range rows, Range columns, const Number* a) {
    const Columns b = columns_of_b(columns);
    const int64_t count = columns.end - columns.begin;
    // Where b is not packed, loading a last vector that is not full would read past its end.
    const bool packs_last = !b.packed && count % W;
    const int64_t last = (count - 1) / TILE_COLUMNS * TILE_COLUMNS;
    Number* const last_strip = workspace_ + BLOCK_FLOATS;
    if constexpr (!ROUNDS)
      if (packs_last) pack_columns(p_, b.data + last, inner(), count - last, last_strip);
    for (int64_t row = rows.begin; row < rows.end; row += TILE_ROWS) {
      const Strip strip = strip_of_a(rows, row, a);
      for (int64_t column = 0; column < count; column += TILE_COLUMNS) {
        const bool is_packed_last = packs_last && column == last;
        const Number* data =
            is_packed_last ? last_strip : b.data + column * (b.packed ? held() : 1);
        multiply_tile(
            MatMulTile<Number>{strip.data, ROUNDS ? held() : p_.a_row, data,
                               is_packed_last || b.packed ? TILE_COLUMNS : p_.b_inner, held(),
                               p_.c + row * p_.columns + columns.begin + column, p_.columns,
                               strip.rows, std::min<int64_t>(TILE_COLUMNS, count - column),
                               p_.add || inner_.begin > 0},
            strip.packed);
      }
    }
  }

  // Up to TILE_ROWS rows of a.
  struct Strip {
    const Number* data;
    int64_t rows;
    bool packed;
  };

  // The strip at `row`, where `rows` begin at `a`. A tile reads all its rows: a strip of floats
  // that is not full is packed, behind rounded rows there is room.
  Strip strip_of_a(Range rows, int64_t row, const Number* a) {
    const int64_t count = std::min<int64_t>(TILE_ROWS, rows.end - row), before = row - rows.begin;
    if (has_strips(p_)) return {a + before * held(), count, true};
    if constexpr (ROUNDS) {
      return {a + before * held(), count, false};
    } else {
      const float* from = a + before * p_.a_row;
      if (count == TILE_ROWS) return {from, count, false};
      pack_rows(p_, from, count, inner(), last_rows_);
      return {last_rows_, count, true};
    }
  }

  const puna::MatMul& p_;
  const Range rows_, columns_;
  Number* const workspace_;
  const Number* const packed_;
  Range inner_{0, 0};
  alignas(64) Number last_rows_[TILE_ROWS * MAX_INNER_BLOCK];
};

// How many threads split the rows, and how many the columns, so that no two of them pack the same.
struct ThreadGrid {
  int rows, columns;

  ThreadGrid(const puna::MatMul& p, bool packs_columns, int threads) {
    const auto tiles = [](int64_t count, int64_t tile) {
      return static_cast<int>(std::clamp<int64_t>(ceil_div(count, tile), 1, 1 << 20));
    };
    const int max_rows = tiles(p.rows, TILE_ROWS), max_columns = tiles(p.columns, TILE_COLUMNS);
    if (packs_columns) {
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
// and not once a piece, and where a is in strips, which makes pieces expensive.
template <typename Number>
void matmul_fixed_parts(const puna::MatMul& p, const ThreadGrid& grid, float* workspaces) {
  const int parts = grid.rows * grid.columns;
  puna::parallel(parts, [&](int first, int step) {
    for (int part = first; part < parts; part += step)  // OpenMP may grant fewer threads
      BlockedProduct<Number>(p, split_units(p.rows, TILE_ROWS, part / grid.columns, grid.rows),
                             split_units(p.columns, W, part % grid.columns, grid.columns),
                             workspaces + part * WORKSPACE)
          .run();
  });
}

// The threads take pieces of some rows until none is left.
template <typename Number>
void matmul_queued_rows(const puna::MatMul& p, int threads, float* workspaces, Number* packed) {
  const int64_t piece = rows_per_piece(p.rows, threads);
  puna::WorkQueue queue;
  puna::parallel(threads, [&](int thread, int count) {
    if (packed)
      queue.for_each(count, PackedColumns<Number>::pieces(p),
                     [&](int64_t i) { PackedColumns<Number>::pack_piece(p, i, packed); });
    queue.for_each(count, ceil_div(p.rows, piece), [&](int64_t i) {
      BlockedProduct<Number>(p, {i * piece, std::min((i + 1) * piece, p.rows)}, {0, p.columns},
                             workspaces + thread * WORKSPACE, packed)
          .run();
    });
  });
}

template <typename Number>
void matmul_of(const puna::MatMul& p, int threads) {
  // Kept by the calling thread: a new allocation cost 500 page faults a product.
  thread_local Buffer memory;
  thread_local int64_t capacity = 0;
  const bool packs = BlockedProduct<Number>::packs_columns(p);
  const int64_t size = PackedColumns<Number>::size(p);
  const ThreadGrid grid(p, packs, threads);
  const bool queued = grid.rows * grid.columns > 1 && !BlockedProduct<Number>::has_strips(p) &&
                      p.rows >= 64 * threads && size <= 8 * BLOCK_FLOATS;
  const int64_t packed = queued && packs ? size : 0;
  const int64_t wanted = threads * WORKSPACE + packed;
  if (capacity < wanted) {
    memory = allocate(wanted);
    capacity = wanted;
  }
  float* const workspaces = memory.get();
  auto* const columns = reinterpret_cast<Number*>(workspaces + threads * WORKSPACE);
  if (queued)
    matmul_queued_rows<Number>(p, threads, workspaces, packed ? columns : nullptr);
  else
    matmul_fixed_parts<Number>(p, grid, workspaces);
}

// Calls work(number) with a float, or with a pair where both operands are to be rounded to bf16.
template <typename Work>
void with_number(bool bf16, Work work) {
  if (!bf16) return work(float());
  if constexpr (MULTIPLIES_PAIRS) return work(Pair());
  throw std::invalid_argument("this instruction set does not multiply bf16");
}

inline void matmul(const puna::MatMul& p, int threads) {
  with_number(p.bf16, [&](auto number) { matmul_of<decltype(number)>(p, threads); });
}

}  // namespace PUNA_ISA
