// Attention for training, forward and backward. A thread takes all of a segment's key/value head,
// so no two threads add to the same gradient. The query heads that share it are rows of one matrix:
// row t * per + h is head h of token t, and sees the keys up to t.
//
// Scores lie as (keys, rows): rows are lanes of vectors. So keys and values need no transposing, a
// softmax needs no sums across lanes, and the mask skips whole vectors. Compared with scores as
// (rows, keys) of one head after the other: 1.2 times as fast at 16 x 256 tokens, 6 heads, 2
// key/value heads of 32; 1.1 times with 6 heads of 48.
#pragma once

#include "base/matrix.h"
#include "base/standard.h"
#include "train/attention.h"

namespace PUNA_ISA {

constexpr int LANES = 48;     // rows at a time
constexpr int64_t KEYS = 96;  // keys at a time, backward: 18 KB of scores (256 were 3% slower)

// c (R, NV vectors) = a (R, count) b (count, NV vectors), or added to what stands in c.
template <int R, int NV>
inline void tile(const float* a, int64_t a_row, int64_t a_next, const float* b, int64_t b_row,
                 int64_t count, float* c, int64_t c_row, bool add) {
  vec sums[R][NV];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) sums[r][j] = vec{};
  for (int64_t i = 0; i < count; ++i, a += a_next, b += b_row) {
    vec held[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) held[j] = load(b + j * W);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const vec value = all(a[r * a_row]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) sums[r][j] += value * held[j];
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      float* to = c + r * c_row + j * W;
      store(to, add ? load(to) + sums[r][j] : sums[r][j]);
    }
}

// 24 accumulators of 32 registers, or 12 of 16.
constexpr int tile_rows(int vectors) { return (W == 16 ? 24 : 12) / (vectors < 2 ? 2 : vectors); }

template <int NV>
inline void strip(int64_t rows, const float* a, int64_t a_row, int64_t a_next, const float* b,
                  int64_t b_row, int64_t count, float* c, int64_t c_row, bool add) {
  constexpr int R = tile_rows(NV);
  for (int64_t r = 0; r < rows; r += R)
    with_rows<R>(static_cast<int>(std::min<int64_t>(R, rows - r)), [&](auto n) {
      tile<n, NV>(a + r * a_row, a_row, a_next, b, b_row, count, c + r * c_row, c_row, add);
    });
}

// c (rows, vectors * W) = or += a (rows, count) b (count, vectors * W); a's numbers lie `a_row`
// apart from row to row and `a_next` within a row.
inline void multiply_add(int64_t rows, int vectors, const float* a, int64_t a_row, int64_t a_next,
                         const float* b, int64_t b_row, int64_t count, float* c, int64_t c_row,
                         bool add) {
  for (; vectors >= 4; vectors -= 4, b += 4 * W, c += 4 * W)
    strip<4>(rows, a, a_row, a_next, b, b_row, count, c, c_row, add);
  if (vectors == 3) strip<3>(rows, a, a_row, a_next, b, b_row, count, c, c_row, add);
  if (vectors == 2) strip<2>(rows, a, a_row, a_next, b, b_row, count, c, c_row, add);
  if (vectors == 1) strip<1>(rows, a, a_row, a_next, b, b_row, count, c, c_row, add);
}

// One thread's part of the work: a segment's key/value head after the other.
class AttentionWorker {
 public:
  AttentionWorker(const puna::Attention& a, int64_t longest, bool backward)
      : a_(a),
        d_(a.head_dim),
        per_(a.heads / a.kv_heads),
        vectors_(static_cast<int>(a.head_dim / W)),
        step_(vectors_ == 3 ? 8 : 12),
        keys_(buffer(longest * d_)),
        values_(buffer(longest * d_)),
        q_(buffer(2 * LANES * d_)),
        sums_(buffer(LANES * d_)),
        scores_(buffer(LANES * (backward ? KEYS : longest))) {
    if (!backward) return;
    d_keys_ = buffer(longest * d_);
    d_values_ = buffer(longest * d_);
    d_out_ = buffer(2 * LANES * d_);
    d_scores_ = buffer(LANES * KEYS);
  }

