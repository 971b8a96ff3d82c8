// Numbers rounded to bf16, in pairs, and what multiplies them.
#pragma once

#include "base/simd.h"
#include "base/standard.h"

namespace PUNA_ISA {

// Whether there is an instruction for products of pairs. Elsewhere only weights are rounded.
#ifdef PUNA_MULTIPLIES_BF16
constexpr bool MULTIPLIES_PAIRS = true;

// sum + the products of both numbers of each pair.
inline vec multiply_add(vec sum, ivec a, ivec b) {
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// W pairs (first, second), to the nearest.
inline ivec pair_up(vec first, vec second) {
  ivec order;
  for (int i = 0; i < W; ++i) order[i] = i | (i + W) << 16;  // halves of the two, in turn
  const auto rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (ivec)_mm512_permutexvar_epi16((__m512i)order, rounded);
}
#else
constexpr bool MULTIPLIES_PAIRS = false;
ivec pair_up(vec first, vec second);  // named where nothing calls it
#endif

inline vec multiply_add(vec sum, vec a, vec b) { return sum + a * b; }

// What products of rounded numbers multiply: pairs where they can.
using Rounded = std::conditional_t<MULTIPLIES_PAIRS, Pair, float>;

// Numbers that one Number holds.
template <typename Number>
constexpr int64_t NUMBERS = std::is_same_v<Number, Pair> ? 2 : 1;

// To the nearest; of two as near, to the even one.
inline uint32_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FC0;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline Pair to_pair(float first, float second) { return {to_bf16(first) | to_bf16(second) << 16}; }

// How many pairs hold `count` numbers; the last one may hold a zero.
inline int64_t pairs_of(int64_t count) { return (count + 1) / 2; }

// Rounds a row of `count` numbers, neighbours becoming pairs; `to` may be `from`.
inline void round_row(const float* from, int64_t count, Pair* to) {
  int64_t i = 0;
#ifdef PUNA_MULTIPLIES_BF16
  for (; i + W <= count; i += W) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)load(from + i));
    std::memcpy(to + i / 2, &rounded, sizeof rounded);
  }
#endif
  for (; i < count; i += 2) to[i / 2] = to_pair(from[i], i + 1 < count ? from[i + 1] : 0.0f);
}

}  // namespace PUNA_ISA
