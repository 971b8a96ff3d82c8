// All of it, for one instruction set: what an isa_*.cpp includes.
#include "attention_impl.h"
#include "elementwise_impl.h"
#include "engine_impl.h"
#include "feed_forward_impl.h"
#include "fingerprint_impl.h"
#include "losses_impl.h"
#include "matmul_impl.h"
#include "operations.h"

namespace PUNA_ISA {

inline std::unique_ptr<puna::Engine> make_engine(const Shape& shape, const Weights& weights) {
  return std::make_unique<Llama>(shape, weights);
}

constexpr puna::Operations operations{
    make_engine, softmax_loss,       logprobs, logprobs_gradient, fingerprint,
    attention,   attention_backward, matmul,   feed_forward,      feed_forward_gradient,
    elementwise};

}  // namespace PUNA_ISA
