// Softmax cross-entropy and its gradient, a row at a time while the row is in the cache.
#pragma once

#include "base/buffer.h"
#include "base/layers.h"
#include "base/simd.h"
#include "base/standard.h"
#include "train/losses.h"

namespace PUNA_ISA {

inline float row_max(const float* logits, int64_t vocab) {
  int64_t i = 0;
  float max_logit = logits[0];
  if (vocab >= W) {
    vec maxima = load(logits);
    for (i = W; i + W <= vocab; i += W) maxima = max(maxima, load(logits + i));
    max_logit = reduce_max(maxima);
  }
  for (; i < vocab; ++i) max_logit = logits[i] > max_logit ? logits[i] : max_logit;
  return max_logit;
}

inline void softmax_loss_row(const puna::SoftmaxLoss& a, int64_t row) {
  float* logits = a.logits + row * a.vocab;
  const int64_t vocab = a.vocab, label = a.labels[row];
  const float scale = a.scale[row], z_loss = a.z_loss;
  const float max_logit = row_max(logits, vocab), label_logit = logits[label] - max_logit;
  double total = 0.0;
  int64_t i = 0;
  for (; i + 4 * W <= vocab; i += 4 * W) {
    vec sums = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vec e = exp(load(logits + i + j * W) - max_logit);
      store(logits + i + j * W, e);
      sums += e;
    }
    total += reduce_sum(sums);
  }
  for (; i < vocab; ++i) total += logits[i] = std::exp(logits[i] - max_logit);

  const float log_total = static_cast<float>(std::log(total)), log_norm = max_logit + log_total;
  a.losses[row] = log_total - label_logit + z_loss * log_norm * log_norm;
  const float factor = static_cast<float>(scale * (1.0 + 2.0 * z_loss * log_norm) / total);
  for (i = 0; i + W <= vocab; i += W) store(logits + i, load(logits + i) * factor);
  for (; i < vocab; ++i) logits[i] *= factor;
  logits[label] -= scale;
}

inline void logprobs_row(const puna::LogProbs& a, int64_t row) {
  const float* logits = a.logits + row * a.vocab;
  const float max_logit = row_max(logits, a.vocab), inverse_temperature = 1.0f / a.temperature;
  double weighted = 0.0;  // the sum of x e^x
  vec products = {};      // since `weighted` was added to
  const double total = sum_exp(logits, a.vocab, max_logit, inverse_temperature,
                               [&](int64_t i, vec x, vec e, auto) {
                                 if (i % SPAN == 0) {
                                   weighted += reduce_sum(products);
                                   products = vec{};
                                 }
                                 products += e * x;
                               });
  weighted += reduce_sum(products);
  const double log_total = std::log(total);
  a.max_logit[row] = max_logit;
  a.sum_exp[row] = static_cast<float>(total);
  a.logprobs[row] =
      logprob_of(logits[a.labels[row]], max_logit, inverse_temperature, log_total);
  a.entropy[row] = static_cast<float>(log_total - weighted / total);
  a.mean[row] = static_cast<float>(weighted / total);
}

// d logprob / d x = onehot - p and d entropy / d x = -p (log p + entropy) = -p (x - mean).
// The logarithm of the sum is not used here: its rounding error would be the same in a whole row,
// and in sums over the row 2.7 times PyTorch's.
inline void logprobs_gradient_row(const puna::LogProbsGradient& a, int64_t row) {
  float* logits = a.logits + row * a.vocab;
  const float inverse_temperature = 1.0f / a.temperature, max_logit = a.max_logit[row];
  const float factor = 1.0f / a.sum_exp[row], mean = a.mean[row];
  const float d_logprob = a.d_logprobs[row] * inverse_temperature,
              d_entropy = a.d_entropy[row] * inverse_temperature;
  int64_t i = 0;
  for (; i + W <= a.vocab; i += W) {
    const vec x = (load(logits + i) - max_logit) * inverse_temperature;
    store(logits + i, -exp(x) * factor * (d_entropy * (x - mean) + d_logprob));
  }
  for (; i < a.vocab; ++i) {
    const float x = (logits[i] - max_logit) * inverse_temperature;
    logits[i] = -std::exp(x) * factor * (d_entropy * (x - mean) + d_logprob);
  }
  logits[a.labels[row]] += d_logprob;
}

// Calls work(a, row) for each row, the rows in even parts.
template <typename Arguments, typename Work>
inline void parallel_rows(const Arguments& a, int threads, Work work) {
  puna::parallel(threads, [&](int part, int parts) {
    const Range rows = split(a.rows, part, parts);
    for (int64_t row = rows.begin; row < rows.end; ++row) work(a, row);
  });
}

inline void softmax_loss(const puna::SoftmaxLoss& a, int threads) {
  parallel_rows(a, threads, softmax_loss_row);
}

inline void logprobs(const puna::LogProbs& a, int threads) {
  parallel_rows(a, threads, logprobs_row);
}

inline void logprobs_gradient(const puna::LogProbsGradient& a, int threads) {
  parallel_rows(a, threads, logprobs_gradient_row);
}

}  // namespace PUNA_ISA
