// A session: the forward pass, compiled once for each instruction set.
#pragma once

#include "base/layers.h"
#include "base/matrix.h"
#include "base/standard.h"
#include "decode/cache.h"
#include "decode/draw.h"
#include "decode/engine.h"
#include "decode/parts.h"
#include "decode/weights.h"
#include "train/attention_impl.h"

namespace PUNA_ISA {

using puna::Batch;
using puna::Draw;
using puna::ModelShape;

// Tokens that go through the layers together: their activations stay in the second-level cache.
constexpr int64_t BLOCK_TOKENS = 96;
constexpr int64_t MAX_PREFETCH = 1 << 15;  // floats of keys, and as many of values

// So many tokens of a row attend together, as in training: a prompt of 512 takes a fifth less
// (bf16, 12 heads of 64). Fewer are not worth turning the cached keys around.
constexpr int64_t FEWEST_TOGETHER = 16;

// What a block of tokens needs on its way through a layer.
struct Activations {
  Buffer qkv, attended, hidden;
  std::vector<Buffer> normed, scores, rounded;  // one for each thread that works on the block
  std::vector<AttentionWorker> workers;         // as many; none where the block is of few tokens
};

class LlamaSession final : public puna::Session {
 public:
  explicit LlamaSession(const PackedWeights& weights)
      : shape_(weights.shape),
        weights_(weights),
        cache_(shape_.layers, shape_.kv_heads, shape_.head_dim,
               weights.head.format != WeightFormat::fp32),
        attend_(attend_kernel_for(shape_.head_dim, cache_.rounded())) {}

  void reserve(int64_t rows, int64_t max_tokens) override { cache_.reserve(rows, max_tokens); }
  int64_t vocab() const override { return shape_.vocab; }
  int64_t outputs() const override { return shape_.outputs; }
  int64_t rows() const override { return cache_.rows(); }
  int64_t max_tokens() const override { return cache_.max_tokens(); }
  void copy_row(int64_t from, int64_t to, int64_t length) override {
    cache_.copy_row(from, to, length);
  }

  int64_t forward(const Batch& batch, const Draw* draw, int threads) override {
    if (batch.count == 0) return 1;
    step(batch, draw, 0, threads);
    const int64_t count = batch.wanted_count;
    if (!draw || count == 0) return 1;
    std::vector<int64_t> rows(count), positions(count), all(count);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = batch.rows[batch.wanted[i]];
      positions[i] = batch.positions[batch.wanted[i]];
      all[i] = i;
    }
    int64_t done = 1;
    for (;; ++done) {
      const int64_t* last = draw->tokens + (done - 1) * count;
      const float* logprobs = draw->logprobs + (done - 1) * count;
      if (std::any_of(logprobs, logprobs + count, [](float x) { return x != x; })) return -done;
      if (done == draw->steps) break;
      if (std::find(last, last + count, draw->eos) != last + count) break;
      for (int64_t& position : positions) ++position;
      step({count, last, rows.data(), positions.data(), count, all.data(), batch.logits}, draw,
           done, threads);
    }
    return done;
  }

 private:
  int64_t q_width() const { return shape_.heads * shape_.head_dim; }
  int64_t kv_width() const { return shape_.kv_heads * shape_.head_dim; }

  void step(const Batch& batch, const Draw* draw, int64_t index, int threads) {
    if (threads == 1) return run(batch, draw, index, 1);
    int size = 0;  // batches of similar size share one choice: log2 of the count
    while (size < 31 && (batch.count >> (size + 1))) ++size;
    puna::Pace& pace = paces_[size];
    const double began = puna::now();
    run(batch, draw, index, pace.use_all_threads() ? threads : 1);
    pace.record(puna::now() - began);
  }

  void run(const Batch& batch, const Draw* draw, int64_t index, int threads) {
    reserve_activations(batch, threads);
    const std::vector<int64_t> bounds = puna::split_at_rows(batch, threads);
    puna::parallel(threads, [&](int part, int parts) {
      if (!bounds.empty()) {
        for (int i = part; i < threads; i += parts)  // OpenMP may grant fewer threads
          run_blocks(batch, bounds[i], bounds[i + 1], Team{0, 1, nullptr}, activations_[i]);
      } else {
        run_blocks(batch, 0, batch.count, Team{part, parts, &barrier_}, activations_[0]);
      }
      barrier_.wait(parts);
      apply_head(batch, part, parts);
      if (draw) {
        barrier_.wait(parts);
        draw_tokens(batch, *draw, index, part, parts);
      }
    });
  }

