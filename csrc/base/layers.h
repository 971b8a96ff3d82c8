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

// Calls work(i, size) for each vector of `begin` to `end`.
template <typename Work>
inline void for_each_vector(int64_t begin, int64_t end, Work work) {
  int64_t i = begin;
  for (; i + W <= end; i += W) work(i, FullVector{});
  if (i < end) work(i, PartialVector{end - i});
}

// The sum of term(i, size) over a row. Several partial sums at once hide the latency of an
// addition.
template <int PARTIAL_SUMS, typename Term>
inline float sum_terms(int64_t count, Term term) {
  vec sums[PARTIAL_SUMS] = {};
  int64_t i = 0;
  for (; i + PARTIAL_SUMS * W <= count; i += PARTIAL_SUMS * W) {
#pragma GCC unroll 4
    for (int j = 0; j < PARTIAL_SUMS; ++j) sums[j] += term(i + j * W, FullVector{});
  }
  for_each_vector(i, count, [&](int64_t at, auto size) { sums[0] += term(at, size); });
  static_assert(PARTIAL_SUMS == 1 || PARTIAL_SUMS == 4);
  if constexpr (PARTIAL_SUMS == 1)
    return reduce_sum(sums[0]);
  else
    return reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// y = x * scale * weight; returns the scale, 1 / sqrt(mean(x^2) + eps).
template <int PARTIAL_SUMS>
inline float rms_norm_row(const float* x, const float* weight, int64_t width, float eps, float* y) {
  const float total = sum_terms<PARTIAL_SUMS>(width, [&](int64_t i, auto size) {
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
inline void rotate_head(const float* x, const float* cos, const float* sin, float direction,
                        int64_t half, float* y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const float c = cos[i], s = sin[i] * direction, first = x[i], second = x[i + half];
    y[i] = first * c - second * s;
    y[i + half] = second * c + first * s;
  }
}

}  // namespace PUNA_ISA
