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
  float* losses;          // (rows), not weighted
};

}  // namespace puna
