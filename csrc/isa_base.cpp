#include "standard.h"
#define PUNA_ISA base
#define PUNA_WIDTH 4
#include "engine_impl.h"
#include "fingerprint_impl.h"
#include "losses_impl.h"

std::unique_ptr<puna::Engine> puna::make_engine_base(const Shape& s, const Weights& w) {
  return std::make_unique<base::Llama>(s, w);
}

void puna::softmax_loss_base(const SoftmaxLoss& a, int threads) { base::softmax_loss(a, threads); }

uint64_t puna::fingerprint_base(const float* values, int64_t count, int threads) {
  return base::fingerprint(values, count, threads);
}