  void forward(int64_t segment, int64_t group) {
    enter(segment, group);
    for_each_block([&] { forward_block(); });
  }

  void backward(const puna::AttentionBackward& back, int64_t segment, int64_t group) {
    enter(segment, group);
    std::fill_n(d_keys_.get(), length_ * d_, 0.0f);
    std::fill_n(d_values_.get(), length_ * d_, 0.0f);
    for_each_block([&] { backward_block(back); });
    const int64_t width = a_.kv_heads * d_, at = begin_ * width + group_ * d_;
    copy(d_keys_.get(), d_, length_, a_.scale, back.dk + at, width);
    copy(d_values_.get(), d_, length_, 1.0f, back.dv + at, width);
  }

 private:
  void enter(int64_t segment, int64_t group) {
    begin_ = a_.cuts[segment];
    length_ = a_.cuts[segment + 1] - begin_;
    group_ = group;
    copy(a_.k + begin_ * a_.k_stride + group * d_, a_.k_stride, length_, 1.0f, keys_.get(), d_);
    copy(a_.v + begin_ * a_.v_stride + group * d_, a_.v_stride, length_, 1.0f, values_.get(), d_);
  }

  // (count, D), times a factor.
  void copy(const float* from, int64_t stride, int64_t count, float factor, float* to,
            int64_t to_stride) const {
    for (int64_t n = 0; n < count; ++n, from += stride, to += to_stride)
      for (int64_t i = 0; i < d_; i += W) store(to + i, load(from + i) * factor);
  }

  // Blocks of nearly the same size: a last one of one vector would be slow.
  template <typename Use>
  void for_each_block(Use use) {
    const int64_t rows = length_ * per_, vectors = (rows + W - 1) / W;
    const int blocks = static_cast<int>((vectors * W + LANES - 1) / LANES);
    for (int block = 0; block < blocks; ++block) {
      const Range range = share(vectors, block, blocks);
      first_ = range.begin * W;
      count_ = std::min(rows, range.end * W) - first_;
      lanes_ = static_cast<int>(range.end - range.begin);
      end_ = token(count_ - 1) + 1;
      use();
    }
  }

  int64_t token(int64_t row) const { return (first_ + row) / per_; }

  // Calls use(row, token, head) for the block's rows; the token is one of the batch's.
  template <typename Use>
  void for_each_row(Use use) const {
    int64_t t = begin_ + token(0), h = first_ % per_;
    for (int64_t r = 0; r < count_; ++r) {
      use(r, t, group_ * per_ + h);
      if (++h == per_) h = 0, ++t;
    }
  }

