// The key/value cache. Keys are stored in blocks of W tokens, (D, W) each, so that W scores come
// from one chain of multiply-adds and no sum runs across a vector; values are (T, D). Rounded to
// bf16 they are pairs: of a key's neighbours, in blocks of (D / 2, W), and of two tokens' values,
// (T / 2, D).
#pragma once

#include "base/bf16.h"
#include "base/buffer.h"
#include "base/simd.h"
#include "base/tile.h"

namespace PUNA_ISA {

class KVCache {
 public:
  KVCache(int64_t layers, int64_t kv_heads, int64_t head_dim, bool rounded)
      : layers_(layers),
        kv_heads_(kv_heads),
        head_dim_(head_dim),
        rounded_(rounded && MULTIPLIES_PAIRS) {}

  // Room for `rows` rows of `max_tokens` tokens each; what the rows held is lost.
  void reserve(int64_t rows, int64_t max_tokens) {
    const int64_t padded_tokens = ceil_div(max_tokens, W) * W;
    const int64_t count = layers_ * rows * kv_heads_ * padded_tokens * head_floats();
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

  // The keys and values of a row are written in the order of their tokens. `k` may be changed.
  void write(int64_t layer, int64_t row, int64_t head, int64_t t, float* k, const float* v) {
    const int64_t size = head_floats();
    if (rounded_) round_row(k, head_dim_, reinterpret_cast<Pair*>(k));
    float* block = keys(layer, row, head) + t / W * W * size + t % W;
    for (int64_t d = 0; d < size; ++d) std::memcpy(block + d * W, k + d, sizeof(float));
    if (rounded_)
      write_values(values(layer, row, head) + t / 2 * head_dim_, t % 2, v);
    else
      std::memcpy(values(layer, row, head) + t * head_dim_, v, head_dim_ * sizeof(float));
  }

  void copy_row(int64_t from, int64_t to, int64_t length) {
    const size_t bytes = ceil_div(length, W) * W * head_floats() * sizeof(float);
    for (int64_t layer = 0; layer < layers_; ++layer)
      for (int64_t head = 0; head < kv_heads_; ++head) {
        std::memcpy(keys(layer, to, head), keys(layer, from, head), bytes);
        std::memcpy(values(layer, to, head), values(layer, from, head), bytes);
      }
  }

  int64_t rows() const { return rows_; }
  int64_t max_tokens() const { return max_tokens_; }
  int64_t padded_tokens() const { return padded_tokens_; }
  bool rounded() const { return rounded_; }
  int64_t head_floats() const { return rounded_ ? head_dim_ / 2 : head_dim_; }  // of a token

 private:
  // The first token of two is paired with zeros until the second comes.
  void write_values(float* pairs, bool second, const float* v) const {
    if constexpr (MULTIPLIES_PAIRS)
      for (int64_t i = 0; i < head_dim_; i += W) {
        const vec first = second ? first_of((ivec)load(pairs + i)) : load(v + i);
        store(pairs + i, (vec)pair_up(first, second ? load(v + i) : vec{}));
      }
  }

  int64_t offset(int64_t layer, int64_t row, int64_t head) const {
    return ((layer * rows_ + row) * kv_heads_ + head) * padded_tokens_ * head_floats();
  }

  int64_t layers_, kv_heads_, head_dim_;
  bool rounded_;
  int64_t rows_ = 0, max_tokens_ = 0, padded_tokens_ = 0, capacity_ = 0;
  Buffer keys_, values_;
};

// A query head of a token: its query (D), the keys and values of its row, room for as many scores
// as the cache has tokens and for half as many pairs of them, and what becomes of it (D). Where the
// cache is rounded, the query is, too.
struct QueryHead {
  const float *q, *keys, *values;
  float *scores, *pairs, *out;
};

// A head's scores and values are summed a span of tokens at a time, so that the heads of one
// key/value head find in the nearest cache what the first of them has read. The sums run from the
// first token to the last, as in training (train/attention_impl.h).
constexpr int64_t SPAN_TOKENS = W == 4 ? 32 : 64;

// Heads of few vectors are done together: one sum waits for its own last addition.
constexpr int heads_together(int vectors) { return vectors <= 2 ? 4 : vectors <= 4 ? 2 : 1; }

// Loads, and prefetches what lies `distance` from there: the same place of the next heads' keys or
// values (15m, 32 rows: 6% more tokens).
template <typename Number>
__attribute__((always_inline)) inline auto load_and_prefetch(const Number* p, int64_t distance) {
  __builtin_prefetch(p + distance, 0, 2);
  return load(p);
}

// Scores, not yet scaled, of BLOCKS blocks of W keys of size D.
template <int D, int BLOCKS, typename Number>
inline void score_blocks(const Number* q, const Number* keys, float* scores, int64_t distance) {
  constexpr int SIZE = D / NUMBERS<Number>;
  vec sums[1][BLOCKS];
  clear(sums);
  for (int d = 0; d < SIZE; ++d) {
    const auto x = broadcast(q[d]);
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b)
      sums[0][b] = multiply_add(sums[0][b], x,
                                load_and_prefetch(keys + (b * SIZE + d) * W, distance));
  }
  store_tile(sums, scores, 0, false);
}

// Scores become e^(scale * (score - maximum)), not yet divided by their sum.
inline void exponentiate(float* scores, int64_t length, float scale) {
  const int64_t blocks = ceil_div(length, W);
  std::fill(scores + length, scores + blocks * W, scores[0]);
  vec maxima = load(scores);
  for (int64_t b = 1; b < blocks; ++b) maxima = max(maxima, load(scores + b * W));
  const vec maximum = broadcast(reduce_max(maxima));
  for (int64_t b = 0; b < blocks; ++b)
    store(scores + b * W, exp((load(scores + b * W) - maximum) * scale));
}

// The last score of an odd number is paired with zero.
inline void pair_scores(const QueryHead& head, int64_t length) {
  const int64_t padded = ceil_div(length, W) * W;
  std::fill(head.scores + length, head.scores + padded, 0.0f);
  round_row(head.scores, padded, reinterpret_cast<Pair*>(head.pairs));
}

// Adds the tokens' values, by their scores, to VECTORS vectors of the outs from FIRST on, and the
// scores to `totals`.
template <typename Number, int HEADS, int D, int FIRST, int VECTORS>
inline void sum_strip(const QueryHead* heads, Range tokens, float* totals, int64_t distance) {
  vec sums[HEADS][VECTORS], total[HEADS];
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; ++h) {
    total[h] = broadcast(totals[h]);
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) sums[h][i] = load(heads[h].out + FIRST + i * W);
  }
  constexpr bool PAIRS = std::is_same_v<Number, Pair>;
  for (int64_t t = tokens.begin; t < tokens.end; t += NUMBERS<Number>)
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h) {
      const int64_t at = t / NUMBERS<Number>;
      const float* scores = heads[h].scores + t;
      const auto score =
          broadcast(reinterpret_cast<const Number*>(PAIRS ? heads[h].pairs : heads[h].scores)[at]);
      const Number* values = reinterpret_cast<const Number*>(heads[h].values) + at * D + FIRST;
      if (FIRST == 0) total[h] += broadcast(scores[0]);
      if (FIRST == 0 && PAIRS) total[h] += broadcast(scores[1]);
#pragma GCC unroll 8
      for (int i = 0; i < VECTORS; ++i)
        sums[h][i] =
            multiply_add(sums[h][i], score, load_and_prefetch(values + i * W, distance));
    }
