// A piece of some rows goes through the whole layer before the next one, so that what lies between
// the products is still in the caches, and threads wait for each other once a part and not once a
// product. (As separate products, called from Python, a seventh of a training step of the demo's
// shape was gaps between calls and waiting for the slower thread.)
#pragma once

#include "train/elementwise_impl.h"
#include "train/feed_forward.h"
#include "train/matmul_impl.h"

namespace PUNA_ISA {

constexpr int64_t MAX_PART_ROWS = 512;  // rows whose hidden gradients are held at a time
// Rows of a weight's gradient in a piece of work. Of bf16 more: each piece rounds the inputs again.
template <typename Number>
constexpr int64_t WEIGHT_PIECE_ROWS = std::is_same_v<Number, Pair> ? 64 : 16;

// The three products of a linear layer of weights w (outputs, inputs).
inline puna::MatMul output_product(int64_t rows, int64_t inputs, int64_t outputs, const float* x,
                                   const float* w, float* y) {
  return {rows, outputs, inputs, x, inputs, 1, w, 1, inputs, y, false};
}

inline puna::MatMul input_product(int64_t rows, int64_t inputs, int64_t outputs, const float* d_y,
                                  const float* w, float* d_x, bool add) {
  return {rows, inputs, outputs, d_y, outputs, 1, w, inputs, 1, d_x, add};
}

inline puna::MatMul weight_product(int64_t rows, int64_t inputs, int64_t outputs, const float* d_y,
                                   const float* x, float* d_w, bool add) {
  return {outputs, inputs, rows, d_y, 1, outputs, x, inputs, 1, d_w, add};
}

// Rows of a product, by one thread.
template <typename Number>
void multiply_rows(const puna::MatMul& p, Range rows, float* workspace,
                   const Number* packed = nullptr) {
  BlockedProduct<Number>(p, rows, {0, p.columns}, workspace, packed).run();
}

template <typename Number>
void feed_forward_of(const puna::FeedForward& f, int threads) {
  using Columns = PackedColumns<Number>;
  const puna::MatMul gate = output_product(f.rows, f.width, f.hidden, f.x, f.gate, nullptr);
  const puna::MatMul up = output_product(f.rows, f.width, f.hidden, f.x, f.up, nullptr);
  const puna::MatMul down = output_product(f.rows, f.hidden, f.width, nullptr, f.down, nullptr);
  const Buffer packed = allocate(Columns::size(gate) + Columns::size(up) + Columns::size(down));
  auto* const packed_gate = reinterpret_cast<Number*>(packed.get());
  Number* const packed_up = packed_gate + Columns::size(gate);
  Number* const packed_down = packed_up + Columns::size(up);
  const int64_t gate_pieces = Columns::pieces(gate), down_pieces = Columns::pieces(down);

  const auto pack = [&](int64_t i) {
    if (i < gate_pieces) return Columns::pack_piece(gate, i, packed_gate);
    if (i < 2 * gate_pieces) return Columns::pack_piece(up, i - gate_pieces, packed_up);
    Columns::pack_piece(down, i - 2 * gate_pieces, packed_down);
  };

  const int64_t piece = rows_per_piece(f.rows, threads), piece_size = piece * f.hidden;
  const int64_t thread_size = piece_size * (f.gates ? 1 : 3);
  const Buffer hidden = allocate(threads * thread_size), workspaces = allocate(threads * WORKSPACE);
  const auto forward_rows = [&](int64_t first, int64_t count, float* inner, float* workspace) {
    float* const gates = f.gates ? f.gates + first * f.hidden : inner + piece_size;
    float* const ups = f.gates ? f.ups + first * f.hidden : gates + piece_size;
    const float* x = f.x + first * f.width;
    float* const y = f.y + first * f.width;
    const Range rows{0, count};
    multiply_rows(output_product(count, f.width, f.hidden, x, f.gate, gates), rows, workspace,
                  packed_gate);
    multiply_rows(output_product(count, f.width, f.hidden, x, f.up, ups), rows, workspace,
                  packed_up);
    swiglu({count * f.hidden, gates, ups, inner}, 0, count * f.hidden);
    multiply_rows(output_product(count, f.hidden, f.width, inner, f.down, y), rows, workspace,
                  packed_down);
  };

  puna::WorkQueue queue;
  puna::parallel(threads, [&](int thread, int count) {
    queue.for_each(count, 2 * gate_pieces + down_pieces, pack);
    queue.for_each(count, ceil_div(f.rows, piece), [&](int64_t i) {
      forward_rows(i * piece, std::min(piece, f.rows - i * piece),
                   hidden.get() + thread * thread_size, workspaces.get() + thread * WORKSPACE);
    });
  });
}

inline void feed_forward(const puna::FeedForward& f, int threads) {
  with_number(f.bf16, [&](auto number) { feed_forward_of<decltype(number)>(f, threads); });
}

// What the weights' gradients are made of.
struct HiddenGradients {
  float *gates, *ups;  // gradients of gate x and up x
  float* inner;        // the input of `down`
};

// d_x and the above, of rows `first` to `first + count`.
template <typename Number>
void rows_gradient(const puna::FeedForwardGradient& f, int64_t first, int64_t count,
                   HiddenGradients to, float* workspace) {
  const Range rows{0, count};
  const int64_t offset = first * f.hidden, size = count * f.hidden;
  const float* d_y = f.d_y + first * f.width;
  float* const d_x = f.d_x + first * f.width;
  multiply_rows<Number>(input_product(count, f.hidden, f.width, d_y, f.down, to.inner, false), rows,
                        workspace);
  swiglu_gradient({size, f.gates + offset, f.ups + offset, to.inner, to.gates, to.ups, to.inner}, 0,
                  size);
  multiply_rows<Number>(input_product(count, f.width, f.hidden, to.gates, f.gate, d_x, false), rows,
                        workspace);
  multiply_rows<Number>(input_product(count, f.width, f.hidden, to.ups, f.up, d_x, true), rows,
                        workspace);
}

template <typename Number>
void feed_forward_gradient_of(const puna::FeedForwardGradient& f, int threads) {
  const int64_t parts = std::max<int64_t>(1, ceil_div(f.rows, MAX_PART_ROWS));
  const int64_t part_rows = ceil_div(f.rows, parts), part_size = part_rows * f.hidden;
  const int64_t piece = rows_per_piece(part_rows, threads);
  const Buffer hidden = allocate(3 * part_size), workspaces = allocate(threads * WORKSPACE);
  const HiddenGradients part_gradients{hidden.get(), hidden.get() + part_size,
                                       hidden.get() + 2 * part_size};
  constexpr int64_t WEIGHT_ROWS = WEIGHT_PIECE_ROWS<Number>;
  const int64_t hidden_pieces = ceil_div(f.hidden, WEIGHT_ROWS);
  const int64_t width_pieces = ceil_div(f.width, WEIGHT_ROWS);

  // Pieces of d_gate, then of d_up, then of d_down.
  const auto weights_gradient = [&](int64_t piece, Range rows, float* workspace) {
    const int64_t count = rows.end - rows.begin;
    const float *x = f.x + rows.begin * f.width, *d_y = f.d_y + rows.begin * f.width;
    const bool add = rows.begin > 0;
    const auto multiply_piece = [&](const puna::MatMul& p, int64_t i) {
      multiply_rows<Number>(p, {i * WEIGHT_ROWS, std::min((i + 1) * WEIGHT_ROWS, p.rows)},
                            workspace);
    };
    if (piece < hidden_pieces)
      multiply_piece(
          weight_product(count, f.width, f.hidden, part_gradients.gates, x, f.d_gate, add), piece);
    else if (piece < 2 * hidden_pieces)
      multiply_piece(weight_product(count, f.width, f.hidden, part_gradients.ups, x, f.d_up, add),
                     piece - hidden_pieces);
    else
      multiply_piece(
          weight_product(count, f.hidden, f.width, d_y, part_gradients.inner, f.d_down, add),
          piece - 2 * hidden_pieces);
  };

  puna::WorkQueue queue;
  puna::parallel(threads, [&](int thread, int thread_count) {
    float* const workspace = workspaces.get() + thread * WORKSPACE;
    for (int64_t part = 0; part < parts; ++part) {
      const Range rows = split(f.rows, static_cast<int>(part), static_cast<int>(parts));
      const int64_t count = rows.end - rows.begin;
      queue.for_each(thread_count, ceil_div(count, piece), [&](int64_t i) {
        const int64_t first = i * piece, offset = first * f.hidden;
        rows_gradient<Number>(f, rows.begin + first, std::min(piece, count - first),
                              {part_gradients.gates + offset, part_gradients.ups + offset,
                               part_gradients.inner + offset},
                              workspace);
      });
      queue.for_each(thread_count, 2 * hidden_pieces + width_pieces,
                     [&](int64_t i) { weights_gradient(i, rows, workspace); });
    }
  });
}

inline void feed_forward_gradient(const puna::FeedForwardGradient& f, int threads) {
  with_number(f.bf16, [&](auto number) { feed_forward_gradient_of<decltype(number)>(f, threads); });
}

}  // namespace PUNA_ISA
