// The forward pass, compiled once for each instruction set.
#pragma once

#include <cmath>
#include <stdexcept>
#include <vector>

#include "base/matrix.h"
#include "base/pace.h"
#include "base/threads.h"
#include "decode/cache.h"
#include "decode/draw.h"
#include "decode/engine.h"

namespace PUNA_ISA {

using puna::Batch;
using puna::Draw;
using puna::Shape;
using puna::Weights;

// Tokens that go through the layers together: their activations stay in the second-level cache.
constexpr int64_t BLOCK = 96;

struct Layer {
  Matrix qkv, o, gate, up, down;
  std::vector<float> attention_norm, ffn_norm;
};

// What a block of tokens needs on its way through a layer.
struct Activations {
  Buffer qkv, attended, hidden;
  std::vector<Buffer> normed, scores, quantised;  // one a thread that shares them
};

inline void rms_norm(const float* x, const float* weight, int64_t width, float eps, float* y) {
  vec squares = {};
  int64_t i = 0;
  for (; i + W <= width; i += W) squares += load(x + i) * load(x + i);
  float total = sum(squares);
  for (; i < width; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(width) + eps);
  for (i = 0; i + W <= width; i += W) store(y + i, load(x + i) * scale * load(weight + i));
  for (; i < width; ++i) y[i] = x[i] * scale * weight[i];
}

// Half-split pairs: (i, i + D / 2).
inline void rotate(float* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

class Llama final : public puna::Engine {
 public:
  Llama(const Shape& shape, const Weights& weights)
      : s_(shape),
        w_(weights),
        head_(shape.dim, shape.vocab, weights.format),
        final_norm_(weights.norm, weights.norm + shape.dim),
        cache_(shape.layers, shape.kv_heads, shape.head_dim),
        attend_(attend_for(shape.head_dim)) {
    if (!attend_) throw std::invalid_argument("this instruction set cannot cut the head size");
    const int64_t q = s_.heads * s_.head_dim, kv = s_.kv_heads * s_.head_dim;
    for (size_t l = 0; l < weights.layers.size(); ++l)
      layers_.push_back({Matrix(s_.dim, q + 2 * kv, weights.format),
                         Matrix(q, s_.dim, weights.format),
                         Matrix(s_.dim, s_.ffn, weights.format),
                         Matrix(s_.dim, s_.ffn, weights.format),
                         Matrix(s_.ffn, s_.dim, weights.format),
                         {},
                         {}});
    place();
    for (size_t l = 0; l < weights.layers.size(); ++l) {
      const auto& from = weights.layers[l];
      Layer& layer = layers_[l];
      layer.qkv.fill(from.q, 0, q);
      layer.qkv.fill(from.k, q, kv);
      layer.qkv.fill(from.v, q + kv, kv);
      layer.o.fill(from.o, 0, s_.dim);
      layer.gate.fill(from.gate, 0, s_.ffn);
      layer.up.fill(from.up, 0, s_.ffn);
      layer.down.fill(from.down, 0, s_.dim);
      layer.attention_norm.assign(from.attention_norm, from.attention_norm + s_.dim);
      layer.ffn_norm.assign(from.ffn_norm, from.ffn_norm + s_.dim);
    }
    head_.fill(weights.head, 0, s_.vocab);
  }

  void reserve(int64_t rows, int64_t slots) override { cache_.reserve(rows, slots); }
  int64_t vocab() const override { return s_.vocab; }
  int64_t rows() const override { return cache_.rows(); }
  int64_t slots() const override { return cache_.slots(); }
  void copy_row(int64_t from, int64_t to, int64_t length) override {
    cache_.copy_row(from, to, length);
  }

  int64_t forward(const Batch& batch, const Draw* draw, int threads) override {
    if (batch.count == 0) return 1;
    step(batch, draw, 0, threads);
    const int64_t count = batch.wanted_count;
    if (!draw || count == 0) return 1;
    std::vector<int64_t> rows(count), positions(count), every(count);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = batch.rows[batch.wanted[i]];
      positions[i] = batch.positions[batch.wanted[i]];
      every[i] = i;
    }
    int64_t done = 1;
    for (; done < draw->steps; ++done) {
      const int64_t* last = draw->tokens + (done - 1) * count;
      if (std::find(last, last + count, draw->eos) != last + count) break;
      for (int64_t& position : positions) ++position;
      step({count, last, rows.data(), positions.data(), count, every.data(), batch.logits}, draw,
           done, threads);
    }
    return done;
  }

 private:
  // All matrices in one piece of memory, in the order of their use.
  void place() {
    std::vector<Matrix*> order;
    for (Layer& layer : layers_)
      for (Matrix* m : {&layer.qkv, &layer.o, &layer.gate, &layer.up, &layer.down})
        order.push_back(m);
    order.push_back(&head_);
    int64_t total = 0;
    for (const Matrix* m : order) total += m->bytes();
    weights_ = buffer(total / 4);
    auto* at = reinterpret_cast<uint8_t*>(weights_.get());
    for (Matrix* m : order) {
      m->place(at);
      at += m->bytes();
    }
  }

  void step(const Batch& batch, const Draw* draw, int64_t index, int threads) {
    if (threads == 1) return run(batch, draw, index, 1);
    int size = 0;  // batches of similar size share their experience
    while (size < 31 && (batch.count >> (size + 1))) ++size;
    puna::Pace& pace = paces_[size];
    const double began = puna::now();
    run(batch, draw, index, pace.all() ? threads : 1);
    pace.took(puna::now() - began);
  }

  void run(const Batch& batch, const Draw* draw, int64_t index, int threads) {
    make_room(batch, threads);
    const std::vector<int64_t> cuts = cut_at_rows(batch, threads);
    const bool apart = !cuts.empty();  // each thread its own rows, or all of them some columns each
    puna::parallel(threads, [&](int part, int parts) {
      if (apart) {
        for (int each = part; each < threads; each += parts)  // OpenMP may grant fewer threads
          run_blocks(batch, cuts[each], cuts[each + 1], Team{0, 1, nullptr}, own_[each]);
      } else {
        run_blocks(batch, 0, batch.count, Team{part, parts, &barrier_}, own_[0]);
      }
      barrier_.wait(parts);
      apply_head(batch, part, parts);
      if (draw) {
        barrier_.wait(parts);
        const Range rows = share(batch.wanted_count, part, parts);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
          const int64_t at = index * batch.wanted_count + i;
          draw_token(batch.logits + i * s_.vocab, s_.vocab, draw->temperature, draw->seeds[at],
                     draw->tokens + at, draw->logprobs + at);
        }
      }
    });
  }

