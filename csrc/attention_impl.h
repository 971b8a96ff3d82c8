// Attention for training, forward and backward. A thread takes all of a segment's key/value head:
// a few rows of scores, whole, against the keys up to the last of them; so there is one softmax, no
// running one, and no two threads add to the same gradient.
#include "attention.h"
#include "matrix.h"
#include "standard.h"

namespace PUNA_ISA {

constexpr int ROWS = 24;  // queries at a time: a multiple of every tile's height below

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
constexpr int tile_rows(int vectors) {
  return (W == 16 ? 24 : 12) / (vectors < 2 ? 2 : vectors);
}

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
        vectors_(static_cast<int>(a.head_dim / W)),
        room_((longest + PANEL - 1) / PANEL * PANEL),
        keys_(buffer(room_ * d_)),
        scores_(buffer(ROWS * room_)) {
    if (backward) values_ = buffer(room_ * d_), d_scores_ = buffer(ROWS * room_);
  }

  void forward(int64_t segment, int64_t group) {
    begin_ = a_.cuts[segment];
    length_ = a_.cuts[segment + 1] - begin_;
    transpose(a_.k + begin_ * a_.k_stride + group * d_, a_.k_stride, keys_.get());
    const int64_t per = a_.heads / a_.kv_heads;
    for (int64_t head = group * per; head < (group + 1) * per; ++head)
      for (int64_t first = 0; first < length_; first += ROWS) forward_rows(first, head, group);
  }

  void backward(const puna::AttentionBackward& back, int64_t segment, int64_t group) {
    begin_ = a_.cuts[segment];
    length_ = a_.cuts[segment + 1] - begin_;
    transpose(a_.k + begin_ * a_.k_stride + group * d_, a_.k_stride, keys_.get());
    transpose(a_.v + begin_ * a_.v_stride + group * d_, a_.v_stride, values_.get());
    const int64_t width = a_.kv_heads * d_;
    for (int64_t t = begin_; t < begin_ + length_; ++t) {
      std::fill_n(back.dk + t * width + group * d_, d_, 0.0f);
      std::fill_n(back.dv + t * width + group * d_, d_, 0.0f);
    }
    const int64_t per = a_.heads / a_.kv_heads;
    for (int64_t head = group * per; head < (group + 1) * per; ++head)
      for (int64_t first = 0; first < length_; first += ROWS)
        backward_rows(back, first, head, group);
  }

 private:
  // (length, D) as panels of (D, PANEL), so that scores of PANEL keys are summed side by side.
  void transpose(const float* from, int64_t stride, float* to) const {
    for (int64_t panel = 0; panel < length_; panel += PANEL, to += PANEL * d_) {
      const int64_t count = std::min<int64_t>(PANEL, length_ - panel);
      for (int64_t d = 0; d < d_; ++d) {
        const float* column = from + panel * stride + d;
        for (int64_t j = 0; j < count; ++j) to[d * PANEL + j] = column[j * stride];
        for (int64_t j = count; j < PANEL; ++j) to[d * PANEL + j] = 0.0f;
      }
    }
  }

  // rows (count, D) times the transposed (length, D), for the keys up to `end`: (count, room).
  void against(const float* rows, int64_t stride, int64_t count, const float* transposed,
               int64_t end, float* to) const {
    for (int64_t j = 0; j < end; j += PANEL)
      strip<2>(count, rows, stride, 1, transposed + j * d_, PANEL, d_, to + j, room_, false);
  }

