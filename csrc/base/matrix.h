// Products with a weight matrix that is packed once: y = x W^T for a few rows of x.
#pragma once

#include "base/buffer.h"
#include "base/int8.h"
#include "base/simd.h"
#include "base/tile.h"
#include "base/weight_format.h"

namespace PUNA_ISA {

using puna::WeightFormat;

// A matrix (out, in) packed in panels of PANEL_WIDTH outputs, which are read once, from front to
// back. A panel of fp32 is (in, PANEL_WIDTH), of bf16 (pairs, PANEL_WIDTH); int8.h describes one of
// int8.
class PackedMatrix {
 public:
  int64_t in = 0, out = 0, panels = 0;
  WeightFormat format = WeightFormat::fp32;

  PackedMatrix() = default;
  PackedMatrix(int64_t in, int64_t out, WeightFormat format)
      : in(in), out(out), panels(ceil_div(out, PANEL_WIDTH)), format(format) {}

  int64_t bytes() const { return panels * panel_bytes(); }
  const uint8_t* panel(int64_t p) const { return data_ + p * panel_bytes(); }

  // The matrix lives in `data`: bytes() of the caller's memory, aligned to 64.
  void set_memory(uint8_t* data) {
    data_ = data;
    std::memset(data_, 0, bytes());
  }

  // Packs `weights` (count, in) as the rows from `first` on.
  void pack(const float* weights, int64_t first, int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t output = first + row;
      pack_row(weights + row * in, data_ + output / PANEL_WIDTH * panel_bytes(),
               output % PANEL_WIDTH);
    }
  }

 private:
  int64_t panel_bytes() const {
    switch (format) {
      case WeightFormat::fp32: return in * PANEL_WIDTH * 4;
      case WeightFormat::bf16: return pairs_of(in) * PANEL_WIDTH * 4;
      default: return ceil_div(in, QUANT_GROUP) * QUANT_GROUP_BYTES;
    }
  }

  void pack_row(const float* weights, uint8_t* panel, int64_t column) const {
    if (format == WeightFormat::int8) return quantize_row(weights, in, panel, column);
    if (format == WeightFormat::fp32)
      for (int64_t i = 0; i < in; ++i)
        reinterpret_cast<float*>(panel)[i * PANEL_WIDTH + column] = weights[i];
    else
      for (int64_t i = 0; i < in; i += 2)
        reinterpret_cast<Pair*>(panel)[i / 2 * PANEL_WIDTH + column] =
            to_pair(weights[i], i + 1 < in ? weights[i + 1] : 0.0f);
  }

  uint8_t* data_ = nullptr;
};

// Rows of activations (rows, in), or what they were rounded to for the format of the weights.
struct PanelInput {
  const float* x;
  const Pair* pairs;  // (rows, pairs)
  QuantizedRows quantized;
};

// Floats that `prepare_input` needs to round in.
inline int64_t rounding_room(WeightFormat format, int64_t rows, int64_t in) {
  switch (format) {
    case WeightFormat::fp32: return 0;
    case WeightFormat::bf16: return MULTIPLIES_PAIRS ? rows * pairs_of(in) : 0;
    default: return QuantizedRows::floats_needed(rows, in);
  }
}

inline PanelInput prepare_input(const PackedMatrix& w, const float* x, int64_t rows, float* room) {
  auto* pairs = reinterpret_cast<Pair*>(room);
  PanelInput input{x, pairs, QuantizedRows(room, rows, w.in)};
  if (w.format == WeightFormat::int8) input.quantized.quantize(x, rows, w.in);
  if (w.format == WeightFormat::bf16 && MULTIPLIES_PAIRS)
    for (int64_t row = 0; row < rows; ++row)
      round_row(x + row * w.in, w.in, pairs + row * pairs_of(w.in));
  return input;
}

// tile (ROWS, PANEL_WIDTH) = x (ROWS, in) times one panel of fp32, or of bf16 where both are pairs.
// The inputs are summed in chains for any number of rows: a row's result does not depend on the
// others.
template <typename Number, int ROWS>
inline void multiply_tile(const Number* x, int64_t in, const uint8_t* panel, float* tile) {
  const auto* weights = reinterpret_cast<const Number*>(panel);
  for (int64_t first = 0; first < in; first += CHAIN) {
    vec sums[ROWS][2];
    clear(sums);
    multiply_add(sums, x + first, in, 1, weights + first * PANEL_WIDTH, PANEL_WIDTH,
                 std::min(CHAIN, in - first));
    store_tile(sums, tile, PANEL_WIDTH, first > 0);
  }
}

