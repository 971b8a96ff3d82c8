// Attention for training, forward and backward. One thread handles a whole key/value head of a
// segment, so no two threads add to the same gradient. The query heads that share the key/value
// head are rows of one matrix: row t * group_size + h is head h of token t, and attends to the keys
// up to t.
//
// Scores are stored as (keys, rows), so that rows are lanes of vectors: keys and values need no
// transposing, a softmax needs no sums across lanes, and the mask skips whole vectors. This was 1.2
// times as fast as scores (rows, keys) of one head after the other at 16 x 256 tokens, 6 heads,
// 2 key/value heads of 32; 1.1 times with 6 heads of 48.
#pragma once

#include "base/buffer.h"
#include "base/standard.h"
#include "train/attention.h"
#include "train/strips.h"

namespace PUNA_ISA {

constexpr int BLOCK_ROWS = 48;      // rows at a time
constexpr int64_t BLOCK_KEYS = 96;  // keys at a time, backward: 18 KB; 256 were 3% slower

// What a worker is for: `forward_cached`, or what it is called like.
enum class Pass { cached, forward, backward };

// What one thread needs to do one key/value head of a segment after the other.
class AttentionWorker {
 public:
  // Room for segments of up to `longest` tokens.
  AttentionWorker(int64_t head_dim, int64_t group_size, int64_t longest, Pass pass)
      : head_dim_(head_dim),
        group_size_(group_size),
        vectors_(static_cast<int>(head_dim / W)),
        tile_rows_(vectors_ == 3 ? 8 : 12),
        q_(allocate(2 * BLOCK_ROWS * head_dim_)),
        sums_(allocate(BLOCK_ROWS * head_dim_)),
        scores_(allocate(BLOCK_ROWS * (pass == Pass::backward ? BLOCK_KEYS : longest))) {
    if (pass == Pass::cached) return;
    keys_ = allocate(longest * head_dim_);
    values_ = allocate(longest * head_dim_);
    if (pass == Pass::forward) return;
    d_keys_ = allocate(longest * head_dim_);
    d_values_ = allocate(longest * head_dim_);
    d_out_ = allocate(2 * BLOCK_ROWS * head_dim_);
    d_scores_ = allocate(BLOCK_ROWS * BLOCK_KEYS);
  }

  void forward(const puna::Attention& a, int64_t segment, int64_t kv_head) {
    a_ = &a;
    load_segment(segment, kv_head);
    keys_in_blocks_ = false;
    if (a.bf16)
      forward_blocks(pair_keys<Rounded>(), pair_values<Rounded>());
    else
      forward_blocks(keys_.get(), values_.get());
  }

  // The queries of `tokens` alone, with the keys and values of all tokens up to them as a cache has
  // them (decode/cache.h), rounded where `a` says so. q and out begin with the first of `tokens`.
  void forward_cached(const puna::Attention& a, const float* keys, const float* values,
                      Range tokens, int64_t kv_head) {
    a_ = &a;
    first_token_ = -tokens.begin;
    first_query_ = tokens.begin;
    token_count_ = tokens.end;
    kv_head_ = kv_head;
    keys_in_blocks_ = true;
    if (a.bf16)
      forward_blocks(reinterpret_cast<const Rounded*>(keys),
                     reinterpret_cast<const Rounded*>(values));
    else
      forward_blocks(keys, values);
  }

  void backward(const puna::AttentionBackward& back, int64_t segment, int64_t kv_head) {
    a_ = &back.of;
    load_segment(segment, kv_head);
    if (a_->bf16) {
      widen(token_count_ * head_dim_, keys_.get());
      widen(token_count_ * head_dim_, values_.get());
    }
    std::fill_n(d_keys_.get(), token_count_ * head_dim_, 0.0f);
    std::fill_n(d_values_.get(), token_count_ * head_dim_, 0.0f);
    for_each_block([&] { backward_block(back); });
    const int64_t width = a_->kv_heads * head_dim_,
                  offset = first_token_ * width + kv_head_ * head_dim_;
    copy(d_keys_.get(), head_dim_, token_count_, a_->scale, back.dk + offset, width);
    copy(d_values_.get(), head_dim_, token_count_, 1.0f, back.dv + offset, width);
  }

