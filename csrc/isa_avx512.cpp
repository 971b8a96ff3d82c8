#if defined(__x86_64__)
#include "standard.h"
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define PUNA_ISA avx512
#define PUNA_WIDTH 16
#include "engine_impl.h"
#include "fingerprint_impl.h"
#include "losses_impl.h"

std::unique_ptr<puna::Engine> puna::make_engine_avx512(const Shape& s, const Weights& w) {
  return std::make_unique<avx512::Llama>(s, w);
}

void puna::softmax_loss_avx512(const SoftmaxLoss& a, int threads) { avx512::softmax_loss(a, threads); }

uint64_t puna::fingerprint_avx512(const float* values, int64_t count, int threads) {
  return avx512::fingerprint(values, count, threads);
}
#endif
