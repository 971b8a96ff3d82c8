// Causal attention inside segments of a flat batch, fp32: (N, H, D) with keys and values (N, K, D).
#pragma once

#include <cstdint>

namespace puna {

struct Attention {
  int64_t heads, kv_heads, head_dim;
  int64_t segments;
  const int64_t* cu_seqlens;  // (segments + 1): where the segments begin and end
  float scale;                // > 0
  const float *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // from one token to the next; heads are contiguous
  float* out;                            // (N, H, D), contiguous
  float* lse;                            // (N, H): log of the sum of e^score; or null
  bool bf16;  // the operands of the products are rounded to bf16, if the instruction set can
};

// dq, dk and dv are contiguous (N, H, D), (N, K, D) and (N, K, D); they are written, not added to.
struct AttentionBackward {
  Attention of;  // its out and lse are read
  const float* d_out;
  int64_t d_out_stride;
  float *dq, *dk, *dv;
};

}  // namespace puna