 private:
  void load_segment(int64_t segment, int64_t kv_head) {
    first_token_ = a_->cu_seqlens[segment];
    first_query_ = 0;
    token_count_ = a_->cu_seqlens[segment + 1] - first_token_;
    kv_head_ = kv_head;
    copy(a_->k + first_token_ * a_->k_stride + kv_head * head_dim_, a_->k_stride, token_count_,
         1.0f, keys_.get(), head_dim_);
    copy(a_->v + first_token_ * a_->v_stride + kv_head * head_dim_, a_->v_stride, token_count_,
         1.0f, values_.get(), head_dim_);
  }

  // Rounds to bf16 and back: the scores of a backward are those of its forward, summed in fp32.
  static void widen(int64_t count, float* x) {
    if constexpr (MULTIPLIES_PAIRS)
      for (int64_t i = 0; i < count; i += W) store(x + i, first_of(pair_up(load(x + i), vec{})));
  }

  // The segment's keys (T, D / 2), where they were loaded.
  template <typename Number>
  const Number* pair_keys() {
    auto* pairs = reinterpret_cast<Number*>(keys_.get());
    if constexpr (MULTIPLIES_PAIRS) round_row(keys_.get(), token_count_ * head_dim_, pairs);
    return pairs;
  }

  // Its values: pairs of two tokens, (T / 2, D).
  template <typename Number>
  const Number* pair_values() {
    float* values = values_.get();
    if constexpr (MULTIPLIES_PAIRS)
      for (int64_t t = 0; t < token_count_; t += 2)
        for (int64_t i = 0; i < head_dim_; i += W) {
          const float* at = values + t * head_dim_ + i;
          store(values + t / 2 * head_dim_ + i,
                (vec)pair_up(load(at), t + 1 < token_count_ ? load(at + head_dim_) : vec{}));
        }
    return reinterpret_cast<Number*>(values);
  }

  // Copies vectors (count, D), times a factor.
  void copy(const float* from, int64_t stride, int64_t count, float factor, float* to,
            int64_t to_stride) const {
    for (int64_t n = 0; n < count; ++n, from += stride, to += to_stride)
      for (int64_t i = 0; i < head_dim_; i += W) store(to + i, load(from + i) * factor);
  }

  // Blocks have nearly the same size: a last block of one vector would be slow.
  template <typename Use>
  void for_each_block(Use use) {
    const int64_t first = first_query_ * group_size_, rows = token_count_ * group_size_ - first;
    const int64_t vectors = (rows + W - 1) / W;
    const int blocks = static_cast<int>((vectors * W + BLOCK_ROWS - 1) / BLOCK_ROWS);
    for (int block = 0; block < blocks; ++block) {
      const Range range = split(vectors, block, blocks);
      first_row_ = first + range.begin * W;
      row_count_ = std::min(rows, range.end * W) - range.begin * W;
      block_vectors_ = static_cast<int>(range.end - range.begin);
      key_count_ = token(row_count_ - 1) + 1;
      use();
    }
  }

  int64_t token(int64_t row) const { return (first_row_ + row) / group_size_; }

  // Calls use(row, token, head) for the block's rows; the token is counted in the whole batch.
  template <typename Use>
  void for_each_row(Use use) const {
    int64_t t = first_token_ + token(0), h = first_row_ % group_size_;
    for (int64_t r = 0; r < row_count_; ++r) {
      use(r, t, kv_head_ * group_size_ + h);
      if (++h == group_size_) h = 0, ++t;
    }
  }

