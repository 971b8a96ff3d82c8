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
  int32_t* pairs;    // (rows, groups, QUANT_GROUP / 4, 2), in the order that `dot4` reads
  int32_t* offsets;  // (rows, groups): -128 times the sum, which undoes the weights' added 128
  float* scales;     // (rows, groups)
  int64_t groups;

  static int64_t group_count(int64_t in) { return ceil_div(in, QUANT_GROUP); }
  static int64_t floats_needed(int64_t rows, int64_t in) {
    return rows * group_count(in) * (QUANT_GROUP / 2 + 2);
  }

  QuantizedRows(float* memory, int64_t rows, int64_t in)
      : pairs(reinterpret_cast<int32_t*>(memory)),
        offsets(pairs + rows * group_count(in) * (QUANT_GROUP / 2)),
        scales(memory + rows * group_count(in) * (QUANT_GROUP / 2 + 1)),
        groups(group_count(in)) {}

  void quantize(const float* x, int64_t rows, int64_t in) {
    for (int64_t group = 0; group < rows * groups; ++group) {
      const int64_t begin = group % groups * QUANT_GROUP;
      quantize_group(x + group / groups * in + begin, std::min<int64_t>(QUANT_GROUP, in - begin),
                     group);
    }
  }

 private:
  void quantize_group(const float* x, int64_t count, int64_t group) {
    float padded[QUANT_GROUP] = {};
    std::memcpy(padded, x, count * sizeof(float));
    vec max_abs = {}, not_finite = {};
    for (int i = 0; i < QUANT_GROUP; i += W) {
      const vec v = load(padded + i);
      max_abs = max(max_abs, max(v, -v));
      not_finite += v * 0.0f;  // NaN where a number is not finite
    }
    const float scale = reduce_max(max_abs) / 127.0f + reduce_sum(not_finite);
    const vec factor = broadcast(scale > 0.0f ? 1.0f / scale : 0.0f);
    int32_t integers[QUANT_GROUP];
    int32_t total = 0;
    for (int i = 0; i < QUANT_GROUP; i += W) {
      // The bound first: it is what comes of NaN, which is no integer. The scale still says NaN.
      const vec clamped =
          max(min(broadcast(127.0f), load(padded + i) * factor), broadcast(-127.0f));
      const vec half = select(clamped < 0.0f, broadcast(-0.5f), broadcast(0.5f));
      const ivec n = __builtin_convertvector(clamped + half, ivec);
      std::memcpy(integers + i, &n, sizeof n);
    }
    for (int i = 0; i < QUANT_GROUP; ++i) total += integers[i];
    int32_t* to = pairs + group * (QUANT_GROUP / 2);
    for (int i = 0; i < QUANT_GROUP; i += 4, to += 2)
      for (int j = 0; j < 2; ++j)
        to[j] = (integers[i + j] & 0xFFFF) |
                static_cast<int32_t>(static_cast<uint32_t>(integers[i + j + 2]) << 16);
    offsets[group] = -128 * total;
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
    const int32_t* pairs[ROWS];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      const int64_t group = (row + m) * x.groups + g;
      left[m] = right[m] = x.offsets[group] - ivec{};
      pairs[m] = x.pairs + group * (QUANT_GROUP / 2);
    }
    for (int quad = 0; quad < QUANT_GROUP / 4; ++quad) {
      ivec a, b;
      std::memcpy(&a, panel + quad * PANEL_WIDTH * 4, sizeof a);
      std::memcpy(&b, panel + (quad * PANEL_WIDTH + W) * 4, sizeof b);
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; ++m) {
        const int32_t even = pairs[m][2 * quad], odd = pairs[m][2 * quad + 1];
        left[m] = dot4(left[m], a, even, odd);
        right[m] = dot4(right[m], b, even, odd);
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
