// A model's weights, packed for decoding.
#pragma once

#include "base/matrix.h"
#include "base/standard.h"
#include "decode/engine.h"

namespace PUNA_ISA {

struct PackedLayer {
  PackedMatrix qkv, o, gate, up, down;
  std::vector<float> attention_norm, ffn_norm;
};

class PackedWeights {
 public:
  puna::ModelShape shape;
  const float *embedding, *cos, *sin;  // not packed: read where they are
  std::vector<PackedLayer> layers;
  PackedMatrix head;
  std::vector<float> final_norm;

  PackedWeights(const puna::ModelShape& s, const puna::Weights& weights)
      : shape(s),
        embedding(weights.embedding),
        cos(weights.cos),
        sin(weights.sin),
        head(s.dim, s.vocab, weights.format),
        final_norm(weights.norm, weights.norm + s.dim) {
    const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
    const auto matrix = [&](int64_t in, int64_t out) {
      return PackedMatrix(in, out, weights.format);
    };
    for (const puna::LayerWeights& from : weights.layers)
      layers.push_back({matrix(s.dim, q + 2 * kv),
                        matrix(q, s.dim),
                        matrix(s.dim, s.ffn),
                        matrix(s.dim, s.ffn),
                        matrix(s.ffn, s.dim),
                        {from.attention_norm, from.attention_norm + s.dim},
                        {from.ffn_norm, from.ffn_norm + s.dim}});
    allocate_memory();
    for (size_t l = 0; l < layers.size(); ++l) {
      const puna::LayerWeights& from = weights.layers[l];
      PackedLayer& layer = layers[l];
      layer.qkv.pack(from.q, 0, q);
      layer.qkv.pack(from.k, q, kv);
      layer.qkv.pack(from.v, q + kv, kv);
      layer.o.pack(from.o, 0, s.dim);
      layer.gate.pack(from.gate, 0, s.ffn);
      layer.up.pack(from.up, 0, s.ffn);
      layer.down.pack(from.down, 0, s.dim);
    }
    head.pack(weights.head, 0, s.vocab);
  }

 private:
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