  // Loads the block's rows (BLOCK_ROWS, D), and behind them their transpose (D, BLOCK_ROWS). Of
  // pairs there are D / 2, as far apart as D numbers.
  template <typename Number>
  void load_block(const float* from, int64_t stride, float* rows) const {
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      copy(from + t * stride + h * head_dim_, head_dim_, 1, 1.0f, rows + r * head_dim_, head_dim_);
    });
    const int64_t filled = block_vectors_ * W;
    std::fill(rows + row_count_ * head_dim_, rows + filled * head_dim_, 0.0f);
    if constexpr (std::is_same_v<Number, Pair>)
      for (float* row = rows; row < rows + filled * head_dim_; row += head_dim_)
        round_row(row, head_dim_, reinterpret_cast<Pair*>(row));
    float* columns = rows + BLOCK_ROWS * head_dim_;
    for (int64_t r = 0; r < filled; r += W)
      for (int64_t i = 0; i < head_dim_ / NUMBERS<Number>; i += W)
        transpose(rows + r * head_dim_ + i, head_dim_, columns + i * BLOCK_ROWS + r, BLOCK_ROWS);
  }

  // How many of the block's first rows may not attend to key j.
  int64_t masked_rows(int64_t j) const {
    return std::max<int64_t>(0, j * group_size_ - first_row_);
  }

  // The end of those `keys` that all rows from `row` on attend to.
  int64_t unmasked_end(Range keys, int64_t row) const {
    return std::max(keys.begin, std::min(keys.end, token(row) + 1));
  }

  // to (keys, BLOCK_ROWS) = keys (T, D) times the block's columns (D, BLOCK_ROWS). Vectors of which
  // every row is masked are not written; the mask replaces them later.
  template <typename Number>
  void compute_scores(const Keys<Number>& from, Range keys, const float* columns, float* to) const {
    const int64_t unmasked = unmasked_end(keys, 0);
    for (int64_t j = keys.begin, end; j < keys.end; j = end) {
      end = from.matrix_end(j, j < unmasked ? unmasked : std::min(keys.end, j + 8));
      const int64_t skip = masked_rows(j) / W;
      multiply(end - j, block_vectors_ - static_cast<int>(skip), from.of(j), from.row(),
               from.inner(), reinterpret_cast<const Number*>(columns) + skip * W, BLOCK_ROWS,
               from.size, to + (j - keys.begin) * BLOCK_ROWS + skip * W, BLOCK_ROWS, false);
    }
  }

  // sums (rows, D) = scores (keys, BLOCK_ROWS) transposed, times from (length, D); added to sums
  // for all but the first keys. Of pairs, which begin with the first key, each is of two keys.
  template <typename Number>
  void sum_over_keys(const Number* scores, Range keys, const Number* from) const {
    for (int64_t r = 0; r < row_count_; r += tile_rows_) {
      const int64_t rows = std::min(tile_rows_, row_count_ - r);
      const int64_t end = std::min(keys.end, token(r + rows - 1) + 1);
      if (end <= keys.begin) continue;
      multiply(rows, vectors_, scores + r, 1, BLOCK_ROWS, from + keys.begin * head_dim_, head_dim_,
               ceil_div(end - keys.begin, NUMBERS<Number>), sums_.get() + r * head_dim_, head_dim_,
               keys.begin > 0);
    }
  }

  // to (length, D) += scores (keys, BLOCK_ROWS) times the block's rows.
  void sum_over_rows(const float* scores, Range keys, const float* rows, float* to) const {
    const int64_t unmasked = unmasked_end(keys, 0);
    multiply(unmasked - keys.begin, vectors_, scores, BLOCK_ROWS, 1, rows, head_dim_, row_count_,
             to + keys.begin * head_dim_, head_dim_, true);
    for (int64_t j = unmasked; j < keys.end; j += tile_rows_) {
      const int64_t skip = masked_rows(j);
      multiply(std::min(tile_rows_, keys.end - j), vectors_,
               scores + (j - keys.begin) * BLOCK_ROWS + skip, BLOCK_ROWS, 1,
               rows + skip * head_dim_, head_dim_, row_count_ - skip, to + j * head_dim_, head_dim_,
               true);
    }
  }

  // Calls use(offset, mask) for vector `i` of the block's rows and each key. `offset` is its place
  // in the scores; mask(a, b) takes lanes of a for rows that attend to the key, else of b.
  template <typename Use>
  void for_each_key(int i, Range keys, Use use) const {
    ivec lanes;
    for (int n = 0; n < W; ++n) lanes[n] = i * W + n;
    const int64_t unmasked = unmasked_end(keys, i * W);
    int64_t offset = i * W, j = keys.begin;
    for (; j < unmasked; ++j, offset += BLOCK_ROWS) use(offset, [](vec a, vec) { return a; });
    for (; j < keys.end; ++j, offset += BLOCK_ROWS) {
      const ivec visible = lanes >= static_cast<int32_t>(masked_rows(j));
      use(offset, [&](vec a, vec b) { return select(visible, a, b); });
    }
  }

  template <typename Number>
  void forward_blocks(const Number* keys, const Number* values) {
    const Keys<Number> all{keys, head_dim_ / NUMBERS<Number>, keys_in_blocks_};
    for_each_block([&] { forward_block(all, values); });
  }

  template <typename Number>
  void forward_block(const Keys<Number>& all, const Number* values) {
    load_block<Number>(a_->q, a_->q_stride, q_.get());
    const Range keys{0, key_count_};
    compute_scores(all, keys, q_.get() + BLOCK_ROWS * head_dim_, scores_.get());
    alignas(64) float totals[BLOCK_ROWS], row_max[BLOCK_ROWS];
    for (int i = 0; i < block_vectors_; ++i)
      softmax_vector<Number>(i, totals + i * W, row_max + i * W);
    sum_over_keys(reinterpret_cast<const Number*>(scores_.get()), keys, values);
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      const int64_t offset = t * a_->heads + h;
      copy(sums_.get() + r * head_dim_, head_dim_, 1, 1.0f / totals[r],
           a_->out + offset * head_dim_, head_dim_);
      if (a_->lse) a_->lse[offset] = row_max[r] * a_->scale + std::log(totals[r]);
    });
  }

  // Vector `i` of the block's rows: scores become e^(score - row_max), or zero where masked; two
  // keys' become the pair of half their place.
  template <typename Number>
  void softmax_vector(int i, float* totals, float* row_max) const {
    float* scores = scores_.get();
    const Range keys{0, key_count_};
    vec maximum = load(scores + i * W), total = {};  // every row attends to the first key
    [[maybe_unused]] vec waiting = {};
    [[maybe_unused]] int64_t key = 0;
    const auto keep = [&](int64_t offset, vec e) {
      if constexpr (std::is_same_v<Number, float>)
        store(scores + offset, e);
      else if (key++ % 2)
        store(scores + (key / 2 - 1) * BLOCK_ROWS + i * W, (vec)pair_up(waiting, e));
      else
        waiting = e;
    };
    for_each_key(i, keys, [&](int64_t offset, auto mask) {
      maximum = max(maximum, mask(load(scores + offset), maximum));
    });
    for_each_key(i, keys, [&](int64_t offset, auto mask) {
      const vec e = mask(exp((load(scores + offset) - maximum) * a_->scale), vec{});
      total += e;
      keep(offset, e);
    });
    if (NUMBERS<Number> > 1 && key_count_ % 2) keep(0, vec{});
    store(totals, total);
    store(row_max, maximum);
  }

  void backward_block(const puna::AttentionBackward& back) {
    load_block<float>(a_->q, a_->q_stride, q_.get());
    if (a_->bf16) widen(2 * BLOCK_ROWS * head_dim_, q_.get());
    load_block<float>(back.d_out, back.d_out_stride, d_out_.get());
    alignas(64) float deltas[BLOCK_ROWS] = {}, lse[BLOCK_ROWS] = {};
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      const int64_t offset = t * a_->heads + h;
      vec total = {};
      for (int64_t i = 0; i < head_dim_; i += W)
        total += load(a_->out + offset * head_dim_ + i) * load(d_out_.get() + r * head_dim_ + i);
      deltas[r] = reduce_sum(total);
      lse[r] = a_->lse[offset];
    });
    for (int64_t j = 0; j < key_count_; j += BLOCK_KEYS)
      backward_keys({j, std::min(key_count_, j + BLOCK_KEYS)}, deltas, lse);
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      copy(sums_.get() + r * head_dim_, head_dim_, 1, a_->scale,
           back.dq + (t * a_->heads + h) * head_dim_, head_dim_);
    });
  }

  void backward_keys(Range keys, const float* deltas, const float* lse) const {
    float *p = scores_.get(), *ds = d_scores_.get();
    const auto rows = [&](const Buffer& x) { return Keys<float>{x.get(), head_dim_, false}; };
    compute_scores(rows(keys_), keys, q_.get() + BLOCK_ROWS * head_dim_, p);
    compute_scores(rows(values_), keys, d_out_.get() + BLOCK_ROWS * head_dim_, ds);
    for (int i = 0; i < block_vectors_; ++i)
      softmax_backward_vector(i, keys, load(deltas + i * W), load(lse + i * W));
    sum_over_keys<float>(ds, keys, keys_.get());
    sum_over_rows(ds, keys, q_.get(), d_keys_.get());
    sum_over_rows(p, keys, d_out_.get(), d_values_.get());
  }

  // Scores become probabilities, and d_p becomes the gradient of the scaled scores.
  void softmax_backward_vector(int i, Range keys, vec delta, vec lse) const {
    float *scores = scores_.get(), *d_p = d_scores_.get();
    for_each_key(i, keys, [&](int64_t offset, auto mask) {
      const vec p = exp(load(scores + offset) * a_->scale - lse);
      store(scores + offset, mask(p, vec{}));
      store(d_p + offset, mask(p * (load(d_p + offset) - delta), vec{}));
    });
  }

  const puna::Attention* a_ = nullptr;
  int64_t head_dim_, group_size_;
  int vectors_;
  int64_t tile_rows_;  // rows or keys that are done together next to the mask
  int64_t first_token_ = 0, token_count_ = 0, kv_head_ = 0, first_query_ = 0;
  int64_t first_row_ = 0, row_count_ = 0, key_count_ = 0;  // of the block; keys from 0 on
  int block_vectors_ = 0;                                  // of its rows
  bool keys_in_blocks_ = false;
  Buffer keys_, values_, q_, sums_, scores_, d_keys_, d_values_, d_out_, d_scores_;
};

