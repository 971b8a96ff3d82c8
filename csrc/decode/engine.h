// A Llama's forward pass for decoding on a CPU. Activations are fp32, the packed weights fp32, bf16
// or int8. int8 multiplies activations rounded to int8; bf16 multiplies activations rounded to bf16
// where the processor has an instruction for that, and fp32 ones elsewhere.
//
// A call takes any number of tokens, each with its cache row and its position: one token of many
// rows (decoding), many tokens of a few rows (prompts), or both. A token's result depends on its
// row alone, to the last bit: the order of every sum is the same for any batch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/weight_format.h"

namespace puna {

struct ModelShape {
  int64_t layers, dim, heads, kv_heads, head_dim, ffn, vocab;
  int64_t outputs;        // of the head: V, or 1 for a score
  bool qkv_bias, o_bias;  // whether the attention's projections have them
  float eps;
};

// Of RoPE: (context, D / 2) each.
struct Tables {
  const float *cos, *sin;
};

// The tokens of one row are neighbours, in the order of their positions.
struct Batch {
  int64_t count;
  const int64_t *tokens, *rows, *positions;
  int64_t wanted_count;
  const int64_t* wanted;  // which of the tokens get logits
  float* logits;          // (wanted_count, outputs)
};

// How tokens are drawn from the logits (see kernels/sample.py). Each drawn token is fed to its row,
// until `steps` steps are done or one of the tokens is `eos`.
struct Draw {
  int64_t steps;         // at least 1
  int64_t eos;           // -1: there is none
  float temperature;     // 0: greedy
  const int64_t* seeds;  // (steps, wanted_count)
  int64_t* tokens;       // (steps, wanted_count)
  float* logprobs;       // (steps, wanted_count)
};

// What one generation writes to: a cache of keys and values, activations, what it knows of its own
// speed. One call at a time may be in it.
class Session {
 public:
  virtual ~Session() = default;
  // Room for `rows` rows of `max_tokens` tokens each; what the rows held is lost.
  virtual void reserve(int64_t rows, int64_t max_tokens) = 0;
  // Returns the number of steps done: 1 without `draw`. Where the last step's logits are NaN, inf
  // or all -inf in some row, so that there is nothing to draw from, the number is negative.
  virtual int64_t forward(const Batch& batch, const Draw* draw, int threads) = 0;
  // Copies the first `length` tokens of row `from` to row `to`.
  virtual void copy_row(int64_t from, int64_t to, int64_t length) = 0;
  virtual int64_t vocab() const = 0;
  virtual int64_t outputs() const = 0;
  virtual int64_t rows() const = 0;
  virtual int64_t max_tokens() const = 0;

  std::atomic<bool> busy{false};
};

// A model's weights, packed. Once all are, nothing writes to them: any number of sessions read them
// at once.
class Engine {
 public:
  virtual ~Engine() = default;
  // Takes rows `first` to `first + count` of a tensor, fp32 and row-major as PyTorch holds them, so
  // that a tensor need never be whole. Of the model: "embedding" (V, C), "head"
  // (outputs, C), "norm" (C); of a layer q, k, v, o, gate, up, down (out, in), attention_norm and
  // ffn_norm (C), and where there are biases, q_bias, k_bias, v_bias, o_bias (out). Of a norm and a
  // bias, rows are numbers. invalid_argument for what there is not.
  virtual void pack(const std::string& part, int64_t layer, int64_t first, int64_t count,
                    const float* rows) = 0;
  // The session reads this engine's weights, which must outlive it.
  virtual std::unique_ptr<Session> new_session() const = 0;
};

}  // namespace puna