  // The block's rows (LANES, D), and behind them the same as columns (D, LANES).
  void take(const float* from, int64_t stride, float* rows) const {
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      copy(from + t * stride + h * d_, d_, 1, 1.0f, rows + r * d_, d_);
    });
    const int64_t filled = lanes_ * W;
    std::fill(rows + count_ * d_, rows + filled * d_, 0.0f);
    float* columns = rows + LANES * d_;
    for (int64_t r = 0; r < filled; r += W)
      for (int64_t i = 0; i < d_; i += W)
        transpose(rows + r * d_ + i, d_, columns + i * LANES + r, LANES);
  }

  // How many of the block's first rows do not see key j.
  int64_t blind(int64_t j) const { return std::max<int64_t>(0, j * per_ - first_); }

  // Of `keys`, where those end that all rows from `row` on see.
  int64_t all_see(Range keys, int64_t row) const {
    return std::max(keys.begin, std::min(keys.end, token(row) + 1));
  }

  // to (keys, LANES) = from (length, D) times the block's columns. What lies in vectors that see
  // nothing is not written: the mask replaces it.
  void against(const float* from, Range keys, const float* columns, float* to) const {
    const int64_t seen = all_see(keys, 0);
    multiply_add(seen - keys.begin, lanes_, from + keys.begin * d_, d_, 1, columns, LANES, d_, to,
                 LANES, false);
    for (int64_t j = seen; j < keys.end; j += 8) {
      const int64_t skip = blind(j) / W;
      multiply_add(std::min<int64_t>(8, keys.end - j), lanes_ - static_cast<int>(skip),
                   from + j * d_, d_, 1, columns + skip * W, LANES, d_,
                   to + (j - keys.begin) * LANES + skip * W, LANES, false);
    }
  }

  // sums (rows, D) = or += scores (keys, LANES), transposed, times from (length, D).
  void sum_keys(const float* scores, Range keys, const float* from) const {
    for (int64_t r = 0; r < count_; r += step_) {
      const int64_t rows = std::min(step_, count_ - r);
      const int64_t end = std::min(keys.end, token(r + rows - 1) + 1);
      if (end <= keys.begin) continue;
      multiply_add(rows, vectors_, scores + r, 1, LANES, from + keys.begin * d_, d_,
                   end - keys.begin, sums_.get() + r * d_, d_, keys.begin > 0);
    }
  }

  // to (length, D) += scores (keys, LANES) times the block's rows.
  void sum_rows(const float* scores, Range keys, const float* rows, float* to) const {
    const int64_t seen = all_see(keys, 0);
    multiply_add(seen - keys.begin, vectors_, scores, LANES, 1, rows, d_, count_,
                 to + keys.begin * d_, d_, true);
    for (int64_t j = seen; j < keys.end; j += step_) {
      const int64_t skip = blind(j);
      multiply_add(std::min(step_, keys.end - j), vectors_,
                   scores + (j - keys.begin) * LANES + skip, LANES, 1, rows + skip * d_, d_,
                   count_ - skip, to + j * d_, d_, true);
    }
  }

  // Calls use(where, mask) for vector `i` of the block's rows and each key: where it lies among the
  // scores, and a function of two vectors that takes the first for the rows that see the key.
  template <typename Use>
  void for_each_key(int i, Range keys, Use use) const {
    ivec lanes;
    for (int n = 0; n < W; ++n) lanes[n] = i * W + n;
    const int64_t seen = all_see(keys, i * W);
    int64_t at = i * W, j = keys.begin;
    for (; j < seen; ++j, at += LANES) use(at, [](vec yes, vec) { return yes; });
    for (; j < keys.end; ++j, at += LANES) {
      const ivec sees = lanes >= static_cast<int32_t>(blind(j));
      use(at, [&](vec yes, vec no) { return select(sees, yes, no); });
    }
  }

  void forward_block() {
    take(a_.q, a_.q_stride, q_.get());
    const Range keys{0, end_};
    against(keys_.get(), keys, q_.get() + LANES * d_, scores_.get());
    alignas(64) float totals[LANES], largest[LANES];
    for (int i = 0; i < lanes_; ++i) softmax(i, totals + i * W, largest + i * W);
    sum_keys(scores_.get(), keys, values_.get());
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      const int64_t at = t * a_.heads + h;
      copy(sums_.get() + r * d_, d_, 1, 1.0f / totals[r], a_.out + at * d_, d_);
      a_.lse[at] = largest[r] * a_.scale + std::log(totals[r]);
    });
  }

  // e^(score - largest), zero where a row does not see the key, and the sums.
  void softmax(int i, float* totals, float* largest) const {
    float* scores = scores_.get();
    const Range keys{0, end_};
    vec top = load(scores + i * W), total = {};  // every row sees the first key
    for_each_key(i, keys,
                 [&](int64_t at, auto mask) { top = max(top, mask(load(scores + at), top)); });
    for_each_key(i, keys, [&](int64_t at, auto mask) {
      const vec e = mask(exp((load(scores + at) - top) * a_.scale), vec{});
      total += e;
      store(scores + at, e);
    });
    store(totals, total);
    store(largest, top);
  }

  void backward_block(const puna::AttentionBackward& back) {
    take(a_.q, a_.q_stride, q_.get());
    take(back.d_out, back.d_out_stride, d_out_.get());
    alignas(64) float deltas[LANES] = {}, lse[LANES] = {};
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      const int64_t at = t * a_.heads + h;
      vec total = {};
      for (int64_t i = 0; i < d_; i += W)
        total += load(a_.out + at * d_ + i) * load(d_out_.get() + r * d_ + i);
      deltas[r] = sum(total);
      lse[r] = a_.lse[at];
    });
    for (int64_t j = 0; j < end_; j += KEYS)
      backward_keys({j, std::min(end_, j + KEYS)}, deltas, lse);
    for_each_row([&](int64_t r, int64_t t, int64_t h) {
      copy(sums_.get() + r * d_, d_, 1, a_.scale, back.dq + (t * a_.heads + h) * d_, d_);
    });
  }

  void backward_keys(Range keys, const float* deltas, const float* lse) const {
    float *p = scores_.get(), *ds = d_scores_.get();
    against(keys_.get(), keys, q_.get() + LANES * d_, p);
    against(values_.get(), keys, d_out_.get() + LANES * d_, ds);
    for (int i = 0; i < lanes_; ++i)
      softmax_backward(i, keys, load(deltas + i * W), load(lse + i * W));
    sum_keys(ds, keys, keys_.get());
    sum_rows(ds, keys, q_.get(), d_keys_.get());
    sum_rows(p, keys, d_out_.get(), d_values_.get());
  }

  // Scores become probabilities, and d_p becomes the gradient of the scaled scores.
  void softmax_backward(int i, Range keys, vec delta, vec lse) const {
    float *scores = scores_.get(), *d_p = d_scores_.get();
    for_each_key(i, keys, [&](int64_t at, auto mask) {
      const vec p = exp(load(scores + at) * a_.scale - lse);
      store(scores + at, mask(p, vec{}));
      store(d_p + at, mask(p * (load(d_p + at) - delta), vec{}));
    });
  }

  const puna::Attention& a_;
  int64_t d_, per_;
  int vectors_;
  int64_t step_;  // rows or keys next to the mask taken together: a tile's height
  int64_t begin_ = 0, length_ = 0, group_ = 0;
  int64_t first_ = 0, count_ = 0, end_ = 0;  // the block's rows, and where the keys they see end
  int lanes_ = 0;                            // its vectors
  Buffer keys_, values_, q_, sums_, scores_, d_keys_, d_values_, d_out_, d_scores_;
};

