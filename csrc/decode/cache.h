// The key/value cache. Keys are stored in blocks of W tokens, (D, W) each, so that W scores come
// from one chain of multiply-adds and no sum runs across a vector; values are (T, D).
#pragma once

#include "base/buffer.h"
#include "base/simd.h"

namespace PUNA_ISA {

class KVCache {
 public:
  KVCache(int64_t layers, int64_t kv_heads, int64_t head_dim)
      : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim) {}

  // Room for `rows` rows of `max_tokens` tokens each; what the rows held is lost.
  void reserve(int64_t rows, int64_t max_tokens) {
    const int64_t padded_tokens = ceil_div(max_tokens, W) * W;
    const int64_t count = layers_ * rows * kv_heads_ * padded_tokens * head_dim_;
    if (count > capacity_) {
      keys_ = allocate(count);
      values_ = allocate(count);
      capacity_ = count;
    }
    rows_ = rows;
    max_tokens_ = max_tokens;
    padded_tokens_ = padded_tokens;
  }

  float* keys(int64_t layer, int64_t row, int64_t head) {
    return keys_.get() + offset(layer, row, head);
  }
  float* values(int64_t layer, int64_t row, int64_t head) {
    return values_.get() + offset(layer, row, head);
  }

  void write(int64_t layer, int64_t row, int64_t head, int64_t t, const float* k, const float* v) {
    float* block = keys(layer, row, head) + t / W * W * head_dim_ + t % W;
    for (int64_t d = 0; d < head_dim_; ++d) block[d * W] = k[d];
    std::memcpy(values(layer, row, head) + t * head_dim_, v, head_dim_ * sizeof(float));
  }

  void copy_row(int64_t from, int64_t to, int64_t length) {
    const size_t bytes = ceil_div(length, W) * W * head_dim_ * sizeof(float);
    for (int64_t layer = 0; layer < layers_; ++layer)
      for (int64_t head = 0; head < kv_heads_; ++head) {
        std::memcpy(keys(layer, to, head), keys(layer, from, head), bytes);
        std::memcpy(values(layer, to, head), values(layer, from, head), bytes);
      }
  }

  int64_t rows() const { return rows_; }
  int64_t max_tokens() const { return max_tokens_; }
  int64_t padded_tokens() const { return padded_tokens_; }

 private:
  int64_t offset(int64_t layer, int64_t row, int64_t head) const {
    return ((layer * rows_ + row) * kv_heads_ + head) * padded_tokens_ * head_dim_;
  }

  int64_t layers_, kv_heads_, head_dim_, rows_ = 0, max_tokens_ = 0, padded_tokens_ = 0,
                                         capacity_ = 0;
  Buffer keys_, values_;
};

// out (D) = softmax(scale * q . k[0..length)) v, for one query head. `scores` has room for
// padded_tokens floats. VECTORS is the head size in vectors. The keys and values of the next call
// lie `prefetch_distance` from these, and are prefetched meanwhile (15m, 32 rows: 6% more tokens).
template <int VECTORS>
inline void attend_head(const float* q, const float* keys, const float* values, int64_t length,
                        float scale, float* scores, float* out, int64_t prefetch_distance) {
  constexpr int D = VECTORS * W;
  const auto load_and_prefetch = [prefetch_distance](const float* p)
                                     __attribute__((always_inline)) {
                                       __builtin_prefetch(p + prefetch_distance, 0, 2);
                                       return load(p);
                                     };
  const int64_t blocks = ceil_div(length, W);
  constexpr int UNROLL = 4;  // independent chains hide the latency of a multiply-add
  int64_t b = 0;
  for (; b + UNROLL <= blocks; b += UNROLL) {
    vec s[UNROLL] = {};
    const float* k = keys + b * W * D;
    for (int d = 0; d < D; ++d) {
      const vec x = broadcast(q[d]);
#pragma GCC unroll 4
      for (int i = 0; i < UNROLL; ++i) s[i] += x * load_and_prefetch(k + i * W * D + d * W);
    }
    for (int i = 0; i < UNROLL; ++i) store(scores + (b + i) * W, s[i] * scale);
  }
  for (; b < blocks; ++b) {
    vec s = {};
    for (int d = 0; d < D; ++d) s += broadcast(q[d]) * load_and_prefetch(keys + b * W * D + d * W);
    store(scores + b * W, s * scale);
  }
  for (int64_t t = length; t < blocks * W; ++t) scores[t] = -1e30f;
  vec maxima = load(scores);
  for (b = 1; b < blocks; ++b) maxima = max(maxima, load(scores + b * W));
  const vec max_score = broadcast(reduce_max(maxima));
  vec exp_sums = {};
  for (b = 0; b < blocks; ++b) {
    const vec p = exp(load(scores + b * W) - max_score);
    exp_sums += p;
    store(scores + b * W, p);
  }
  // Lanes past the length got e^-87: leave them out of the sum.
  float total = reduce_sum(exp_sums);
  for (int64_t t = length; t < blocks * W; ++t) total -= scores[t];

  constexpr int CHAINS = VECTORS <= 2 ? 4 : VECTORS <= 4 ? 2 : 1;
  vec sums[CHAINS][VECTORS] = {};
  int64_t t = 0;
  for (; t + CHAINS <= length; t += CHAINS)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const vec p = broadcast(scores[t + c]);
#pragma GCC unroll 8
      for (int d = 0; d < VECTORS; ++d)
        sums[c][d] += p * load_and_prefetch(values + (t + c) * D + d * W);
    }
  for (; t < length; ++t)
    for (int d = 0; d < VECTORS; ++d)
      sums[0][d] += broadcast(scores[t]) * load(values + t * D + d * W);
  for (int d = 0; d < VECTORS; ++d) {
    vec total_value = sums[0][d];
    for (int c = 1; c < CHAINS; ++c) total_value += sums[c][d];
    store(out + d * W, total_value / total);
  }
}

using AttendKernel = void (*)(const float*, const float*, const float*, int64_t, float, float*,
                              float*, int64_t);

// Null where the head size is not a number of whole vectors that is supported.
inline AttendKernel attend_kernel_for(int64_t head_dim) {
  if (head_dim % W) return nullptr;
  switch (head_dim / W) {
    case 1: return attend_head<1>;
    case 2: return attend_head<2>;
    case 3: return attend_head<3>;
    case 4: return attend_head<4>;
    case 5: return attend_head<5>;
    case 6: return attend_head<6>;
    case 7: return attend_head<7>;
    case 8: return attend_head<8>;
    case 16: return attend_head<16>;
    case 32: return attend_head<32>;
    default: return nullptr;
  }
}

}  // namespace PUNA_ISA