  // Who shares a block's columns: thread `part` of `parts`.
  struct Team {
    int part, parts;
    puna::Barrier* barrier;
    void wait() const {
      if (barrier) barrier->wait(parts);
    }
  };

  void make_room(const Batch& batch, int threads) {
    const int64_t q = s_.heads * s_.head_dim, kv = s_.kv_heads * s_.head_dim;
    const int64_t tokens = std::min(std::max(batch.count, batch.wanted_count), BLOCK);
    const int64_t widest = std::max({s_.dim, q, s_.ffn});
    const bool whole = head_.format == Format::int8;
    if (static_cast<int>(own_.size()) < threads || tokens > room_ || cache_.padded() > scored_) {
      room_ = std::max(room_, tokens);
      scored_ = std::max(scored_, cache_.padded());
      own_.clear();
      for (int i = 0; i < threads; ++i) {
        Activations a{
            buffer(room_ * (q + 2 * kv)), buffer(room_ * q), buffer(room_ * s_.ffn), {}, {}, {}};
        for (int j = 0; j < (i ? 1 : threads); ++j) {
          a.scores.push_back(buffer(scored_));
          a.normed.push_back(buffer(room_ * s_.dim));
          a.quantised.push_back(buffer(whole ? Quantised::words(room_, widest) : 0));
        }
        own_.push_back(std::move(a));
      }
    }
    if (batch.count * s_.dim > stream_size_) {
      stream_size_ = batch.count * s_.dim;
      stream_ = buffer(stream_size_);
    }
    if (batch.wanted_count * s_.dim > final_size_) {
      final_size_ = batch.wanted_count * s_.dim;
      final_ = buffer(final_size_);
    }
  }

