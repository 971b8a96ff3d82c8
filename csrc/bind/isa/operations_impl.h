// All operations, for the instruction set of the file that includes this.
#pragma once

#include "bind/isa/operations.h"
#include "decode/engine_impl.h"
#include "decode/fingerprint_impl.h"
#include "train/attention_impl.h"
#include "train/elementwise_impl.h"
#include "train/feed_forward_impl.h"
#include "train/losses_impl.h"
#include "train/matmul_impl.h"

namespace PUNA_ISA {

inline std::unique_ptr<puna::Engine> make_engine(const ModelShape& shape,
                                                 const puna::Tables& tables, WeightFormat format) {
  return std::make_unique<Llama>(shape, tables, format);
}

constexpr puna::Operations operations{
    make_engine, softmax_loss,       logprobs, logprobs_gradient, fingerprint,
    attention,   attention_backward, matmul,   feed_forward,      feed_forward_gradient,
    rms_norm,    rms_norm_gradient,  swiglu,   swiglu_gradient,   rope};

}  // namespace PUNA_ISA
