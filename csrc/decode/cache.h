// Keys and values of every row, laid out for reading: keys in blocks of W tokens, (D, W) each, so
// that W scores are one chain of multiply-adds and no sum runs across a vector; values (T, D).
#pragma once

#include <cstring>

#include "base/matrix.h"

namespace PUNA_ISA {

class Cache {
 public:
  Cache(int64_t layers, int64_t kv_heads, int64_t head_dim)
      : layers_(layers), kv_heads_(kv_heads), head_dim_(head_dim) {}

  void reserve(int64_t rows, int64_t slots) {
    const int64_t padded = (slots + W - 1) / W * W;
    const int64_t count = layers_ * rows * kv_heads_ * padded * head_dim_;
    if (count > capacity_) {
      keys_ = buffer(count);
      values_ = buffer(count);
      capacity_ = count;
    }
    rows_ = rows;
    slots_ = slots;
    padded_ = padded;
  }

  float* keys(int64_t layer, int64_t row, int64_t head) {
    return keys_.get() + at(layer, row, head);
  }
  float* values(int64_t layer, int64_t row, int64_t head) {
    return values_.get() + at(layer, row, head);
  }

  void write(int64_t layer, int64_t row, int64_t head, int64_t t, const float* k, const float* v) {
    float* block = keys(layer, row, head) + t / W * W * head_dim_ + t % W;
    for (int64_t d = 0; d < head_dim_; ++d) block[d * W] = k[d];
    std::memcpy(values(layer, row, head) + t * head_dim_, v, head_dim_ * sizeof(float));
  }

  void copy_row(int64_t from, int64_t to, int64_t length) {
    const size_t bytes = (length + W - 1) / W * W * head_dim_ * sizeof(float);
    for (int64_t layer = 0; layer < layers_; ++layer)
      for (int64_t head = 0; head < kv_heads_; ++head) {
        std::memcpy(keys(layer, to, head), keys(layer, from, head), bytes);
        std::memcpy(values(layer, to, head), values(layer, from, head), bytes);
      }
  }

  int64_t rows() const { return rows_; }
  int64_t slots() const { return slots_; }
  int64_t padded() const { return padded_; }

 private:
  int64_t at(int64_t layer, int64_t row, int64_t head) const {
    return ((layer * rows_ + row) * kv_heads_ + head) * padded_ * head_dim_;
  }

  int64_t layers_, kv_heads_, head_dim_, rows_ = 0, slots_ = 0, padded_ = 0, capacity_ = 0;
  Buffer keys_, values_;
};

// out (D) = softmax(scale * q . k[0..length)) v, for one query head. `scores` has room for the
// padded cache. DV is the head size in vectors. `next` is how far from these keys and values lie
// those wanted next: while these are read, those are fetched (15m, 32 rows: 6% more tokens).
template <int DV>
inline void attend_head(const float* q, const float* keys, const float* values, int64_t length,
                        float scale, float* scores, float* out, int64_t next) {
  constexpr int D = DV * W;
  const auto fetched = [next](const float* p) __attribute__((always_inline)) {
    __builtin_prefetch(p + next, 0, 2);
    return load(p);
  };
  const int64_t blocks = (length + W - 1) / W;
  constexpr int TOGETHER = 4;  // chains side by side hide the latency of a multiply-add
  int64_t b = 0;
  for (; b + TOGETHER <= blocks; b += TOGETHER) {
    vec s[TOGETHER] = {};
    const float* k = keys + b * W * D;
    for (int d = 0; d < D; ++d) {
      const vec x = all(q[d]);
#pragma GCC unroll 4
      for (int i = 0; i < TOGETHER; ++i) s[i] += x * fetched(k + i * W * D + d * W);
    }
    for (int i = 0; i < TOGETHER; ++i) store(scores + (b + i) * W, s[i] * scale);
  }
  for (; b < blocks; ++b) {
    vec s = {};
    for (int d = 0; d < D; ++d) s += all(q[d]) * fetched(keys + b * W * D + d * W);
    store(scores + b * W, s * scale);
  }
  for (int64_t t = length; t < blocks * W; ++t) scores[t] = -1e30f;
  vec top = load(scores);
  for (b = 1; b < blocks; ++b) top = max(top, load(scores + b * W));
  const vec highest = all(largest(top));
  vec sums = {};
  for (b = 0; b < blocks; ++b) {
    const vec p = exp(load(scores + b * W) - highest);
    sums += p;
    store(scores + b * W, p);
  }
  // What stands past the length was scored e^-87: make it nothing, and leave it out of the sum.
  float total = sum(sums);
  for (int64_t t = length; t < blocks * W; ++t) total -= scores[t];

  constexpr int CHAINS = DV <= 2 ? 4 : DV <= 4 ? 2 : 1;
  vec acc[CHAINS][DV] = {};
  int64_t t = 0;
  for (; t + CHAINS <= length; t += CHAINS)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const vec p = all(scores[t + c]);
#pragma GCC unroll 8
      for (int d = 0; d < DV; ++d) acc[c][d] += p * fetched(values + (t + c) * D + d * W);
    }
  for (; t < length; ++t)
    for (int d = 0; d < DV; ++d) acc[0][d] += all(scores[t]) * load(values + t * D + d * W);
  for (int d = 0; d < DV; ++d) {
    vec all_chains = acc[0][d];
    for (int c = 1; c < CHAINS; ++c) all_chains += acc[c][d];
    store(out + d * W, all_chains / total);
  }
}

using Attend = void (*)(const float*, const float*, const float*, int64_t, float, float*, float*,
                        int64_t);

// Null where the head size is not one to eight whole vectors.
inline Attend attend_for(int64_t head_dim) {
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