// Calls work(worker, segment, key/value head) for each; a thread takes the next one when it is
// free.
template <typename Work>
inline void for_each_segment_head(const puna::Attention& a, Pass pass, int threads, Work work) {
  int64_t longest = 0;
  for (int64_t s = 0; s < a.segments; ++s)
    longest = std::max(longest, a.cu_seqlens[s + 1] - a.cu_seqlens[s]);
  const int64_t items = a.segments * a.kv_heads;
  if (items == 0) return;
  const int worker_count = static_cast<int>(std::min<int64_t>(threads, items));
  std::vector<AttentionWorker> workers;  // allocated here, where std::bad_alloc can be caught
  for (int i = 0; i < worker_count; ++i)
    workers.emplace_back(a.head_dim, a.heads / a.kv_heads, longest, pass);
  std::atomic<int64_t> next{0};
  puna::parallel(worker_count, [&](int part, int) {
    for (int64_t item; (item = next.fetch_add(1)) < items;)
      work(workers[part], item / a.kv_heads, item % a.kv_heads);
  });
}

inline void attention(const puna::Attention& a, int threads) {
  for_each_segment_head(a, Pass::forward, threads,
                        [&](AttentionWorker& worker, int64_t segment, int64_t kv_head) {
                          worker.forward(a, segment, kv_head);
                        });
}

inline void attention_backward(const puna::AttentionBackward& back, int threads) {
  for_each_segment_head(back.of, Pass::backward, threads,
                        [&](AttentionWorker& worker, int64_t segment, int64_t kv_head) {
                          worker.backward(back, segment, kv_head);
                        });
}

}  // namespace PUNA_ISA
