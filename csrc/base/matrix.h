// Products with a weight matrix that was packed once: y = x W^T for a few rows of x.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "base/simd.h"
#include "decode/engine.h"

namespace PUNA_ISA {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

// Large buffers ask for large pages: 60 MB were read at 56 GB/s instead of 38.
inline Buffer buffer(int64_t count) {
  constexpr size_t page = 2 << 20;
  const size_t wanted = static_cast<size_t>(std::max<int64_t>(count, 1)) * 4;
  const size_t unit = wanted < page ? 64 : page;
  const size_t bytes = (wanted + unit - 1) / unit * unit;
  auto* p = static_cast<float*>(std::aligned_alloc(unit, bytes));
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (unit == page) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Buffer(p);
}

using puna::Format;

constexpr int PANEL = 2 * W;               // output columns computed together
constexpr int TALLEST = W == 16 ? 12 : 6;  // rows together: 24 (12) accumulators fit the registers
constexpr int GROUP = 32;                  // int8: inputs that share a scale, for each output

// A matrix (out, in) as panels of PANEL outputs, to be read from front to back, once. A panel is
// (in, PANEL) numbers; of int8, groups of (GROUP / 4, PANEL, 4) bytes, each 128 more than the
// number, and (PANEL) fp32 scales.
class Matrix {
 public:
  int64_t in = 0, out = 0, panels = 0;
  Format format = Format::fp32;

  Matrix() = default;
  Matrix(int64_t in, int64_t out, Format format)
      : in(in), out(out), panels((out + PANEL - 1) / PANEL), format(format) {}

  int64_t bytes() const { return panels * panel_bytes(); }
  const uint8_t* panel(int64_t p) const { return data_ + p * panel_bytes(); }

  // `bytes` of somebody else's memory, aligned to 64.
  void place(uint8_t* data) {
    data_ = data;
    std::memset(data_, 0, bytes());
  }

  // Rows `first`.. of the matrix from `weights` (count, in).
  void fill(const float* weights, int64_t first, int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      const int64_t at = first + row;
      fill_row(weights + row * in, data_ + at / PANEL * panel_bytes(), at % PANEL);
    }
  }

  static constexpr int64_t GROUP_BYTES = GROUP * PANEL + PANEL * sizeof(float);

 private:
  int64_t panel_bytes() const {
    switch (format) {
      case Format::fp32: return in * PANEL * 4;
      case Format::bf16: return in * PANEL * 2;
      default: return (in + GROUP - 1) / GROUP * GROUP_BYTES;
    }
  }

  void fill_row(const float* weights, uint8_t* panel, int64_t column) const {
    if (format == Format::int8) return fill_int8(weights, panel, column);
    for (int64_t i = 0; i < in; ++i) {
      const int64_t at = i * PANEL + column;
      if (format == Format::fp32)
        reinterpret_cast<float*>(panel)[at] = weights[i];
      else
        reinterpret_cast<uint16_t*>(panel)[at] = to_bf16(weights[i]);
    }
  }

  static uint16_t to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return 0x7FC0;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // ties to even
  }

  void fill_int8(const float* weights, uint8_t* panel, int64_t column) const {
    for (int64_t begin = 0; begin < in; begin += GROUP, panel += GROUP_BYTES) {
      const int64_t count = std::min<int64_t>(GROUP, in - begin);
      float most = 0.0f;
      bool finite = true;
      for (int64_t i = begin; i < begin + count; ++i) {
        most = std::max(most, std::fabs(weights[i]));
        finite = finite && std::isfinite(weights[i]);
      }
      // What is not finite makes its whole group NaN: it must not pass for a number.
      const float scale = finite ? most / 127.0f : NAN;
      for (int64_t i = 0; i < count && scale > 0.0f; ++i) {
        const float whole = std::nearbyint(weights[begin + i] / scale);
        const float clamped = std::fmin(std::fmax(whole, -127.0f), 127.0f);
        panel[(i / 4 * PANEL + column) * 4 + i % 4] = static_cast<uint8_t>(clamped + 128.0f);
      }
      reinterpret_cast<float*>(panel + GROUP * PANEL)[column] = scale;
    }
  }

  uint8_t* data_ = nullptr;
};

