// One token from a row of logits: the draw of kernels/sample.py without truncation.
#pragma once

#include <cmath>
#include <cstdint>

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

// Writes exp(logit - max) over `logits`. Log-probs are of the tempered distribution; at
// temperature 0, greedy, of the one at temperature 1. NaN where there is no distribution: a logit
// is NaN or inf, which makes the sum of the exponentials NaN, or all are -inf.
inline void draw_token(float* logits, int64_t vocab, float temperature, int64_t seed,
                       int64_t* token, float* logprob) {
  const float factor = temperature > 0.0f ? 1.0f / temperature : 1.0f;
  const int64_t best = argmax(logits, vocab);
  const float maximum = logits[best];
  double total = 0.0;
  int64_t i = 0;
  for (; i + 4 * W <= vocab; i += 4 * W) {
    vec sums = {};
    for (int j = 0; j < 4; ++j) {
      const vec e = exp((load(logits + i + j * W) - maximum) * factor);
      store(logits + i + j * W, e);
      sums += e;
    }
    total += reduce_sum(sums);
  }
  for (; i < vocab; ++i) total += logits[i] = std::exp((logits[i] - maximum) * factor);
  int64_t chosen = best;
  float score = 0.0f;  // log of e^(maximum - maximum)
  if (temperature > 0.0f) {
    chosen = inverse_cdf(logits, vocab, uniform(seed), total);
    score = std::log(logits[chosen]);
  }
  *token = chosen;
  const float found = score - static_cast<float>(std::log(total));
  *logprob = found > 0.0f ? 0.0f : found;  // fmin would take NaN for a number
}

}  // namespace PUNA_ISA
