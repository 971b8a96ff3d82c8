// A piece of some rows goes through the whole layer before the next one comes, so that what stands
// between the products is still in the caches, and threads meet once a part of rows, not once a
// product. (As products one by one, called from Python, a seventh of a training step of the
// demo's shape was gaps between calls and waiting for the slower thread.)
#pragma once

#include "train/elementwise_impl.h"
#include "train/feed_forward.h"
#include "train/matmul_impl.h"

namespace PUNA_ISA {

constexpr int64_t PART = 512;        // rows whose gradients are held at a time
constexpr int64_t WEIGHT_ROWS = 16;  // of a weight's gradient, at a time

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

inline void multiply(const puna::MatMul& p, Range rows, float* room,
                     const float* packed = nullptr) {
  Blocks(p, rows, {0, p.columns}, room, packed).run();
}

inline void feed_forward(const puna::FeedForward& f, int threads) {
  const puna::MatMul gate = output_product(f.rows, f.width, f.hidden, f.x, f.gate, nullptr);
  const puna::MatMul up = output_product(f.rows, f.width, f.hidden, f.x, f.up, nullptr);
  const puna::MatMul down = output_product(f.rows, f.hidden, f.width, nullptr, f.down, nullptr);
  const Buffer packed = buffer(Packed::size(gate) + Packed::size(up) + Packed::size(down));
  float* const gate_packed = packed.get();
  float* const up_packed = gate_packed + Packed::size(gate);
  float* const down_packed = up_packed + Packed::size(up);
  const int64_t gate_pieces = Packed::pieces(gate), down_pieces = Packed::pieces(down);

  const auto pack = [&](int64_t i) {
    if (i < gate_pieces) return Packed::copy_piece(gate, i, gate_packed);
    if (i < 2 * gate_pieces) return Packed::copy_piece(up, i - gate_pieces, up_packed);
    Packed::copy_piece(down, i - 2 * gate_pieces, down_packed);
  };

  const int64_t each = piece_rows(f.rows, threads), held_each = each * f.hidden * (f.gates ? 1 : 3);
  const Buffer held = buffer(threads * held_each);
  const auto through = [&](int64_t first, int64_t count, float* inner) {
    float* const gates = f.gates ? f.gates + first * f.hidden : inner + each * f.hidden;
    float* const ups = f.gates ? f.ups + first * f.hidden : gates + each * f.hidden;
    const float* x = f.x + first * f.width;
    float* const y = f.y + first * f.width;
    const Range all{0, count};
    multiply(output_product(count, f.width, f.hidden, x, f.gate, gates), all, nullptr, gate_packed);
    multiply(output_product(count, f.width, f.hidden, x, f.up, ups), all, nullptr, up_packed);
    swiglu({count * f.hidden, gates, ups, inner}, 0, count * f.hidden);
    multiply(output_product(count, f.hidden, f.width, inner, f.down, y), all, nullptr, down_packed);
  };

  puna::Pieces pieces;
  puna::parallel(threads, [&](int part, int parts) {
    pieces.each(parts, 2 * gate_pieces + down_pieces, pack);
    pieces.each(parts, pieces_of(f.rows, each), [&](int64_t i) {
      through(i * each, std::min(each, f.rows - i * each), held.get() + part * held_each);
    });
  });
}

// What the gradients of the weights are made of.
struct Inner {
  float *gates, *ups, *inner;  // gradients of gate x and up x, and what went into `down`
};

// Of rows `first` to `first + count`: d_x and the above.
inline void rows_gradient(const puna::FeedForwardGradient& f, int64_t first, int64_t count,
                          Inner to, float* room) {
  const Range all{0, count};
  const int64_t at = first * f.hidden, size = count * f.hidden;
  const float* d_y = f.d_y + first * f.width;
  float* const d_x = f.d_x + first * f.width;
  multiply(input_product(count, f.hidden, f.width, d_y, f.down, to.inner, false), all, room);
  swiglu_gradient({size, f.gates + at, f.ups + at, to.inner, to.gates, to.ups, to.inner}, 0, size);
  multiply(input_product(count, f.width, f.hidden, to.gates, f.gate, d_x, false), all, room);
  multiply(input_product(count, f.width, f.hidden, to.ups, f.up, d_x, true), all, room);
}

inline void feed_forward_gradient(const puna::FeedForwardGradient& f, int threads) {
  const int64_t parts = std::max<int64_t>(1, pieces_of(f.rows, PART));
  const int64_t tallest = pieces_of(f.rows, parts), held_each = tallest * f.hidden;
  const int64_t each = piece_rows(tallest, threads);
  const Buffer held = buffer(3 * held_each), rooms = buffer(threads * ROOM);
  const Inner inner{held.get(), held.get() + held_each, held.get() + 2 * held_each};
  const int64_t hidden_pieces = pieces_of(f.hidden, WEIGHT_ROWS);
  const int64_t width_pieces = pieces_of(f.width, WEIGHT_ROWS);

  const auto weights_gradient = [&](int64_t piece, Range rows, float* room) {
    const int64_t count = rows.end - rows.begin;
    const float *x = f.x + rows.begin * f.width, *d_y = f.d_y + rows.begin * f.width;
    const bool add = rows.begin > 0;
    const auto some = [&](const puna::MatMul& p, int64_t i) {
      multiply(p, {i * WEIGHT_ROWS, std::min((i + 1) * WEIGHT_ROWS, p.rows)}, room);
    };
    if (piece < hidden_pieces)
      some(weight_product(count, f.width, f.hidden, inner.gates, x, f.d_gate, add), piece);
    else if (piece < 2 * hidden_pieces)
      some(weight_product(count, f.width, f.hidden, inner.ups, x, f.d_up, add),
           piece - hidden_pieces);
    else
      some(weight_product(count, f.hidden, f.width, d_y, inner.inner, f.d_down, add),
           piece - 2 * hidden_pieces);
  };

  puna::Pieces pieces;
  puna::parallel(threads, [&](int thread, int present) {
    float* const room = rooms.get() + thread * ROOM;
    for (int64_t part = 0; part < parts; ++part) {
      const Range rows = share(f.rows, static_cast<int>(part), static_cast<int>(parts));
      const int64_t count = rows.end - rows.begin;
      pieces.each(present, pieces_of(count, each), [&](int64_t i) {
        const int64_t first = i * each, at = first * f.hidden;
        rows_gradient(f, rows.begin + first, std::min(each, count - first),
                      {inner.gates + at, inner.ups + at, inner.inner + at}, room);
      });
      pieces.each(present, 2 * hidden_pieces + width_pieces,
                  [&](int64_t i) { weights_gradient(i, rows, room); });
    }
  });
}

}  // namespace PUNA_ISA
