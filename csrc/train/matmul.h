// A matrix product for training: thousands of rows, operands of any strides.
#pragma once

#include <cstdint>

namespace puna {

// c (rows, columns), contiguous, = a (rows, inner) b (inner, columns), or c + that with `add`.
struct MatMul {
  int64_t rows, columns, inner;
  const float* a;
  int64_t a_row, a_inner;  // strides
  const float* b;
  int64_t b_inner, b_column;
  float* c;
  bool add;
  bool bf16 = false;  // a and b are rounded to bf16; sums are fp32
};

}  // namespace puna
