// Softmax cross-entropy and its gradient, a row at a time while the row is in the cache.
#pragma once

#include "base/simd.h"
#include "base/standard.h"
#include "train/losses.h"

namespace PUNA_ISA {

inline float largest(const float* logits, int64_t vocab) {
  int64_t i = 0;
  float top = logits[0];
  if (vocab >= W) {
    vec tops = load(logits);
    for (i = W; i + W <= vocab; i += W) tops = max(tops, load(logits + i));
    top = largest(tops);
  }
  for (; i < vocab; ++i) top = logits[i] > top ? logits[i] : top;
  return top;
}

inline void softmax_loss_row(float* logits, int64_t vocab, int64_t label, float scale, float z_loss,
                             float* loss) {
  const float top = largest(logits, vocab), of_label = logits[label] - top;
  double total = 0.0;
  int64_t i = 0;
  for (; i + 4 * W <= vocab; i += 4 * W) {
    vec sums = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vec e = exp(load(logits + i + j * W) - top);
      store(logits + i + j * W, e);
      sums += e;
    }
    total += sum(sums);
  }
  for (; i < vocab; ++i) total += logits[i] = std::exp(logits[i] - top);

  const float log_total = static_cast<float>(std::log(total)), norm = top + log_total;
  *loss = log_total - of_label + z_loss * norm * norm;
  const float factor = static_cast<float>(scale * (1.0 + 2.0 * z_loss * norm) / total);
  for (i = 0; i + W <= vocab; i += W) store(logits + i, load(logits + i) * factor);
  for (; i < vocab; ++i) logits[i] *= factor;
  logits[label] -= scale;
}

inline void softmax_loss(const puna::SoftmaxLoss& a, int threads) {
  puna::parallel(threads, [&](int part, int parts) {
    for (int64_t row = a.rows * part / parts; row < a.rows * (part + 1) / parts; ++row)
      softmax_loss_row(a.logits + row * a.vocab, a.vocab, a.labels[row], a.scale[row], a.z_loss,
                       a.losses + row);
  });
}

inline void logprobs_row(const puna::LogProbs& a, int64_t row) {
  const float* logits = a.logits + row * a.vocab;
  const float top = largest(logits, a.vocab), sharpness = 1.0f / a.temperature;
  double total = 0.0, weighted = 0.0;  // sums of e^x and x e^x
  int64_t i = 0;
  for (; i + 4 * W <= a.vocab; i += 4 * W) {
    vec sums = {}, products = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vec x = (load(logits + i + j * W) - top) * sharpness, e = exp(x);
      sums += e;
      products += e * x;
    }
    total += sum(sums);
    weighted += sum(products);
  }
  for (; i < a.vocab; ++i) {
    const double x = (logits[i] - top) * sharpness, e = std::exp(x);
    total += e;
    weighted += e * x;
  }
  const double log_total = std::log(total);
  a.top[row] = top;
  a.total[row] = static_cast<float>(total);
  a.logprobs[row] = static_cast<float>((logits[a.labels[row]] - top) * sharpness - log_total);
  a.entropy[row] = static_cast<float>(log_total - weighted / total);
  a.mean[row] = static_cast<float>(weighted / total);
}

// d logprob / d x = onehot - p and d entropy / d x = -p (log p + entropy) = -p (x - mean).
// Nothing here takes a logarithm of the sum: rounded, it would be the same error in all of a row,
// 2.7 times PyTorch's in what is summed over the row.
inline void logprobs_gradient_row(const puna::LogProbsGradient& a, int64_t row) {
  float* logits = a.logits + row * a.vocab;
  const float sharpness = 1.0f / a.temperature, top = a.top[row];
  const float factor = 1.0f / a.total[row], mean = a.mean[row];
  const float d_logprob = a.d_logprobs[row] * sharpness, d_entropy = a.d_entropy[row] * sharpness;
  int64_t i = 0;
  for (; i + W <= a.vocab; i += W) {
    const vec x = (load(logits + i) - top) * sharpness;
    store(logits + i, -exp(x) * factor * (d_entropy * (x - mean) + d_logprob));
  }
  for (; i < a.vocab; ++i) {
    const float x = (logits[i] - top) * sharpness;
    logits[i] = -std::exp(x) * factor * (d_entropy * (x - mean) + d_logprob);
  }
  logits[a.labels[row]] += d_logprob;
}

template <typename Rows, typename Row>
inline void each_row(const Rows& a, int threads, Row work) {
  puna::parallel(threads, [&](int part, int parts) {
    for (int64_t row = a.rows * part / parts; row < a.rows * (part + 1) / parts; ++row)
      work(a, row);
  });
}

inline void logprobs(const puna::LogProbs& a, int threads) { each_row(a, threads, logprobs_row); }

inline void logprobs_gradient(const puna::LogProbsGradient& a, int threads) {
  each_row(a, threads, logprobs_gradient_row);
}

}  // namespace PUNA_ISA