  // Where each thread's tokens begin, never inside a row; nothing if that would be uneven, or if
  // there are so few tokens that reading the weights once is what counts.
  static std::vector<int64_t> cut_at_rows(const Batch& batch, int threads) {
    if (threads == 1) return {0, batch.count};
    if (batch.count < 8 * threads) return {};
    std::vector<int64_t> cuts{0};
    for (int part = 1; part < threads; ++part) {
      int64_t at = std::max(cuts.back(), batch.count * part / threads);
      while (at < batch.count && at > 0 && batch.rows[at] == batch.rows[at - 1]) ++at;
      cuts.push_back(at);
    }
    cuts.push_back(batch.count);
    for (int part = 0; part < threads; ++part)
      if ((cuts[part + 1] - cuts[part]) * threads > batch.count * 5 / 4) return {};
    return cuts;
  }

  void run_blocks(const Batch& batch, int64_t begin, int64_t end, const Team& team,
                  Activations& a) {
    for (int64_t at = begin; at < end; at += BLOCK)
      run_layers(batch, at, std::min(BLOCK, end - at), team, a);
  }

  void run_layers(const Batch& batch, int64_t first, int64_t count, const Team& team,
                  Activations& a) {
    float* x = stream_.get() + first * s_.dim;
    const Range mine = share(count, team.part, team.parts);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      std::memcpy(x + i * s_.dim, w_.embedding + batch.tokens[first + i] * s_.dim,
                  s_.dim * sizeof(float));
    team.wait();
    for (int64_t l = 0; l < s_.layers; ++l) {
      attention(batch, first, count, l, x, team, a);
      feed_forward(layers_[l], count, x, team, a);
    }
    for (int64_t i = 0; i < batch.wanted_count; ++i) {
      const int64_t token = batch.wanted[i] - first;
      if (token >= 0 && token < count && i % team.parts == team.part)
        rms_norm(x + token * s_.dim, final_norm_.data(), s_.dim, s_.eps, final_.get() + i * s_.dim);
    }
  }

  // Every thread norms all rows for itself: cheaper than waiting for the others.
  const float* normed(const float* x, const std::vector<float>& weight, int64_t count,
                      const Team& team, Activations& a) {
    float* y = a.normed[team.part].get();
    for (int64_t i = 0; i < count; ++i)
      rms_norm(x + i * s_.dim, weight.data(), s_.dim, s_.eps, y + i * s_.dim);
    return y;
  }

  static void copy_tile(float* to, int64_t width, int64_t first, int64_t count, int64_t column,
                        int64_t columns, const float* tile) {
    for (int64_t m = 0; m < count; ++m)
      std::memcpy(to + (first + m) * width + column, tile + m * PANEL, columns * sizeof(float));
  }

  static void add_tile(float* to, int64_t width, int64_t first, int64_t count, int64_t column,
                       int64_t columns, const float* tile) {
    for (int64_t m = 0; m < count; ++m) {
      float* row = to + (first + m) * width + column;
      for (int64_t j = 0; j < columns; ++j) row[j] += tile[m * PANEL + j];
    }
  }

