// What a training step computes between its matrix products. All of it is fp32; rows are
// contiguous, except for the heads that are rotated.
#pragma once

#include <cstdint>

namespace puna {

// y = x * scale * weight, with scale = 1 / sqrt(mean(x^2) + eps) for each row.
struct RMSNorm {
  int64_t rows, width;
  const float *x, *weight;  // (rows, width), (width)
  float eps;
  float *y, *scale;  // (rows, width), (rows)
};

struct RMSNormGradient {
  int64_t rows, width;
  const float *x, *weight, *scale, *d_y;
  float *d_x, *d_weight;
  float* partial;  // (threads, 2, width): workspace; each thread's share of d_weight
};

// y = gate * sigmoid(gate) * up, element by element.
struct SwiGLU {
  int64_t count;
  const float *gate, *up;
  float* y;
};

struct SwiGLUGradient {
  int64_t count;
  const float *gate, *up, *d_y;
  float *d_gate, *d_up;
  float* y;  // if not null: the forward's result, computed again
};

// x (batch, tokens, heads, 2 * half) with these strides, rotated into a contiguous y.
struct Heads {
  int64_t heads, batch_stride, token_stride, head_stride;
  const float* x;
  float* y;
};

// Elements i and i + half of each head are rotated by the angle i of its token.
struct Rope {
  int64_t batch, tokens, half;
  Heads q, k;
  const float *cos, *sin;  // of token t of row b at b * angle_batch_stride + t * angle_stride
  int64_t angle_batch_stride, angle_stride;
  float direction;  // 1, or -1 for the inverse rotation
};

}  // namespace puna