// Calls work(worker, segment, group) for each, whichever thread is free.
template <typename Work>
inline void for_each_head(const puna::Attention& a, bool backward, int threads, Work work) {
  int64_t longest = 0;
  for (int64_t s = 0; s < a.segments; ++s) longest = std::max(longest, a.cuts[s + 1] - a.cuts[s]);
  const int64_t items = a.segments * a.kv_heads;
  if (items == 0) return;
  const int workers = static_cast<int>(std::min<int64_t>(threads, items));
  std::vector<AttentionWorker> each;  // made here, where running out of memory is an exception
  for (int i = 0; i < workers; ++i) each.emplace_back(a, longest, backward);
  std::atomic<int64_t> next{0};
  puna::parallel(workers, [&](int part, int) {
    for (int64_t item; (item = next.fetch_add(1)) < items;)
      work(each[part], item / a.kv_heads, item % a.kv_heads);
  });
}

inline void attention(const puna::Attention& a, int threads) {
  for_each_head(a, false, threads, [](AttentionWorker& worker, int64_t segment, int64_t group) {
    worker.forward(segment, group);
  });
}

inline void attention_backward(const puna::AttentionBackward& back, int threads) {
  for_each_head(back.of, true, threads,
                [&](AttentionWorker& worker, int64_t segment, int64_t group) {
                  worker.backward(back, segment, group);
                });
}

}  // namespace PUNA_ISA