  void attention(const Batch& batch, int64_t first, int64_t count, int64_t l, float* x,
                 const Team& team, Activations& a) {
    const Layer& layer = layers_[l];
    const int64_t d = s_.head_dim, q_width = s_.heads * d, width = layer.qkv.out;
    const int64_t group = s_.heads / s_.kv_heads;
    const float* y = normed(x, layer.attention_norm, count, team, a);
    float* qkv = a.qkv.get();
    float* memory = a.quantised[team.part].get();
    product(layer.qkv, input_of(layer.qkv, y, count, memory), count,
            share(layer.qkv.panels, team.part, team.parts),
            [&](int64_t f, int64_t n, int64_t c, int64_t m, const float* tile) {
              copy_tile(qkv, width, f, n, c, m, tile);
            });
    team.wait();
    // A thread takes some key/value heads of all tokens: their cache is written and read by it
    // alone. With fewer heads than threads, some threads only wait.
    const Range heads = share(s_.kv_heads, team.part, team.parts);
    float* scores = a.scores[team.part].get();
    const float scale = 1.0f / std::sqrt(static_cast<float>(d));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = batch.positions[first + i], row = batch.rows[first + i];
      const float *cos = w_.cos + t * (d / 2), *sin = w_.sin + t * (d / 2);
      float* q = qkv + i * width;
      for (int64_t g = heads.begin; g < heads.end; ++g) {
        float* k = q + q_width + g * d;
        rotate(k, cos, sin, d / 2);
        cache_.write(l, row, g, t, k, k + s_.kv_heads * d);
        const float* keys = cache_.keys(l, row, g);
        const float* next = keys;
        if (g + 1 < heads.end)
          next = cache_.keys(l, row, g + 1);
        else if (i + 1 < count)
          next = cache_.keys(l, batch.rows[first + i + 1], heads.begin);
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
          rotate(q + h * d, cos, sin, d / 2);
          attend_(q + h * d, keys, cache_.values(l, row, g), t + 1, scale, scores,
                  a.attended.get() + i * q_width + h * d, next - keys);
        }
      }
    }
    team.wait();
    product(layer.o, input_of(layer.o, a.attended.get(), count, memory), count,
            share(layer.o.panels, team.part, team.parts),
            [&](int64_t f, int64_t n, int64_t c, int64_t m, const float* tile) {
              add_tile(x, s_.dim, f, n, c, m, tile);
            });
    team.wait();
  }

  void feed_forward(const Layer& layer, int64_t count, float* x, const Team& team, Activations& a) {
    const float* y = normed(x, layer.ffn_norm, count, team, a);
    float *h = a.hidden.get(), *memory = a.quantised[team.part].get();
    const Input input = input_of(layer.gate, y, count, memory);
    const Range panels = share(layer.gate.panels, team.part, team.parts);
    product(layer.gate, input, count, panels,
            [&](int64_t f, int64_t n, int64_t c, int64_t m, const float* gate) {
              alignas(64) float up[TALLEST * PANEL];
              multiply(layer.up, c / PANEL, input, f, static_cast<int>(n), up);
              for (int64_t r = 0; r < n; ++r)
                for (int v = 0; v < 2; ++v) {
                  const vec g = load(gate + r * PANEL + v * W);
                  store(up + r * PANEL + v * W,
                        g / (1.0f + exp(-g)) * load(up + r * PANEL + v * W));
                }
              copy_tile(h, s_.ffn, f, n, c, m, up);
            });
    team.wait();
    product(layer.down, input_of(layer.down, h, count, memory), count,
            share(layer.down.panels, team.part, team.parts),
            [&](int64_t f, int64_t n, int64_t c, int64_t m, const float* tile) {
              add_tile(x, s_.dim, f, n, c, m, tile);
            });
    team.wait();
  }

  void apply_head(const Batch& batch, int part, int parts) {
    float* memory = own_[0].quantised[part].get();
    for (int64_t at = 0; at < batch.wanted_count; at += BLOCK) {
      const int64_t rows = std::min(BLOCK, batch.wanted_count - at);
      float* logits = batch.logits + at * s_.vocab;
      product(head_, input_of(head_, final_.get() + at * s_.dim, rows, memory), rows,
              share(head_.panels, part, parts),
              [&](int64_t f, int64_t n, int64_t c, int64_t m, const float* tile) {
                copy_tile(logits, s_.vocab, f, n, c, m, tile);
              });
    }
  }

  Shape s_;
  Weights w_;
  Buffer weights_;  // what the matrices read
  std::vector<Layer> layers_;
  Matrix head_;
  std::vector<float> final_norm_;
  Cache cache_;
  Attend attend_;
  puna::Barrier barrier_;
  puna::Pace paces_[32];
  std::vector<Activations> own_;
  Buffer stream_, final_;  // the residual stream (N, C); the normed states that get logits
  int64_t room_ = 0, scored_ = 0, stream_size_ = 0, final_size_ = 0;
};

}  // namespace PUNA_ISA