// tile (ROWS, PANEL) = x (ROWS, in) times one panel. The inputs are summed in their order whatever
// the number of rows: a row's result does not depend on the others.
template <Format F, int ROWS>
inline void multiply_tile(const float* x, int64_t stride, const uint8_t* w, int64_t in,
                          float* tile) {
  vec left[ROWS], right[ROWS];
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; ++m) left[m] = right[m] = vec{};
  const auto add = [&](int64_t k, vec a, vec b) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int m = 0; m < ROWS; ++m) {
      const vec value = all(x[m * stride + k]);
      left[m] += value * a;
      right[m] += value * b;
    }
  };
  if constexpr (F == Format::fp32) {
    const auto* from = reinterpret_cast<const float*>(w);
    for (int64_t k = 0; k < in; ++k, from += PANEL) add(k, load(from), load(from + W));
  } else {
    const auto* from = reinterpret_cast<const uint16_t*>(w);
    for (int64_t k = 0; k < in; ++k, from += PANEL) add(k, load_bf16(from), load_bf16(from + W));
  }
#pragma GCC unroll 12
  for (int m = 0; m < ROWS; ++m) {
    store(tile + m * PANEL, left[m]);
    store(tile + m * PANEL + W, right[m]);
  }
}

// Rows of activations in whole numbers of -127 to 127, GROUP of them with a scale.
struct Quantised {
  int32_t* pairs;  // (rows, groups, GROUP / 4, 2) as `dot4` wants them
  int32_t* start;  // (rows, groups): -128 times the sum, what the weights' 128 adds too much
  float* scales;   // (rows, groups)
  int64_t groups;

  static int64_t groups_of(int64_t in) { return (in + GROUP - 1) / GROUP; }
  static int64_t words(int64_t rows, int64_t in) { return rows * groups_of(in) * (GROUP / 2 + 2); }

  Quantised(float* memory, int64_t rows, int64_t in)
      : pairs(reinterpret_cast<int32_t*>(memory)),
        start(pairs + rows * groups_of(in) * (GROUP / 2)),
        scales(memory + rows * groups_of(in) * (GROUP / 2 + 1)),
        groups(groups_of(in)) {}

  void fill(const float* x, int64_t rows, int64_t in) {
    for (int64_t at = 0; at < rows * groups; ++at) {
      const int64_t begin = at % groups * GROUP;
      fill_group(x + at / groups * in + begin, std::min<int64_t>(GROUP, in - begin), at);
    }
  }

 private:
  void fill_group(const float* x, int64_t count, int64_t at) {
    float held[GROUP] = {};
    std::memcpy(held, x, count * sizeof(float));
    vec most = {}, odd = {};
    for (int i = 0; i < GROUP; i += W) {
      const vec v = load(held + i);
      most = max(most, max(v, -v));
      odd += v * 0.0f;  // NaN where a number is not finite
    }
    const float scale = largest(most) / 127.0f + sum(odd);
    const vec factor = all(scale > 0.0f ? 1.0f / scale : 0.0f);
    int32_t whole[GROUP];
    int32_t total = 0;
    for (int i = 0; i < GROUP; i += W) {
      const vec rounded = max(min(load(held + i) * factor, all(127.0f)), all(-127.0f));
      const ivec n =
          __builtin_convertvector(rounded + select(rounded < 0.0f, all(-0.5f), all(0.5f)), ivec);
      std::memcpy(whole + i, &n, sizeof n);
    }
    for (int i = 0; i < GROUP; ++i) total += whole[i];
    int32_t* to = pairs + at * (GROUP / 2);
    for (int i = 0; i < GROUP; i += 4, to += 2)
      for (int j = 0; j < 2; ++j)
        to[j] = (whole[i + j] & 0xFFFF) |
                static_cast<int32_t>(static_cast<uint32_t>(whole[i + j + 2]) << 16);
    start[at] = -128 * total;
    scales[at] = scale;
  }
};

