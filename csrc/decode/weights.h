// A model's weights, packed for decoding.
#pragma once

#include <stdexcept>

#include "base/matrix.h"
#include "base/standard.h"
#include "decode/embedding.h"
#include "decode/engine.h"

namespace PUNA_ISA {

struct PackedLayer {
  PackedMatrix qkv, o, gate, up, down;
  std::vector<float> attention_norm, ffn_norm;
  std::vector<float> qkv_bias, o_bias;  // empty where there is none
};

class PackedWeights {
 public:
  puna::ModelShape shape;
  const float *cos, *sin;  // read where they are
  Embedding embedding;
  std::vector<PackedLayer> layers;
  PackedMatrix head;
  std::vector<float> final_norm;

  PackedWeights(const puna::ModelShape& s, const puna::Tables& tables, WeightFormat format)
      : shape(s),
        cos(tables.cos),
        sin(tables.sin),
        embedding(s.vocab, s.dim, format),
        head(s.dim, s.outputs, format),
        final_norm(s.dim) {
    const auto matrix = [&](int64_t in, int64_t out) { return PackedMatrix(in, out, format); };
    const std::vector<float> norm(s.dim), qkv_bias(s.qkv_bias ? q_width() + 2 * kv_width() : 0),
        o_bias(s.o_bias ? s.dim : 0);
    for (int64_t l = 0; l < s.layers; ++l)
      layers.push_back({matrix(s.dim, q_width() + 2 * kv_width()), matrix(q_width(), s.dim),
                        matrix(s.dim, s.ffn), matrix(s.dim, s.ffn), matrix(s.ffn, s.dim), norm,
                        norm, qkv_bias, o_bias});
    allocate_memory();
  }

  // Takes rows of one of the model's tensors, as puna::Engine::pack says.
  void pack(const std::string& part, int64_t layer, int64_t first, int64_t count,
            const float* rows) {
    if (part == "embedding") {
      check(first, count, shape.vocab);
      return embedding.pack(rows, first, count);
    }
    if (part == "head") return put(head, 0, shape.outputs, first, count, rows);
    if (part == "norm") return put(final_norm, first, count, rows);
    if (layer < 0 || layer >= shape.layers) throw std::invalid_argument("there is no such layer");
    PackedLayer& to = layers[layer];
    const int64_t q = q_width(), kv = kv_width();
    if (part == "q") return put(to.qkv, 0, q, first, count, rows);
    if (part == "k") return put(to.qkv, q, kv, first, count, rows);
    if (part == "v") return put(to.qkv, q + kv, kv, first, count, rows);
    if (part == "o") return put(to.o, 0, shape.dim, first, count, rows);
    if (part == "gate") return put(to.gate, 0, shape.ffn, first, count, rows);
    if (part == "up") return put(to.up, 0, shape.ffn, first, count, rows);
    if (part == "down") return put(to.down, 0, shape.dim, first, count, rows);
    if (part == "q_bias") return put(to.qkv_bias, 0, q, first, count, rows);
    if (part == "k_bias") return put(to.qkv_bias, q, kv, first, count, rows);
    if (part == "v_bias") return put(to.qkv_bias, q + kv, kv, first, count, rows);
    if (part == "o_bias") return put(to.o_bias, first, count, rows);
    if (part == "attention_norm") return put(to.attention_norm, first, count, rows);
    if (part == "ffn_norm") return put(to.ffn_norm, first, count, rows);
    throw std::invalid_argument("a layer has no " + part);
  }

 private:
  int64_t q_width() const { return shape.heads * shape.head_dim; }
  int64_t kv_width() const { return shape.kv_heads * shape.head_dim; }

  static void check(int64_t first, int64_t count, int64_t size) {
    if (first < 0 || count < 0 || count > size - first)
      throw std::invalid_argument("the rows are beyond the tensor's");
  }

  // Rows `first` on of a tensor of `size` rows, which stands in the matrix from row `place` on.
  static void put(PackedMatrix& matrix, int64_t place, int64_t size, int64_t first, int64_t count,
                  const float* rows) {
    check(first, count, size);
    matrix.pack(rows, place + first, count);
  }

  // The same of numbers.
  static void put(std::vector<float>& numbers, int64_t place, int64_t size, int64_t first,
                  int64_t count, const float* rows) {
    check(first, count, size);
    check(place, size, static_cast<int64_t>(numbers.size()));
    std::copy(rows, rows + count, numbers.begin() + place + first);
  }

  static void put(std::vector<float>& norm, int64_t first, int64_t count, const float* numbers) {
    check(first, count, static_cast<int64_t>(norm.size()));
    std::copy(numbers, numbers + count, norm.begin() + first);
  }

  // One allocation for all matrices, in the order of their use.
  void allocate_memory() {
    std::vector<PackedMatrix*> matrices;
    for (PackedLayer& layer : layers)
      for (PackedMatrix* m : {&layer.qkv, &layer.o, &layer.gate, &layer.up, &layer.down})
        matrices.push_back(m);
    matrices.push_back(&head);
    int64_t total = 0;
    for (const PackedMatrix* m : matrices) total += m->bytes();
    memory_ = allocate(total / 4);
    auto* next = reinterpret_cast<uint8_t*>(memory_.get());
    for (PackedMatrix* m : matrices) {
      m->set_memory(next);
      next += m->bytes();
    }
  }

  Buffer memory_;
};

}  // namespace PUNA_ISA
