// A model's packed weights and the sessions on them.
#pragma once

#include "decode/session_impl.h"

namespace PUNA_ISA {

class Llama final : public puna::Engine {
 public:
  Llama(const ModelShape& shape, const puna::Tables& tables, WeightFormat format)
      : weights_(shape, tables, format) {
    if (!attend_kernel_for(shape.head_dim, false).run)
      throw std::invalid_argument("this instruction set cannot split the head size");
  }
  void pack(const std::string& part, int64_t layer, int64_t first, int64_t count,
            const float* rows) override {
    weights_.pack(part, layer, first, count, rows);
  }
  std::unique_ptr<puna::Session> new_session() const override {
    return std::make_unique<LlamaSession>(weights_);
  }

 private:
  PackedWeights weights_;
};

}  // namespace PUNA_ISA
