// One token from a row of logits: the draw of kernels/sample.py without truncation.
#pragma once

#include <cmath>
#include <cstdint>

#include "base/layers.h"
#include "base/simd.h"

namespace PUNA_ISA {

// SplitMix64's step; the top 53 bits are a number in [0, 1).
inline double uniform(int64_t seed) {
  uint64_t x = static_cast<uint64_t>(seed) + 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  x ^= x >> 31;
  return static_cast<double>(x >> 11) * 0x1.0p-53;
}

// The first token whose cumulative weight exceeds u * total. Rounding may put that above the sum of
// all weights, which are then added once more in the order of the search: no token that weighs
// nothing may be the last resort.
inline int64_t inverse_cdf(const float* weights, int64_t count, double u, double total) {
  double cumulative = 0.0;
  int64_t last = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (weights[i] <= 0.0f) continue;
    cumulative += weights[i];
    last = i;
    if (cumulative > u * total) return i;
  }
  return cumulative < total ? inverse_cdf(weights, count, u, cumulative) : last;
}

inline int64_t argmax(const float* logits, int64_t count) {
  constexpr int BLOCK = 16 * W;  // one reduction across lanes takes as long as 16 vectors
  float maximum = logits[0];
  int64_t index = 0, i = 0;
  for (; i + BLOCK <= count; i += BLOCK) {
    vec a = load(logits + i), b = load(logits + i + W);
    for (int j = 2; j < 16; j += 2) {
      a = max(a, load(logits + i + j * W));
      b = max(b, load(logits + i + (j + 1) * W));
    }
    const float block_max = reduce_max(max(a, b));
    if (block_max > maximum)
      maximum = block_max, index = i;  // the block; its element is index below
  }
  for (; i < count; ++i)
    if (logits[i] > maximum) maximum = logits[i], index = i;
  while (logits[index] < maximum) ++index;
  return index;
}

// `weights` is room for (vocab). Log-probs are of the tempered distribution; at temperature 0,
// greedy, of the one at temperature 1. NaN where there is no distribution: a logit is NaN or inf,
// which makes the sum of the exponentials NaN, or all are -inf.
inline void draw_token(const float* logits, int64_t vocab, float temperature, int64_t seed,
                       float* weights, int64_t* token, float* logprob) {
  const float factor = temperature > 0.0f ? 1.0f / temperature : 1.0f;
  const int64_t best = argmax(logits, vocab);
  const float maximum = logits[best];
  const double total =
      sum_exp(logits, vocab, maximum, factor,
              [&](int64_t i, vec, vec e, auto size) { store(weights + i, e, size); });
  *token = temperature > 0.0f ? inverse_cdf(weights, vocab, uniform(seed), total) : best;
  *logprob = logprob_of(logits[*token], maximum, factor, std::log(total));
}

}  // namespace PUNA_ISA
