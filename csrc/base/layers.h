// What training and decoding do to one row of activations.
#pragma once

#include "base/simd.h"
#include "base/standard.h"

namespace PUNA_ISA {

// The last elements of a row go through the same vector code as all others, so that a result does
// not depend on its element's place: the lanes past the end are zero.
struct FullVector {};
struct PartialVector {
  int64_t count;
};

inline vec load(const float* p, FullVector) { return load(p); }

inline vec load(const float* p, PartialVector part) {
  vec v = {};
  std::memcpy(&v, p, part.count * sizeof(float));
  return v;
}

inline void store(float* p, vec v, FullVector) { store(p, v); }

inline void store(float* p, vec v, PartialVector part) {
  std::memcpy(p, &v, part.count * sizeof(float));
}

// v, and zero in the lanes past the end.
inline vec only(vec v, FullVector) { return v; }

inline vec only(vec v, PartialVector part) {
  vec kept = {};
  std::memcpy(&kept, &v, part.count * sizeof(float));
  return kept;
}

// Calls work(i, size) for each vector of `begin` to `end`.
template <typename Work>
inline void for_each_vector(int64_t begin, int64_t end, Work work) {
  int64_t i = begin;
  for (; i + W <= end; i += W) work(i, FullVector{});
  if (i < end) work(i, PartialVector{end - i});
}

// Numbers of a row that are summed side by side, whatever the length of a vector.
constexpr int SPAN = 64;

// The sum of term(i, size) over a row.
template <typename Term>
inline float sum_terms(int64_t count, Term term) {
  constexpr int SUMS = SPAN / W;
  vec sums[SUMS] = {}, rest[SUMS] = {};
  int64_t i = 0;
  for (; i + SPAN <= count; i += SPAN) {
#pragma GCC unroll 16
    for (int j = 0; j < SUMS; ++j) sums[j] += term(i + j * W, FullVector{});
  }
  for_each_vector(i, count, [&](int64_t at, auto size) { rest[(at - i) / W] = term(at, size); });
#pragma GCC unroll 16
  for (int j = 0; j < SUMS; ++j) sums[j] += rest[j];
  return reduce_sum(sums);
}

// y = x * scale * weight; returns the scale, 1 / sqrt(mean(x^2) + eps). (Not inlined, as
// rotate_head below: training and decoding run the same instructions, whatever stands around them.)
__attribute__((noinline)) inline float rms_norm_row(const float* x, const float* weight,
                                                    int64_t width, float eps, float* y) {
  const float total = sum_terms(width, [&](int64_t i, auto size) {
    const vec v = load(x + i, size);
    return v * v;
  });
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
  for_each_vector(0, width, [&](int64_t i, auto size) {
    store(y + i, load(x + i, size) * scale * load(weight + i, size), size);
  });
  return scale;
}

// Rotates the pairs (i, i + half) of a head by the angles i, in the direction 1 or -1; y may be x.
// Vectorized by the compiler, which takes a half of 24 in vectors of 8 for any W.
__attribute__((noinline)) inline void rotate_head(const float* x, const float* cos,
                                                  const float* sin, float direction, int64_t half,
                                                  float* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const float c = cos[i], s = sin[i] * direction, first = x[i], second = x[i + half];
    y[i] = first * c - second * s;
    y[i + half] = second * c + first * s;
  }
}

// 1 / (1 + e^-x); 0 below -88, where `exp` stays at e^88 and -inf * sigmoid would be -inf.
inline vec sigmoid(vec x) { return select(x < broadcast(-88.0f), vec{}, 1.0f / (1.0f + exp(-x))); }

inline vec swiglu(vec gate, vec up) { return gate * sigmoid(gate) * up; }

// The sum of e^((logit - maximum) * factor) over a row. Calls use(i, x, e, size) for vectors of
// exponents x and powers e.
template <typename Use>
inline double sum_exp(const float* logits, int64_t count, float maximum, float factor, Use use) {
  constexpr int SUMS = 16 / W;
  const auto power = [&](int64_t i, auto size) __attribute__((always_inline)) {
    const vec x = (load(logits + i, size) - maximum) * factor;
    const vec e = only(exp(x), size);
    use(i, x, e, size);
    return e;
  };
  double total = 0.0;
  int64_t i = 0;
  for (; i + SPAN <= count; i += SPAN) {
    vec sums[SUMS] = {};
#pragma GCC unroll 16
    for (int j = 0; j < SPAN / W; ++j) sums[j % SUMS] += power(i + j * W, FullVector{});
    total += reduce_sum(sums);
  }
  vec rest[SUMS] = {};
  for_each_vector(i, count,
                  [&](int64_t at, auto size) { rest[(at - i) / W % SUMS] += power(at, size); });
  return total + reduce_sum(rest);
}

// The log-probability of a token with this logit.
inline float logprob_of(float logit, float maximum, float factor, double log_total) {
  return static_cast<float>((logit - maximum) * factor - log_total);
}

}  // namespace PUNA_ISA
