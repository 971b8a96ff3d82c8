// A token's first hidden state, looked up row by row: fp32, or int8 in groups that share a scale.
#pragma once

#include "base/buffer.h"
#include "base/int8.h"
#include "base/standard.h"
#include "base/weight_format.h"

namespace PUNA_ISA {

using puna::WeightFormat;

class Embedding {
 public:
  // (rows, dim). bf16 keeps fp32: what is drawn and what is trained on start from the same numbers.
  Embedding(int64_t rows, int64_t dim, WeightFormat format)
      : dim_(dim), is_int8_(format == WeightFormat::int8), memory_(allocate(rows * row_floats())) {
    if (is_int8_) std::memset(memory_.get(), 0, rows * row_floats() * sizeof(float));
  }

  // Takes `weights` (count, dim) as the rows from `first` on.
  void pack(const float* weights, int64_t first, int64_t count) {
    for (int64_t row = 0; row < count; ++row) {
      const float* from = weights + row * dim_;
      float* to = memory_.get() + (first + row) * row_floats();
      if (!is_int8_) {
        std::memcpy(to, from, dim_ * sizeof(float));
        continue;
      }
      for (int64_t begin = 0; begin < dim_; begin += QUANT_GROUP, to += GROUP_FLOATS) {
        const int64_t size = std::min<int64_t>(QUANT_GROUP, dim_ - begin);
        auto* numbers = reinterpret_cast<int8_t*>(to + 1);
        *to = round_group(from + begin, size, [&](int64_t i, int integer) {
          numbers[i] = static_cast<int8_t>(integer);
        });
      }
    }
  }

  // Row `token` into y (dim).
  void read(int64_t token, float* y) const {
    const float* row = memory_.get() + token * row_floats();
    if (!is_int8_) {
      std::memcpy(y, row, dim_ * sizeof(float));
      return;
    }
    for (int64_t i = 0; i < dim_; ++i) {
      const float* group = row + i / QUANT_GROUP * GROUP_FLOATS;
      y[i] = group[0] * reinterpret_cast<const int8_t*>(group + 1)[i % QUANT_GROUP];
    }
  }

 private:
  static constexpr int64_t GROUP_FLOATS = 1 + QUANT_GROUP / 4;  // a scale, and four numbers each

  int64_t row_floats() const {
    return is_int8_ ? ceil_div(dim_, QUANT_GROUP) * GROUP_FLOATS : dim_;
  }

  int64_t dim_;
  bool is_int8_;
  Buffer memory_;
};

}  // namespace PUNA_ISA
