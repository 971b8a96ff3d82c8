// What the training losses compute from a chunk of logits, in one call.
#pragma once

#include <cstdint>

namespace puna {

// logits (rows, vocab) are overwritten with the gradient of the weighted losses.
struct SoftmaxLoss {
  int64_t rows, vocab;
  float* logits;
  const int64_t* labels;  // (rows)
  const float* scale;     // (rows): each row's weight in the sum
  float z_loss;
  float* losses;  // (rows), not weighted
};

// Of softmax(logits / temperature): each label's log-probability, and the entropy. Kept for the
// backward: each row's largest logit, and with x = (logit - max_logit) / temperature the sum of e^x
// and the mean of x under the distribution.
struct LogProbs {
  int64_t rows, vocab;
  const float* logits;    // (rows, vocab)
  const int64_t* labels;  // (rows)
  float temperature;
  float *logprobs, *entropy, *max_logit, *sum_exp, *mean;  // (rows)
};

// logits are overwritten with their gradient, from those of the log-probabilities and entropies.
struct LogProbsGradient {
  int64_t rows, vocab;
  float* logits;
  const int64_t* labels;
  float temperature;
  const float *max_logit, *sum_exp, *mean, *d_logprobs, *d_entropy;
};

}  // namespace puna