// The same of floats and a panel of bf16.
template <int ROWS>
inline void multiply_tile_widened(const float* x, int64_t in, const uint8_t* panel, float* tile) {
  const auto* weights = reinterpret_cast<const Pair*>(panel);
  for (int64_t first = 0; first < in; first += CHAIN) {
    vec sums[ROWS][2];
    clear(sums);
    multiply_add_widened(sums, x + first, in, weights + first / 2 * PANEL_WIDTH, PANEL_WIDTH,
                         std::min(CHAIN, in - first));
    store_tile(sums, tile, PANEL_WIDTH, first > 0);
  }
}

inline int max_tile_rows(const PackedMatrix& w) {
  return w.format == WeightFormat::int8 ? MAX_TILE_ROWS / 2 : MAX_TILE_ROWS;
}

// tile (rows, PANEL_WIDTH) = the rows of the input from `first` on, times a panel of w.
inline void multiply_panel(const PackedMatrix& w, int64_t panel, const PanelInput& input,
                           int64_t first, int rows, float* tile) {
  const float* x = input.x + first * w.in;
  const uint8_t* packed = w.panel(panel);
  if (w.format == WeightFormat::int8)
    dispatch_rows<MAX_TILE_ROWS / 2>(
        rows, [&](auto n) { multiply_tile_int8<n>(input.quantized, first, packed, tile); });
  else if (w.format == WeightFormat::bf16)
    dispatch_rows<MAX_TILE_ROWS>(rows, [&](auto n) {
      const int64_t pairs = pairs_of(w.in);
      if constexpr (MULTIPLIES_PAIRS)
        multiply_tile<Pair, n>(input.pairs + first * pairs, pairs, packed, tile);
      else
        multiply_tile_widened<n>(x, w.in, packed, tile);
    });
  else
    dispatch_rows<MAX_TILE_ROWS>(rows,
                                 [&](auto n) { multiply_tile<float, n>(x, w.in, packed, tile); });
}

// A tile of a product: its place in the result, and its numbers (rows, PANEL_WIDTH).
struct Tile {
  int64_t first_row, rows, first_column, columns;
  float* data;
};

inline void add_bias(const Tile& tile, const float* bias) {
  for (int64_t m = 0; m < tile.rows; ++m)
    for (int64_t j = 0; j < tile.columns; ++j) tile.data[m * PANEL_WIDTH + j] += bias[j];
}

// Into y (rows, width), or added to it.
template <bool ADD>
inline void store_columns(const Tile& tile, const float* data, float* y, int64_t width) {
  for (int64_t m = 0; m < tile.rows; ++m) {
    float* row = y + (tile.first_row + m) * width + tile.first_column;
    if constexpr (ADD)
      for (int64_t j = 0; j < tile.columns; ++j) row[j] += data[m * PANEL_WIDTH + j];
    else
      std::memcpy(row, data + m * PANEL_WIDTH, tile.columns * sizeof(float));
  }
}

// Calls use(tile) for each tile of x (rows, in) W^T in `panels`. Rows are split evenly, so that no
// tile is much smaller than the others.
template <typename Use>
inline void for_each_tile(const PackedMatrix& w, const PanelInput& x, int64_t rows, Range panels,
                          Use use) {
  if (rows == 0) return;
  const int blocks = static_cast<int>(ceil_div(rows, max_tile_rows(w)));
  alignas(64) float tile[MAX_TILE_ROWS * PANEL_WIDTH];
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int64_t columns = std::min<int64_t>(PANEL_WIDTH, w.out - p * PANEL_WIDTH);
    for (int block = 0; block < blocks; ++block) {
      const Range range = split(rows, block, blocks);
      const int64_t count = range.end - range.begin;
      multiply_panel(w, p, x, range.begin, static_cast<int>(count), tile);
      use(Tile{range.begin, count, p * PANEL_WIDTH, columns, tile});
    }
  }
}

}  // namespace PUNA_ISA
