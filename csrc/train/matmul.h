// A matrix product for training: thousands of rows, every matrix where it lies.
#pragma once

#include <cstdint>

namespace puna {

// c (rows, columns), without gaps, = a (rows, inner) b (inner, columns), or c + that with `add`.
struct MatMul {
  int64_t rows, columns, inner;
  const float* a;
  int64_t a_row, a_inner;  // from one element to the next
  const float* b;
  int64_t b_inner, b_column;
  float* c;
  bool add;
};

}  // namespace puna
