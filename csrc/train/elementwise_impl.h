// Norms, rotations and gates, forward and backward.
#pragma once

#include "base/layers.h"
#include "base/simd.h"
#include "base/standard.h"
#include "train/elementwise.h"

namespace PUNA_ISA {

// With fewer elements, some 5 us of work, one thread does it all: waking the others takes as long.
constexpr int64_t PARALLEL_THRESHOLD = 1 << 14;

// Calls work(begin, end) with each thread's share of `count` elements, in whole vectors.
template <typename Work>
inline void parallel_elements(int64_t count, int threads, Work work) {
  const int64_t vectors = (count + W - 1) / W;
  puna::parallel(count < PARALLEL_THRESHOLD ? 1 : threads, [&](int part, int parts) {
    work(vectors * part / parts * W, std::min(count, vectors * (part + 1) / parts * W));
  });
}

inline void rms_norm(const puna::RMSNorm& a, int threads) {
  puna::parallel(a.rows * a.width < PARALLEL_THRESHOLD ? 1 : threads, [&](int part, int parts) {
    for (int64_t row = a.rows * part / parts; row < a.rows * (part + 1) / parts; ++row)
      a.scale[row] =
          rms_norm_row(a.x + row * a.width, a.weight, a.width, a.eps, a.y + row * a.width);
  });
}

// d_x of N rows. What they add to d_weight is summed in registers and added once, by Kahan's rule:
// `lost` is what the sum so far has rounded away. Plain sums over 1024 rows were off 5 times as far
// as PyTorch's.
template <int N>
inline void rms_norm_gradient_rows(const puna::RMSNormGradient& a, int64_t row, float* d_weight,
                                   float* lost) {
  const float *x = a.x + row * a.width, *d_y = a.d_y + row * a.width, *scale = a.scale + row;
  float* d_x = a.d_x + row * a.width;
  float inner[N];
  for (int r = 0; r < N; ++r) {
    const float total = sum_terms(a.width, [&](int64_t i, auto size) {
      return load(d_y + r * a.width + i, size) * load(a.weight + i, size) *
             load(x + r * a.width + i, size);
    });
    inner[r] = total * scale[r] / a.width;
  }
  for_each_vector(0, a.width, [&](int64_t i, auto size) {
    const vec weight = load(a.weight + i, size);
    vec total = {};
#pragma GCC unroll 8
    for (int r = 0; r < N; ++r) {
      const vec normed = load(x + r * a.width + i, size) * scale[r];
      const vec upstream = load(d_y + r * a.width + i, size);
      store(d_x + r * a.width + i, (upstream * weight - normed * inner[r]) * scale[r], size);
      total += upstream * normed;
    }
    const vec before = load(d_weight + i, size), added = total - load(lost + i, size);
    const vec after = before + added;
    store(d_weight + i, after, size);
    store(lost + i, (after - before) - added, size);
  });
}

inline void rms_norm_gradient(const puna::RMSNormGradient& a, int threads) {
  int used = 1;
  puna::parallel(a.rows * a.width < PARALLEL_THRESHOLD ? 1 : threads, [&](int part, int parts) {
    if (part == 0) used = parts;
    float *d_weight = a.partial + part * 2 * a.width, *lost = d_weight + a.width;
    std::fill_n(d_weight, 2 * a.width, 0.0f);
    int64_t row = a.rows * part / parts;
    const int64_t end = a.rows * (part + 1) / parts;
    for (; row + 8 <= end; row += 8) rms_norm_gradient_rows<8>(a, row, d_weight, lost);
    for (; row < end; ++row) rms_norm_gradient_rows<1>(a, row, d_weight, lost);
  });
  std::copy_n(a.partial, a.width, a.d_weight);
  for (int part = 1; part < used; ++part)
    for (int64_t i = 0; i < a.width; ++i) a.d_weight[i] += a.partial[part * 2 * a.width + i];
}

// Elements `begin` to `end`.
inline void swiglu(const puna::SwiGLU& a, int64_t begin, int64_t end) {
  for_each_vector(begin, end, [&](int64_t i, auto size) {
    store(a.y + i, swiglu(load(a.gate + i, size), load(a.up + i, size)), size);
  });
}

inline void swiglu_gradient(const puna::SwiGLUGradient& a, int64_t begin, int64_t end) {
  for_each_vector(begin, end, [&](int64_t i, auto size) {
    const vec gate = load(a.gate + i, size), s = sigmoid(gate), d_y = load(a.d_y + i, size);
    const vec up = load(a.up + i, size), silu = gate * s;
    store(a.d_gate + i, d_y * up * s * (1.0f + gate * (1.0f - s)), size);
    store(a.d_up + i, d_y * silu, size);
    if (a.y) store(a.y + i, silu * up, size);
  });
}

inline void swiglu(const puna::SwiGLU& a, int threads) {
  parallel_elements(a.count, threads, [&](int64_t begin, int64_t end) { swiglu(a, begin, end); });
}

inline void swiglu_gradient(const puna::SwiGLUGradient& a, int threads) {
  parallel_elements(a.count, threads,
                    [&](int64_t begin, int64_t end) { swiglu_gradient(a, begin, end); });
}

// All heads of token t of row b.
inline void rotate_token(const puna::Rope& a, const puna::Heads& h, int64_t b, int64_t t) {
  const int64_t angles = b * a.angle_batch_stride + t * a.angle_stride;
  for (int64_t head = 0; head < h.heads; ++head)
    rotate_head(h.x + b * h.batch_stride + t * h.token_stride + head * h.head_stride,
                a.cos + angles, a.sin + angles, a.direction, a.half,
                h.y + ((b * a.tokens + t) * h.heads + head) * 2 * a.half);
}

inline void rope(const puna::Rope& a, int threads) {
  const int64_t count = a.batch * a.tokens, per_token = (a.q.heads + a.k.heads) * 2 * a.half;
  puna::parallel(count * per_token < PARALLEL_THRESHOLD ? 1 : threads, [&](int part, int parts) {
    for (int64_t n = count * part / parts; n < count * (part + 1) / parts; ++n) {
      rotate_token(a, a.q, n / a.tokens, n % a.tokens);
      rotate_token(a, a.k, n / a.tokens, n % a.tokens);
    }
  });
}

}  // namespace PUNA_ISA
