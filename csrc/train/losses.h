// What the training losses need of a chunk of logits, in one call.
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

// Of softmax(logits / temperature): each label's log-probability, and the entropy. For the backward
// of each row: its largest logit, and of x = (logit - that) / temperature the sum of e^x and the
// mean under the distribution.
struct LogProbs {
  int64_t rows, vocab;
  const float* logits;    // (rows, vocab)
  const int64_t* labels;  // (rows)
  float temperature;
  float *logprobs, *entropy, *top, *total, *mean;  // (rows)
};

// logits are overwritten with their gradient, from those of the log-probabilities and entropies.
struct LogProbsGradient {
  int64_t rows, vocab;
  float* logits;
  const int64_t* labels;
  float temperature;
  const float *top, *total, *mean, *d_logprobs, *d_entropy;
};

}  // namespace puna
