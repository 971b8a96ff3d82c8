// Products with a weight matrix that was packed once: y = x W^T for a few rows of x.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "simd.h"

namespace PUNA_ISA {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

inline Buffer buffer(int64_t count) {
  const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * 4 + 63) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (!p) throw std::bad_alloc();
  return Buffer(p);
}

constexpr int PANEL = 2 * W;                // output columns computed together
constexpr int TALLEST = W == 16 ? 12 : 6;   // rows together: 24 (12) accumulators fit the registers

// (out, in) as panels of PANEL outputs, each (in, PANEL): read from front to back, once.
struct Matrix {
  int64_t in = 0, out = 0, panels = 0;
  Buffer data;

  Matrix() = default;
  Matrix(int64_t in, int64_t out)
      : in(in), out(out), panels((out + PANEL - 1) / PANEL), data(buffer(panels * PANEL * in)) {
    std::fill_n(data.get(), panels * PANEL * in, 0.0f);
  }

  // Rows `first`.. of the matrix from `weights` (count, in).
  void fill(const float* weights, int64_t first, int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t at = first + row;
      float* to = data.get() + (at / PANEL) * in * PANEL + at % PANEL;
      for (int64_t i = 0; i < in; ++i) to[i * PANEL] = weights[row * in + i];
    }
  }

  const float* panel(int64_t p) const { return data.get() + p * in * PANEL; }
};

// tile (ROWS, PANEL) = x (ROWS, in) times one panel.
template <int ROWS>
inline void multiply_tile(const float* x, int64_t stride, const float* w, int64_t in, float* tile) {
  vec left[ROWS], right[ROWS];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; ++m) left[m] = right[m] = vec{};
  for (int64_t k = 0; k < in; ++k, w += PANEL) {
    const vec a = load(w), b = load(w + W);
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) {
      const vec value = all(x[m * stride + k]);
      left[m] += value * a;
      right[m] += value * b;
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; ++m) {
    store(tile + m * PANEL, left[m]);
    store(tile + m * PANEL + W, right[m]);
  }
}

inline void multiply(int rows, const float* x, int64_t stride, const float* w, int64_t in,
                     float* tile) {
  switch (rows) {
    case 1: return multiply_tile<1>(x, stride, w, in, tile);
    case 2: return multiply_tile<2>(x, stride, w, in, tile);
    case 3: return multiply_tile<3>(x, stride, w, in, tile);
    case 4: return multiply_tile<4>(x, stride, w, in, tile);
    case 5: return multiply_tile<5>(x, stride, w, in, tile);
    case 6: return multiply_tile<6>(x, stride, w, in, tile);
    default: break;
  }
  if constexpr (TALLEST > 6) {
    switch (rows) {
      case 7: return multiply_tile<7>(x, stride, w, in, tile);
      case 8: return multiply_tile<8>(x, stride, w, in, tile);
      case 9: return multiply_tile<9>(x, stride, w, in, tile);
      case 10: return multiply_tile<10>(x, stride, w, in, tile);
      case 11: return multiply_tile<11>(x, stride, w, in, tile);
      default: return multiply_tile<12>(x, stride, w, in, tile);
    }
  }
}

// A part of the outputs, or of the rows, that one thread takes.
struct Range {
  int64_t begin, end;
};

inline Range share(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

// Calls use(first row, rows, first column, columns, tile) for each tile of x (rows, in) W^T in
// `panels`. Rows are cut evenly, so that no tile is much smaller than the others.
template <typename Use>
inline void product(const Matrix& w, const float* x, int64_t rows, Range panels, Use use) {
  if (rows == 0) return;
  const int64_t cuts = (rows + TALLEST - 1) / TALLEST;
  alignas(64) float tile[TALLEST * PANEL];
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int64_t columns = std::min<int64_t>(PANEL, w.out - p * PANEL);
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t first = rows * cut / cuts, count = rows * (cut + 1) / cuts - first;
      multiply(static_cast<int>(count), x + first * w.in, w.in, w.panel(p), w.in, tile);
      use(first, count, p * PANEL, columns, tile);
    }
  }
}

}  // namespace PUNA_ISA
