#if defined(__x86_64__)
#include "standard.h"
#pragma GCC target("avx2,fma")
#define PUNA_ISA avx2
#define PUNA_WIDTH 8
#include "engine_impl.h"
#include "fingerprint_impl.h"
#include "losses_impl.h"

std::unique_ptr<puna::Engine> puna::make_engine_avx2(const Shape& s, const Weights& w) {
  return std::make_unique<avx2::Llama>(s, w);
}

void puna::softmax_loss_avx2(const SoftmaxLoss& a, int threads) { avx2::softmax_loss(a, threads); }

uint64_t puna::fingerprint_avx2(const float* values, int64_t count, int threads) {
  return avx2::fingerprint(values, count, threads);
}
#endif
