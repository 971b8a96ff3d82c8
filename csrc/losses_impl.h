// Softmax cross-entropy and its gradient, a row at a time while the row is in the cache.
#include "losses.h"
#include "simd.h"
#include "standard.h"

namespace PUNA_ISA {

inline void softmax_loss_row(float* logits, int64_t vocab, int64_t label, float scale, float z_loss,
                             float* loss) {
  int64_t i = 0;
  float top = logits[0];
  if (vocab >= W) {
    vec tops = load(logits);
    for (i = W; i + W <= vocab; i += W) tops = max(tops, load(logits + i));
    top = largest(tops);
  }
  for (; i < vocab; ++i) top = logits[i] > top ? logits[i] : top;
  const float of_label = logits[label] - top;

  double total = 0.0;
  for (i = 0; i + 4 * W <= vocab; i += 4 * W) {
    vec sums = {};
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const vec e = exp(load(logits + i + j * W) - top);
      store(logits + i + j * W, e);
      sums += e;
    }
    total += sum(sums);
  }
  for (; i < vocab; ++i) total += logits[i] = std::exp(logits[i] - top);

  const float log_total = static_cast<float>(std::log(total)), norm = top + log_total;
  *loss = log_total - of_label + z_loss * norm * norm;
  const float factor = static_cast<float>(scale * (1.0 + 2.0 * z_loss * norm) / total);
  for (i = 0; i + W <= vocab; i += W) store(logits + i, load(logits + i) * factor);
  for (; i < vocab; ++i) logits[i] *= factor;
  logits[label] -= scale;
}

inline void softmax_loss(const puna::SoftmaxLoss& a, int threads) {
  puna::parallel(threads, [&](int part, int parts) {
    for (int64_t row = a.rows * part / parts; row < a.rows * (part + 1) / parts; ++row)
      softmax_loss_row(a.logits + row * a.vocab, a.vocab, a.labels[row], a.scale[row], a.z_loss,
                       a.losses + row);
  });
}

}  // namespace PUNA_ISA
