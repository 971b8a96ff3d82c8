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
  std::unique_ptr<Engine> (*make_engine)(const ModelShape&, const Tables&, WeightFormat);
  void (*softmax_loss)(const SoftmaxLoss&, int threads);
  void (*logprobs)(const LogProbs&, int threads);
  void (*logprobs_gradient)(const LogProbsGradient&, int threads);
  // A hash of `count` floats, which changes when any one of them does.
  uint64_t (*fingerprint)(const float* values, int64_t count, int threads);
  void (*attention)(const Attention&, int threads);
  void (*attention_backward)(const AttentionBackward&, int threads);
  void (*matmul)(const MatMul&, int threads);
  void (*feed_forward)(const FeedForward&, int threads);
  void (*feed_forward_gradient)(const FeedForwardGradient&, int threads);
  void (*rms_norm)(const RMSNorm&, int threads);
  void (*rms_norm_gradient)(const RMSNormGradient&, int threads);
  void (*swiglu)(const SwiGLU&, int threads);
  void (*swiglu_gradient)(const SwiGLUGradient&, int threads);
  void (*rope)(const Rope&, int threads);
};

const Operations& operations_avx512_bf16();
const Operations& operations_avx512();
const Operations& operations_avx2();
const Operations& operations_base();

}  // namespace puna
