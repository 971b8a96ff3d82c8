// Everything that is compiled once for each instruction set.
#pragma once

#include <memory>

#include "decode/engine.h"
#include "train/attention.h"
#include "train/elementwise.h"
#include "train/feed_forward.h"
#include "train/losses.h"
#include "train/matmul.h"

namespace puna {

struct Operations {
  std::unique_ptr<Engine> (*make_engine)(const Shape&, const Weights&);
  void (*softmax_loss)(const SoftmaxLoss&, int threads);
  void (*logprobs)(const LogProbs&, int threads);
  void (*logprobs_gradient)(const LogProbsGradient&, int threads);
  // A number that changes when any of `count` floats does.
  uint64_t (*fingerprint)(const float* values, int64_t count, int threads);
  void (*attention)(const Attention&, int threads);
  void (*attention_backward)(const AttentionBackward&, int threads);
  void (*matmul)(const MatMul&, int threads);
  void (*feed_forward)(const FeedForward&, int threads);
  void (*feed_forward_gradient)(const FeedForwardGradient&, int threads);
  Elementwise elementwise;
};

const Operations& operations_avx512();
const Operations& operations_avx2();
const Operations& operations_base();

}  // namespace puna