// The same for a panel of int8, with whole numbers summed inside a group.
template <int ROWS>
inline void multiply_tile_int8(const Quantised& x, int64_t row, const uint8_t* w, float* tile) {
  vec left[ROWS], right[ROWS];
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; ++m) left[m] = right[m] = vec{};
  for (int64_t g = 0; g < x.groups; ++g, w += Matrix::GROUP_BYTES) {
    ivec l[ROWS], r[ROWS];
    const int32_t* pairs[ROWS];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      const int64_t at = (row + m) * x.groups + g;
      l[m] = r[m] = x.start[at] - ivec{};
      pairs[m] = x.pairs + at * (GROUP / 2);
    }
    for (int quad = 0; quad < GROUP / 4; ++quad) {
      ivec a, b;
      std::memcpy(&a, w + quad * PANEL * 4, sizeof a);
      std::memcpy(&b, w + (quad * PANEL + W) * 4, sizeof b);
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; ++m) {
        const int32_t even = pairs[m][2 * quad], odd = pairs[m][2 * quad + 1];
        l[m] = dot4(l[m], a, even, odd);
        r[m] = dot4(r[m], b, even, odd);
      }
    }
    const auto* scales = reinterpret_cast<const float*>(w + GROUP * PANEL);
    const vec a = load(scales), b = load(scales + W);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      const vec scale = all(x.scales[(row + m) * x.groups + g]);
      left[m] += __builtin_convertvector(l[m], vec) * (scale * a);
      right[m] += __builtin_convertvector(r[m], vec) * (scale * b);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; ++m) {
    store(tile + m * PANEL, left[m]);
    store(tile + m * PANEL + W, right[m]);
  }
}

// Calls the function made for a number of rows that is known only now: 1 to MOST.
template <int MOST, typename Use>
inline void with_rows(int rows, Use use) {
  if constexpr (MOST > 1)
    if (rows < MOST) return with_rows<MOST - 1>(rows, use);
  use(std::integral_constant<int, MOST>());
}

// Rows (rows, in) that are to be multiplied, in the form that a format of weights wants.
struct Input {
  const float* x;
  Quantised quantised;
};

// `memory`: Quantised::words(rows, w.in) floats, for int8.
inline Input input_of(const Matrix& w, const float* x, int64_t rows, float* memory) {
  Input input{x, Quantised(memory, rows, w.in)};
  if (w.format == Format::int8) input.quantised.fill(x, rows, w.in);
  return input;
}

inline int tallest(const Matrix& w) { return w.format == Format::int8 ? TALLEST / 2 : TALLEST; }

// tile (rows, PANEL) = rows `first`.. of the input times a panel of w.
inline void multiply(const Matrix& w, int64_t panel, const Input& input, int64_t first, int rows,
                     float* tile) {
  const float* x = input.x + first * w.in;
  const uint8_t* from = w.panel(panel);
  if (w.format == Format::int8)
    with_rows<TALLEST / 2>(
        rows, [&](auto n) { multiply_tile_int8<n>(input.quantised, first, from, tile); });
  else if (w.format == Format::bf16)
    with_rows<TALLEST>(rows,
                       [&](auto n) { multiply_tile<Format::bf16, n>(x, w.in, from, w.in, tile); });
  else
    with_rows<TALLEST>(rows,
                       [&](auto n) { multiply_tile<Format::fp32, n>(x, w.in, from, w.in, tile); });
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
inline void product(const Matrix& w, const Input& x, int64_t rows, Range panels, Use use) {
  if (rows == 0) return;
  const int64_t cuts = (rows + tallest(w) - 1) / tallest(w);
  alignas(64) float tile[TALLEST * PANEL];
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const int64_t columns = std::min<int64_t>(PANEL, w.out - p * PANEL);
    for (int64_t cut = 0; cut < cuts; ++cut) {
      const int64_t first = rows * cut / cuts, count = rows * (cut + 1) / cuts - first;
      multiply(w, p, x, first, static_cast<int>(count), tile);
      use(first, count, p * PANEL, columns, tile);
    }
  }
}

}  // namespace PUNA_ISA
