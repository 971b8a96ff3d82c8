// Products of int8: weights packed in panels, activations rounded to int8 before each product.
#pragma once

#include "base/buffer.h"
#include "base/simd.h"
#include "base/tile.h"

namespace PUNA_ISA {

constexpr int QUANT_GROUP = 32;  // inputs that share a scale, for each output

// A panel is groups of (QUANT_GROUP / 4, PANEL_WIDTH, 4) bytes, each 128 more than its number, and
// (PANEL_WIDTH) fp32 scales.
constexpr int64_t QUANT_GROUP_BYTES = QUANT_GROUP * PANEL_WIDTH + PANEL_WIDTH * sizeof(float);

// Calls use(i, integer) for each of `count` numbers of a group, where they are not all 0; returns
// the group's scale.
template <typename Use>
inline float round_group(const float* numbers, int64_t count, Use use) {
  float max_abs = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    max_abs = std::max(max_abs, std::fabs(numbers[i]));
    finite = finite && std::isfinite(numbers[i]);
  }
  // A number that is not finite makes its whole group NaN, so that the error shows.
  const float scale = finite ? max_abs / 127.0f : NAN;
  for (int64_t i = 0; i < count && scale > 0.0f; ++i) {
    const float rounded = std::nearbyint(numbers[i] / scale);
    use(i, static_cast<int>(std::fmin(std::fmax(rounded, -127.0f), 127.0f)));
  }
  return scale;
}

// Writes weights (in) as output `column` of a panel.
inline void quantize_row(const float* weights, int64_t in, uint8_t* panel, int64_t column) {
  for (int64_t begin = 0; begin < in; begin += QUANT_GROUP, panel += QUANT_GROUP_BYTES) {
    const int64_t count = std::min<int64_t>(QUANT_GROUP, in - begin);
    const float scale = round_group(weights + begin, count, [&](int64_t i, int integer) {
      panel[(i / 4 * PANEL_WIDTH + column) * 4 + i % 4] = static_cast<uint8_t>(integer + 128);
    });
    reinterpret_cast<float*>(panel + QUANT_GROUP * PANEL_WIDTH)[column] = scale;
  }
}

// Rows of activations as integers of -127 to 127, in groups with one scale each.
struct QuantizedRows {
  static constexpr int QUADS = QUANT_GROUP / 4;  // of a group

  Quad* quads;       // (rows, groups, QUADS)
  int32_t* offsets;  // (rows, groups): -128 times the sum, which undoes the weights' added 128
  float* scales;     // (rows, groups)
  int64_t groups;

  static int64_t group_count(int64_t in) { return ceil_div(in, QUANT_GROUP); }
  static int64_t quad_floats(int64_t rows, int64_t in) {
    return rows * group_count(in) * QUADS * static_cast<int64_t>(sizeof(Quad) / sizeof(float));
  }
  static int64_t floats_needed(int64_t rows, int64_t in) {
    return quad_floats(rows, in) + 2 * rows * group_count(in);
  }

  QuantizedRows(float* memory, int64_t rows, int64_t in)
      : quads(reinterpret_cast<Quad*>(memory)),
        offsets(reinterpret_cast<int32_t*>(memory + quad_floats(rows, in))),
        scales(memory + quad_floats(rows, in) + rows * group_count(in)),
        groups(group_count(in)) {}

  void quantize(const float* x, int64_t rows, int64_t in) {
    for (int64_t row = 0, group = 0; row < rows; ++row)
      for (int64_t begin = 0; begin < in; begin += QUANT_GROUP, ++group) {
        float padded[QUANT_GROUP] = {};
        const bool whole = begin + QUANT_GROUP <= in;
        if (!whole) std::memcpy(padded, x + row * in + begin, (in - begin) * sizeof(float));
        quantize_group(whole ? x + row * in + begin : padded, group);
      }
  }

 private:
  void quantize_group(const float* x, int64_t group) {
    ivec largest = {};  // the bits of a magnitude are in its order, and those of inf and NaN above
    for (int i = 0; i < QUANT_GROUP; i += W) {
      const ivec bits = (ivec)load(x + i) & 0x7FFFFFFF;
      largest = bits > largest ? bits : largest;
    }
    const int32_t bits = reduce(largest, [](auto a, auto b) { return a > b ? a : b; });
    float max_abs;
    std::memcpy(&max_abs, &bits, sizeof bits);
    const float scale = bits < 0x7F800000 ? max_abs / 127.0f : NAN;
    const vec factor = broadcast(scale > 0.0f ? 1.0f / scale : 0.0f);
    ivec total = {};
    for (int i = 0; i < QUANT_GROUP; i += W) {
      // The bound first: it is what comes of NaN, which is no integer. The scale still says NaN.
      const vec clamped = max(min(broadcast(127.0f), load(x + i) * factor), broadcast(-127.0f));
      const vec half = select(clamped < 0.0f, broadcast(-0.5f), broadcast(0.5f));
      const ivec n = __builtin_convertvector(clamped + half, ivec);
      store(quads + group * QUADS + i / 4, n);
      total += n;
    }
    offsets[group] = -128 * reduce(total, [](auto a, auto b) { return a + b; });
    scales[group] = scale;
  }
};

// tile (ROWS, PANEL_WIDTH) = rows of x from `row` on, times one panel. Inside a group the sums are
// integers, exact.
template <int ROWS>
inline void multiply_tile_int8(const QuantizedRows& x, int64_t row, const uint8_t* panel,
                               float* tile) {
  vec sums[ROWS][2];
  clear(sums);
  for (int64_t g = 0; g < x.groups; ++g, panel += QUANT_GROUP_BYTES) {
    ivec left[ROWS], right[ROWS];
    const Quad* quads[ROWS];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      const int64_t group = (row + m) * x.groups + g;
      left[m] = right[m] = x.offsets[group] - ivec{};
      quads[m] = x.quads + group * x.QUADS;
    }
    // One row of weights from memory: 60 to 71 GOP/s where an unrolled loop had 57 to 61.
#pragma GCC unroll 1
    for (int quad = 0; quad < x.QUADS; ++quad) {
      ivec a, b;
      std::memcpy(&a, panel + quad * PANEL_WIDTH * 4, sizeof a);
      std::memcpy(&b, panel + (quad * PANEL_WIDTH + W) * 4, sizeof b);
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; ++m) {
        left[m] = dot4(left[m], a, quads[m][quad]);
        right[m] = dot4(right[m], b, quads[m][quad]);
      }
    }
    const auto* scales = reinterpret_cast<const float*>(panel + QUANT_GROUP * PANEL_WIDTH);
    const vec a = load(scales), b = load(scales + W);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      const vec scale = broadcast(x.scales[(row + m) * x.groups + g]);
      sums[m][0] += __builtin_convertvector(left[m], vec) * (scale * a);
      sums[m][1] += __builtin_convertvector(right[m], vec) * (scale * b);
    }
  }
  store_tile(sums, tile, PANEL_WIDTH, false);
}

}  // namespace PUNA_ISA