  void draw_tokens(const Batch& batch, const Draw& draw, int64_t index, int part, int parts) const {
    const Range rows = split(batch.wanted_count, part, parts);
    float* const weights = activations_[0].scores[part].get();
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const int64_t at = index * batch.wanted_count + i;
      draw_token(batch.logits + i * shape_.vocab, shape_.vocab, draw.temperature, draw.seeds[at],
                 weights, draw.tokens + at, draw.logprobs + at);
    }
  }

  // The threads that share the columns of a block: this is thread `part` of `parts`.
  struct Team {
    int part, parts;
    puna::Barrier* barrier;
    void wait() const {
      if (barrier) barrier->wait(parts);
    }
  };

  void reserve_activations(const Batch& batch, int threads) {
    const int64_t tokens = std::min(std::max(batch.count, batch.wanted_count), BLOCK_TOKENS);
    if (static_cast<int>(activations_.size()) < threads || tokens > block_capacity_ ||
        cache_.padded_tokens() > score_capacity_) {
      block_capacity_ = std::max(block_capacity_, tokens);
      score_capacity_ = std::max(score_capacity_, cache_.padded_tokens());
      activations_.clear();
      for (int i = 0; i < threads; ++i) activations_.push_back(new_activations(i ? 1 : threads));
    }
    grow(residual_, residual_size_, batch.count * shape_.dim);
    grow(final_, final_size_, batch.wanted_count * shape_.dim);
  }

  // The size is written last: where there is no memory, it stays that of the buffer.
  static void grow(Buffer& buffer, int64_t& size, int64_t wanted) {
    if (wanted <= size) return;
    buffer = allocate(wanted);
    size = wanted;
  }

  Activations new_activations(int threads) const {
    const int64_t widest = std::max({shape_.dim, q_width(), shape_.ffn});
    Activations a;
    a.qkv = allocate(block_capacity_ * (q_width() + 2 * kv_width()));
    a.attended = allocate(block_capacity_ * q_width());
    a.hidden = allocate(block_capacity_ * shape_.ffn);
    for (int i = 0; i < threads; ++i) {
      a.scores.push_back(
          allocate(std::max(shape_.vocab, heads_together() * (3 * score_capacity_ / 2 + 1))));
      if (block_capacity_ >= FEWEST_TOGETHER)
        a.workers.emplace_back(shape_.head_dim, group_size(), score_capacity_, Pass::cached);
      a.normed.push_back(allocate(block_capacity_ * shape_.dim));
      a.rounded.push_back(allocate(rounding_room(weights_.head.format, block_capacity_, widest)));
    }
    return a;
  }

  void run_blocks(const Batch& batch, int64_t begin, int64_t end, const Team& team,
                  Activations& a) {
    for (int64_t first = begin; first < end; first += BLOCK_TOKENS)
      run_layers(batch, first, std::min(BLOCK_TOKENS, end - first), team, a);
  }

  void run_layers(const Batch& batch, int64_t first, int64_t count, const Team& team,
                  Activations& a) {
    const int64_t dim = shape_.dim;
    float* x = residual_.get() + first * dim;
    const Range tokens = split(count, team.part, team.parts);
    for (int64_t i = tokens.begin; i < tokens.end; ++i)
      weights_.embedding.read(batch.tokens[first + i], x + i * dim);
    team.wait();
    std::vector<int64_t> needed = puna::places(count);
    for (int64_t l = 0; l < shape_.layers; ++l) {
      const bool is_last = l == shape_.layers - 1;
      if (is_last) needed = puna::needed_at_the_end(batch, first, count);
      attention(batch, first, count, l, needed, x, team, a);
      feed_forward(weights_.layers[l], needed.size(), x, team, a);
    }
    for (int64_t i = 0; i < batch.wanted_count; ++i) {
      const auto at = std::lower_bound(needed.begin(), needed.end(), batch.wanted[i] - first);
      if (at != needed.end() && *at == batch.wanted[i] - first && i % team.parts == team.part)
        normalize(x + (at - needed.begin()) * dim, weights_.final_norm, final_.get() + i * dim);
    }
  }

  void normalize(const float* x, const std::vector<float>& weight, float* y) const {
    rms_norm_row(x, weight.data(), shape_.dim, shape_.eps, y);
  }

  // Every thread normalizes all rows for itself: that is cheaper than waiting for the others.
  const float* normalize_block(const float* x, const std::vector<float>& weight, int64_t count,
                               const Team& team, Activations& a) const {
    float* y = a.normed[team.part].get();
    for (int64_t i = 0; i < count; ++i) normalize(x + i * shape_.dim, weight, y + i * shape_.dim);
    return y;
  }

  // y (rows, w.out) = x (rows, w.in) W^T, or y + that with ADD; this thread's part of the columns.
  // `bias` is empty, or is added to each row of the product.
  template <bool ADD>
  static void linear(const PackedMatrix& w, const std::vector<float>& bias, const float* x,
                     int64_t rows, float* y, int part, int parts, float* rounded) {
    for_each_tile(w, prepare_input(w, x, rows, rounded), rows, split(w.panels, part, parts),
                  [&](const Tile& tile) {
                    if (!bias.empty()) add_bias(tile, bias.data() + tile.first_column);
                    store_columns<ADD>(tile, tile.data, y, w.out);
                  });
  }

  // Of the `needed` tokens of a block, whose rows of x then stand at its beginning.
  void attention(const Batch& batch, int64_t first, int64_t count, int64_t l,
                 const std::vector<int64_t>& needed, float* x, const Team& team, Activations& a) {
    const PackedLayer& layer = weights_.layers[l];
    const float* normed = normalize_block(x, layer.attention_norm, count, team, a);
    float* rounded = a.rounded[team.part].get();
    linear<false>(layer.qkv, layer.qkv_bias, normed, count, a.qkv.get(), team.part, team.parts,
                  rounded);
    team.wait();
    attend(batch, first, count, l, needed, team, a);
    team.wait();
    if (static_cast<int64_t>(needed.size()) < count) move_up(needed, x, team, a);
    linear<true>(layer.o, layer.o_bias, a.attended.get(), needed.size(), x, team.part, team.parts,
                 rounded);
    team.wait();
  }

  void move_up(const std::vector<int64_t>& needed, float* x, const Team& team, Activations& a) {
    float* attended = a.attended.get();
    for (size_t i = 0; i < needed.size() && team.part == 0; ++i) {
      std::copy_n(x + needed[i] * shape_.dim, shape_.dim, x + i * shape_.dim);
      std::copy_n(attended + needed[i] * q_width(), q_width(), attended + i * q_width());
    }
    team.wait();
  }

  int64_t group_size() const { return shape_.heads / shape_.kv_heads; }

  // Key/value heads that attend together, so that there are enough query heads; and those.
  int64_t kv_heads_together() const { return ceil_div(attend_.together, group_size()); }
  int64_t heads_together() const { return kv_heads_together() * group_size(); }

  // A thread takes some key/value heads of all tokens: their cache is written and read by it alone.
  // With fewer heads than threads, some threads only wait.
  void attend(const Batch& batch, int64_t first, int64_t count, int64_t l,
              const std::vector<int64_t>& needed, const Team& team, Activations& a) {
    const Range heads = split(shape_.kv_heads, team.part, team.parts);
    std::vector<QueryHead> together(heads_together());
    for (int64_t i = 0, end; i < count; i = end) {
      for (end = i; end < count && batch.rows[first + end] == batch.rows[first + i]; ++end)
        for (int64_t g = heads.begin; g < heads.end; ++g)
          rotate_and_cache(batch, first, end, l, g, a);
      // Those needed of a row are its last ones.
      const auto begun = std::lower_bound(needed.begin(), needed.end(), i);
      const int64_t begin = begun == needed.end() ? end : std::min(*begun, end);
      if (end - begin >= FEWEST_TOGETHER)
        attend_row(batch, first, {begin, end}, l, heads, a, a.workers[team.part]);
      else
        for (int64_t token = begin; token < end; ++token)
          attend_alone(batch, first, count, token, l, heads, a, a.scores[team.part].get(),
                       together.data());
    }
  }

  // Rotates token `i`'s queries and key of a key/value head, and caches the key and the value.
  void rotate_and_cache(const Batch& batch, int64_t first, int64_t i, int64_t l, int64_t g,
                        Activations& a) {
    const int64_t d = shape_.head_dim, t = batch.positions[first + i];
    const float *cos = weights_.cos + t * (d / 2), *sin = weights_.sin + t * (d / 2);
    float *const q = query(i, a), *const k = q + q_width() + g * d;
    rotate_head(k, cos, sin, 1.0f, d / 2, k);
    cache_.write(l, batch.rows[first + i], g, t, k, k + kv_width());
    for (int64_t h = g * group_size(); h < (g + 1) * group_size(); ++h)
      rotate_head(q + h * d, cos, sin, 1.0f, d / 2, q + h * d);
  }

  float* query(int64_t i, const Activations& a) const {
    return a.qkv.get() + i * (q_width() + 2 * kv_width());
  }
  float score_scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }

  // `tokens` of one row.
  void attend_row(const Batch& batch, int64_t first, Range tokens, int64_t l, Range heads,
                  Activations& a, AttentionWorker& worker) {
    const int64_t at = first + tokens.begin, row = batch.rows[at], t = batch.positions[at];
    puna::Attention queries{shape_.heads, shape_.kv_heads, shape_.head_dim};
    queries.scale = score_scale();
    queries.q = query(tokens.begin, a);
    queries.q_stride = q_width() + 2 * kv_width();
    queries.out = a.attended.get() + tokens.begin * q_width();
    queries.bf16 = cache_.rounded();
    for (int64_t g = heads.begin; g < heads.end; ++g)
      worker.forward_cached(queries, cache_.keys(l, row, g), cache_.values(l, row, g),
                            {t, t + tokens.end - tokens.begin}, g);
  }

  // One token `i` of a block; `heads` is room for heads_together().
  void attend_alone(const Batch& batch, int64_t first, int64_t count, int64_t i, int64_t l,
                    Range kv_heads, Activations& a, float* scores, QueryHead* heads) {
    for (int64_t g = kv_heads.begin; g < kv_heads.end; g += kv_heads_together()) {
      const int64_t row = batch.rows[first + i];
      const float *keys = cache_.keys(l, row, g), *next = keys;
      if (g + kv_heads_together() < kv_heads.end)
        next = cache_.keys(l, row, g + kv_heads_together());
      else if (i + 1 < count)
        next = cache_.keys(l, batch.rows[first + i + 1], kv_heads.begin);
      const Range some{g, std::min(g + kv_heads_together(), kv_heads.end)};
      attend_token(batch, first, i, l, some, a, scores, heads, next - keys);
    }
  }

  // Some key/value heads of token `i` of a block.
  void attend_token(const Batch& batch, int64_t first, int64_t i, int64_t l, Range kv_heads,
                    Activations& a, float* scores, QueryHead* heads, int64_t distance) {
    const int64_t d = shape_.head_dim, group = group_size();
    const int64_t t = batch.positions[first + i], row = batch.rows[first + i];
    float* const q = query(i, a);
    float* const totals = scores + heads_together() * score_capacity_;
    float* const pairs = totals + heads_together();
    int count = 0;
    for (int64_t g = kv_heads.begin; g < kv_heads.end; ++g) {
      for (int64_t h = g * group; h < (g + 1) * group; ++h, ++count) {
        if (cache_.rounded()) round_row(q + h * d, d, reinterpret_cast<Pair*>(q + h * d));
        heads[count] = {q + h * d,
                        cache_.keys(l, row, g),
                        cache_.values(l, row, g),
                        scores + count * score_capacity_,
                        pairs + count * score_capacity_ / 2,
                        a.attended.get() + i * q_width() + h * d};
      }
    }
    // What is prefetched of long rows would be gone again when it is read.
    const int64_t read = (t + 1) * cache_.head_floats() * (kv_heads.end - kv_heads.begin);
    if (read > MAX_PREFETCH) distance = 0;
    attend_.run(heads, count, t + 1, score_scale(), totals, distance);
  }

  void feed_forward(const PackedLayer& layer, int64_t count, float* x, const Team& team,
                    Activations& a) {
    const float* normed = normalize_block(x, layer.ffn_norm, count, team, a);
    float *hidden = a.hidden.get(), *rounded = a.rounded[team.part].get();
    const PanelInput input = prepare_input(layer.gate, normed, count, rounded);
    for_each_tile(layer.gate, input, count, split(layer.gate.panels, team.part, team.parts),
                  [&](const Tile& gate) {
                    alignas(64) float up[MAX_TILE_ROWS * PANEL_WIDTH];
                    multiply_panel(layer.up, gate.first_column / PANEL_WIDTH, input, gate.first_row,
                                   static_cast<int>(gate.rows), up);
                    swiglu_tile(gate, up);
                    store_columns<false>(gate, up, hidden, shape_.ffn);
                  });
    team.wait();
    linear<true>(layer.down, {}, hidden, count, x, team.part, team.parts, rounded);
    team.wait();
  }

  static void swiglu_tile(const Tile& gate, float* up) {
    for (int64_t i = 0; i < gate.rows * PANEL_WIDTH; i += W)
      store(up + i, swiglu(load(gate.data + i), load(up + i)));
  }

  void apply_head(const Batch& batch, int part, int parts) {
    float* rounded = activations_[0].rounded[part].get();
    for (int64_t first = 0; first < batch.wanted_count; first += BLOCK_TOKENS)
      linear<false>(weights_.head, {}, final_.get() + first * shape_.dim,
                    std::min(BLOCK_TOKENS, batch.wanted_count - first),
                    batch.logits + first * shape_.outputs, part, parts, rounded);
  }

  const ModelShape shape_;
  const PackedWeights& weights_;
  KVCache cache_;
  AttendKernel attend_;
  puna::Barrier barrier_;
  puna::Pace paces_[32];
  std::vector<Activations> activations_;
  Buffer residual_, final_;  // the residual stream (N, C); the normed states that get logits
  int64_t block_capacity_ = 0, score_capacity_ = 0, residual_size_ = 0, final_size_ = 0;
};

}  // namespace PUNA_ISA