#pragma GCC unroll 4
  for (int h = 0; h < HEADS; ++h) {
    if (FIRST == 0) totals[h] = total[h][0];
#pragma GCC unroll 8
    for (int i = 0; i < VECTORS; ++i) store(heads[h].out + FIRST + i * W, sums[h][i]);
  }
}

template <typename Number, int HEADS, int D, int FIRST = 0>
inline void sum_values(const QueryHead* heads, Range tokens, float* totals, int64_t distance) {
  if constexpr (FIRST < D) {
    constexpr int VECTORS = std::min(8, (D - FIRST) / W);
    sum_strip<Number, HEADS, D, FIRST, VECTORS>(heads, tokens, totals, distance);
    sum_values<Number, HEADS, D, FIRST + VECTORS * W>(heads, tokens, totals, distance);
  }
}

// Calls use(tokens) for each span.
template <typename Use>
inline void for_each_span(int64_t length, Use use) {
  for (int64_t begin = 0; begin < length; begin += SPAN_TOKENS)
    use(Range{begin, std::min(begin + SPAN_TOKENS, length)});
}

// out (D) = softmax(scale * q . k[0..length)) v for each of `count` heads, whose sizes are VECTORS
// vectors. `totals` is room for (count). The keys and values of the next call lie `distance` from
// these.
template <int VECTORS, typename Number>
inline void attend_heads(const QueryHead* heads, int count, int64_t length, float scale,
                         float* totals, int64_t distance) {
  constexpr int D = VECTORS * W, TOGETHER = heads_together(VECTORS);
  for_each_span(length, [&](Range tokens) {
    const int blocks = static_cast<int>(ceil_div(tokens.end - tokens.begin, W));
    for (int h = 0; h < count; ++h)
      dispatch_rows<SPAN_TOKENS / W>(blocks, [&](auto n) {
        score_blocks<D, n>(reinterpret_cast<const Number*>(heads[h].q),
                           reinterpret_cast<const Number*>(heads[h].keys) +
                               tokens.begin * D / NUMBERS<Number>,
                           heads[h].scores + tokens.begin, distance);
      });
  });
  for (int h = 0; h < count; ++h) {
    exponentiate(heads[h].scores, length, scale);
    if (std::is_same_v<Number, Pair>) pair_scores(heads[h], length);
    std::fill_n(heads[h].out, D, 0.0f);
    totals[h] = 0.0f;
  }
  for_each_span(length, [&](Range tokens) {
    for (int h = 0; h < count; h += TOGETHER)
      dispatch_rows<TOGETHER>(std::min(TOGETHER, count - h), [&](auto n) {
        sum_values<Number, n, D>(heads + h, tokens, totals + h, distance);
      });
  });
  for (int h = 0; h < count; ++h) {
    const float factor = 1.0f / totals[h];
    for (int d = 0; d < D; d += W) store(heads[h].out + d, load(heads[h].out + d) * factor);
  }
}