  // One head of some tokens: too short for the processor to see that more will follow.
  void fetch(const float* from, int64_t stride, int64_t count) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < d_; i += 16) __builtin_prefetch(from + r * stride + i);
  }

  void forward_rows(int64_t first, int64_t head, int64_t group) {
    const int64_t count = std::min<int64_t>(ROWS, length_ - first), end = first + count;
    const int64_t at = begin_ + first, width = a_.heads * d_;
    float* scores = scores_.get();
    const float* q = a_.q + at * a_.q_stride + head * d_;
    fetch(q + ROWS * a_.q_stride, a_.q_stride, std::min<int64_t>(ROWS, length_ - end));
    against(q, a_.q_stride, count, keys_.get(), end, scores);
    float sums[ROWS];
    for (int64_t r = 0; r < count; ++r)
      sums[r] = softmax(scores + r * room_, first + r + 1, end, a_.lse + (at + r) * a_.heads + head);
    float* out = a_.out + at * width + head * d_;
    multiply_add(count, vectors_, scores, room_, 1, a_.v + begin_ * a_.v_stride + group * d_,
                 a_.v_stride, end, out, width, false);
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < d_; i += W)
        store(out + r * width + i, load(out + r * width + i) * (1.0f / sums[r]));
  }

  // e^(score - largest) over the first `length`, zeros up to `end`; returns their sum.
  float softmax(float* scores, int64_t length, int64_t end, float* lse) const {
    const int64_t whole = (length + W - 1) / W * W;
    for (int64_t t = length; t < whole; ++t) scores[t] = -1e30f;
    vec top = load(scores);
    for (int64_t t = W; t < whole; t += W) top = max(top, load(scores + t));
    const float largest_one = largest(top);
    vec sums = {};
    for (int64_t t = 0; t < whole; t += W) {
      const vec e = exp((load(scores + t) - largest_one) * a_.scale);
      if (t + W <= length) sums += e;
      store(scores + t, e);
    }
    float total = sum(sums);
    for (int64_t t = length / W * W; t < length; ++t) total += scores[t];
    for (int64_t t = length; t < end; ++t) scores[t] = 0.0f;
    *lse = largest_one * a_.scale + std::log(total);
    return total;
  }

  void backward_rows(const puna::AttentionBackward& back, int64_t first, int64_t head,
                     int64_t group) {
    const int64_t count = std::min<int64_t>(ROWS, length_ - first), end = first + count;
    const int64_t at = begin_ + first, width = a_.heads * d_, kv_width = a_.kv_heads * d_;
    const float* q = a_.q + at * a_.q_stride + head * d_;
    const float* d_out = back.d_out + at * back.d_out_stride + head * d_;
    float *p = scores_.get(), *ds = d_scores_.get();
    const float* out = a_.out + at * width + head * d_;
    fetch(out, width, count);
    const int64_t coming = std::min<int64_t>(ROWS, length_ - end);
    fetch(q + ROWS * a_.q_stride, a_.q_stride, coming);
    fetch(d_out + ROWS * back.d_out_stride, back.d_out_stride, coming);
    against(q, a_.q_stride, count, keys_.get(), end, p);
    against(d_out, back.d_out_stride, count, values_.get(), end, ds);
    for (int64_t r = 0; r < count; ++r) {
      vec sums = {};
      for (int64_t i = 0; i < d_; i += W)
        sums += load(out + r * width + i) * load(d_out + r * back.d_out_stride + i);
      softmax_backward(p + r * room_, ds + r * room_, first + r + 1, end, sum(sums),
                       a_.lse[(at + r) * a_.heads + head]);
    }
    multiply_add(count, vectors_, ds, room_, 1, a_.k + begin_ * a_.k_stride + group * d_, a_.k_stride,
                 end, back.dq + at * width + head * d_, width, false);
    multiply_add(end, vectors_, ds, 1, room_, q, a_.q_stride, count,
                 back.dk + begin_ * kv_width + group * d_, kv_width, true);
    multiply_add(end, vectors_, p, 1, room_, d_out, back.d_out_stride, count,
                 back.dv + begin_ * kv_width + group * d_, kv_width, true);
  }

  // Scores become probabilities, and d_p becomes the gradient of the unscaled scores.
  void softmax_backward(float* scores, float* d_p, int64_t length, int64_t end, float delta,
                        float lse) const {
    const int64_t whole = (length + W - 1) / W * W;
    for (int64_t t = 0; t < whole; t += W) {
      const vec p = exp(load(scores + t) * a_.scale - lse);
      store(scores + t, p);
      store(d_p + t, p * (load(d_p + t) - delta) * a_.scale);
    }
    for (int64_t t = length; t < end; ++t) scores[t] = d_p[t] = 0.0f;
  }

  const puna::Attention& a_;
  int64_t d_;
  int vectors_;
  int64_t room_, begin_ = 0, length_ = 0;
  Buffer keys_, scores_, values_, d_scores_;
};

// Calls work(worker, segment, group) for each, whichever thread is free.
template <typename Work>
inline void for_each_head(const puna::Attention& a, bool backward, int threads, Work work) {
  int64_t longest = 0;
  for (int64_t s = 0; s < a.segments; ++s)
    longest = std::max(longest, a.cuts[s + 1] - a.cuts[s]);
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
  for_each_head(back.of, true, threads, [&](AttentionWorker& worker, int64_t segment, int64_t group) {
    worker.backward(back, segment, group);
  });
}

}  // namespace PUNA_ISA
