// Norms, rotations and gates, a row at a time, forward and backward.
#pragma once

#include "base/simd.h"
#include "base/standard.h"
#include "train/elementwise.h"

namespace PUNA_ISA {

// Below this many elements, some 5 us of work, one thread: waking the others takes as long.
constexpr int64_t ALONE = 1 << 14;

// The last elements of a row go through the same vectors as all others, so that a result does not
// depend on where its element stands: lanes that are not there hold zeros.
struct Whole {};
struct Part {
  int64_t count;
};

inline vec load(const float* p, Whole) { return load(p); }

inline vec load(const float* p, Part part) {
  vec v = {};
  std::memcpy(&v, p, part.count * sizeof(float));
  return v;
}

inline void store(float* p, vec v, Whole) { store(p, v); }

inline void store(float* p, vec v, Part part) { std::memcpy(p, &v, part.count * sizeof(float)); }

template <typename Work>
inline void each_vector(int64_t begin, int64_t end, Work work) {
  int64_t i = begin;
  for (; i + W <= end; i += W) work(i, Whole{});
  if (i < end) work(i, Part{end - i});
}

// Of term(i, size) over a row, in four sums at once: one would wait 4 cycles for each addition.
template <typename Term>
inline float summed(int64_t count, Term term) {
  vec sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * W <= count; i += 4 * W) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[j] += term(i + j * W, Whole{});
  }
  each_vector(i, count, [&](int64_t at, auto size) { sums[0] += term(at, size); });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// work(begin, end) for each thread's share of `count` elements, in whole vectors.
template <typename Work>
inline void share_elements(int64_t count, int threads, Work work) {
  const int64_t vectors = (count + W - 1) / W;
  puna::parallel(count < ALONE ? 1 : threads, [&](int part, int parts) {
    work(vectors * part / parts * W, std::min(count, vectors * (part + 1) / parts * W));
  });
}

inline void rms_norm(const puna::RMSNorm& a, int threads) {
  const auto normalise = [&](int64_t row) {
    const float* x = a.x + row * a.width;
    float* y = a.y + row * a.width;
    const float total = summed(a.width, [&](int64_t i, auto size) {
      const vec v = load(x + i, size);
      return v * v;
    });
    const float scale = 1.0f / std::sqrt(total / a.width + a.eps);
    a.scale[row] = scale;
    each_vector(0, a.width, [&](int64_t i, auto size) {
      store(y + i, load(x + i, size) * scale * load(a.weight + i, size), size);
    });
  };
  puna::parallel(a.rows * a.width < ALONE ? 1 : threads, [&](int part, int parts) {
    for (int64_t row = a.rows * part / parts; row < a.rows * (part + 1) / parts; ++row)
      normalise(row);
  });
}

// d_x of N rows; what they add to d_weight is summed in registers and added once, by Kahan's rule:
// `lost` is what the sum so far has rounded away. Plain sums over 1024 rows were off 5 times as far
// as PyTorch's.
template <int N>
inline void rms_norm_gradient_rows(const puna::RMSNormGradient& a, int64_t row, float* d_weight,
                                   float* lost) {
  const float *x = a.x + row * a.width, *d_y = a.d_y + row * a.width, *scale = a.scale + row;
  float* d_x = a.d_x + row * a.width;
  float inner[N];
  for (int r = 0; r < N; ++r) {
    const float total = summed(a.width, [&](int64_t i, auto size) {
      return load(d_y + r * a.width + i, size) * load(a.weight + i, size) *
             load(x + r * a.width + i, size);
    });
    inner[r] = total * scale[r] / a.width;
  }
  each_vector(0, a.width, [&](int64_t i, auto size) {
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
  puna::parallel(a.rows * a.width < ALONE ? 1 : threads, [&](int part, int parts) {
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

// 1 / (1 + e^-x); 0 below -88, where `exp` stays at e^88 and -inf * sigmoid would be -inf.
inline vec sigmoid(vec x) { return select(x < all(-88.0f), vec{}, 1.0f / (1.0f + exp(-x))); }

// Elements `begin` to `end`.
inline void swiglu(const puna::SwiGLU& a, int64_t begin, int64_t end) {
  each_vector(begin, end, [&](int64_t i, auto size) {
    const vec gate = load(a.gate + i, size);
    store(a.y + i, gate * sigmoid(gate) * load(a.up + i, size), size);
  });
}

inline void swiglu_gradient(const puna::SwiGLUGradient& a, int64_t begin, int64_t end) {
  each_vector(begin, end, [&](int64_t i, auto size) {
    const vec gate = load(a.gate + i, size), s = sigmoid(gate), d_y = load(a.d_y + i, size);
    const vec up = load(a.up + i, size), opened = gate * s;
    store(a.d_gate + i, d_y * up * s * (1.0f + gate * (1.0f - s)), size);
    store(a.d_up + i, d_y * opened, size);
    if (a.y) store(a.y + i, opened * up, size);
  });
}

inline void swiglu(const puna::SwiGLU& a, int threads) {
  share_elements(a.count, threads, [&](int64_t begin, int64_t end) { swiglu(a, begin, end); });
}

inline void swiglu_gradient(const puna::SwiGLUGradient& a, int threads) {
  share_elements(a.count, threads,
                 [&](int64_t begin, int64_t end) { swiglu_gradient(a, begin, end); });
}

// Of one token. Left to the compiler: it takes a half of 24 in vectors of 8, whatever W is.
inline void turn(const puna::Rope& a, const puna::Heads& h, int64_t b, int64_t t) {
  const float* __restrict cos = a.cos + b * a.angle_batch_stride + t * a.angle_stride;
  const float* __restrict sin = a.sin + b * a.angle_batch_stride + t * a.angle_stride;
  for (int64_t head = 0; head < h.heads; ++head) {
    const float* __restrict x =
        h.x + b * h.batch_stride + t * h.token_stride + head * h.head_stride;
    float* __restrict y = h.y + ((b * a.tokens + t) * h.heads + head) * 2 * a.half;
    for (int64_t i = 0; i < a.half; ++i) {
      const float c = cos[i], s = sin[i] * a.direction, one = x[i], other = x[i + a.half];
      y[i] = one * c - other * s;
      y[i + a.half] = other * c + one * s;
    }
  }
}

inline void rope(const puna::Rope& a, int threads) {
  const int64_t count = a.batch * a.tokens, each = (a.q.heads + a.k.heads) * 2 * a.half;
  puna::parallel(count * each < ALONE ? 1 : threads, [&](int part, int parts) {
    for (int64_t n = count * part / parts; n < count * (part + 1) / parts; ++n) {
      turn(a, a.q, n / a.tokens, n % a.tokens);
      turn(a, a.k, n / a.tokens, n % a.tokens);
    }
  });
}

constexpr puna::Elementwise elementwise{rms_norm, rms_norm_gradient, swiglu, swiglu_gradient, rope};

}  // namespace PUNA_ISA