// `attend_heads` of a head size, and how many heads it does at a time.
struct AttendKernel {
  void (*run)(const QueryHead*, int, int64_t, float, float*, int64_t);
  int64_t together;
};

template <int VECTORS>
inline AttendKernel attend_kernel(bool rounded) {
  return {rounded ? attend_heads<VECTORS, Rounded> : attend_heads<VECTORS, float>,
          heads_together(VECTORS)};
}

// For a cache that is `rounded`, or not. `run` is null where the head size is not a number of whole
// vectors that is supported.
inline AttendKernel attend_kernel_for(int64_t head_dim, bool rounded) {
  switch (head_dim % W ? 0 : head_dim / W) {
    case 1: return attend_kernel<1>(rounded);
    case 2: return attend_kernel<2>(rounded);
    case 3: return attend_kernel<3>(rounded);
    case 4: return attend_kernel<4>(rounded);
    case 5: return attend_kernel<5>(rounded);
    case 6: return attend_kernel<6>(rounded);
    case 7: return attend_kernel<7>(rounded);
    case 8: return attend_kernel<8>(rounded);
    case 16: return attend_kernel<16>(rounded);
    case 32: return attend_kernel<32>(rounded);
    default: return {nullptr, 1};
  }
}

}  // namespace PUNA_ISA
