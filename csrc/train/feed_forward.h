// A whole gated feed-forward layer.
#pragma once

#include <cstdint>

namespace puna {

// y = down (silu(gate x) * up x); all matrices are contiguous.
struct FeedForward {
  int64_t rows, width, hidden;
  const float *x, *gate, *up, *down;  // (rows, width), (hidden, width) twice, (width, hidden)
  float *gates, *ups;                 // gate x and up x (rows, hidden); or null
  float* y;                           // (rows, width)
  bool bf16;                          // the operands of the products are rounded to bf16
};

struct FeedForwardGradient {
  int64_t rows, width, hidden;
  const float *x, *gate, *up, *down, *gates, *ups, *d_y;
  float *d_x, *d_gate, *d_up, *d_down;
  bool bf16;
};

}  // namespace puna
