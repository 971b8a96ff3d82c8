// A vector type for the instruction set of this translation unit, by GCC's and clang's vector
// extensions: the same source compiles to AVX-512, AVX2, SSE2 or NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace PUNA_ISA {

constexpr int W = PUNA_WIDTH;  // floats in a vector

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef uint32_t uvec __attribute__((vector_size(W * 4)));

inline vec load(const float* p) {
  vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }

// Two bf16 numbers, the first in the lower half: neighbours in the inner dimension of a product.
struct Pair {
  uint32_t bits;
};

inline ivec load(const Pair* p) {
  ivec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// One number of each pair: a bf16 number is the upper half of a float.
inline vec first_of(ivec pairs) { return (vec)(pairs << 16); }
inline vec second_of(ivec pairs) { return (vec)(pairs & static_cast<int32_t>(0xFFFF0000)); }

// Four integers of -127 to 127, as `dot4` reads them; and W integers as such.
#ifdef PUNA_MULTIPLIES_BYTES
struct Quad {
  int32_t bytes;
};

inline void store(Quad* to, ivec integers) {
  typedef int8_t bytes __attribute__((vector_size(W)));
  const bytes narrow = __builtin_convertvector(integers, bytes);
  std::memcpy(to, &narrow, sizeof narrow);
}

// Adds to each lane of `sum` the dot product of its 4 bytes, 0 to 255, with the integers of a quad.
inline ivec dot4(ivec sum, ivec bytes, Quad quad) {
  return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)bytes, _mm512_set1_epi32(quad.bytes));
}
#else
struct Quad {
  int32_t even, odd;  // integers 0 and 2 as 16-bit halves, and 1 and 3
};

inline void store(Quad* to, ivec integers) {
  const auto halves = [&](int i) {
    return (integers[i] & 0xFFFF) |
           static_cast<int32_t>(static_cast<uint32_t>(integers[i + 2]) << 16);
  };
  for (int i = 0; i < W; i += 4) *to++ = {halves(i), halves(i + 1)};
}

// The same where no instruction multiplies bytes without losing what is above 16 bits.
inline ivec dot4(ivec sum, ivec bytes, Quad quad) {
  const ivec low = bytes & 0x00FF00FF, high = (ivec)((uvec)bytes >> 8) & 0x00FF00FF;
#if PUNA_WIDTH == 16
  const auto pairs = [](ivec a, int32_t b) {
    return (ivec)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(b));
  };
#elif PUNA_WIDTH == 8
  const auto pairs = [](ivec a, int32_t b) {
    return (ivec)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(b));
  };
#else
  const auto pairs = [](ivec a, int32_t b) {
    return (a & 0xFFFF) * static_cast<int16_t>(b) + (a >> 16) * (b >> 16);
  };
#endif
  return sum + pairs(low, quad.even) + pairs(high, quad.odd);
}
#endif

inline vec broadcast(float x) { return x - vec{}; }  // subtracting keeps a negative zero
inline ivec broadcast(Pair x) { return static_cast<int32_t>(x.bits) - ivec{}; }

inline vec select(ivec condition, vec a, vec b) { return condition ? a : b; }

// Where one argument is NaN: the first argument. (Written so that it is one instruction.)
inline vec max(vec a, vec b) { return b > a ? b : a; }
inline vec min(vec a, vec b) { return b < a ? b : a; }

// The sum of COUNT vectors' numbers. The second half is added to the first until one number is
// left: an order that does not depend on the length of a vector.
template <int COUNT>
inline float reduce_sum(const vec (&vectors)[COUNT]) {
  vec sums[COUNT];
  std::memcpy(sums, vectors, sizeof sums);
#pragma GCC unroll 8
  for (int half = COUNT / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  float lanes[W];
  store(lanes, sums[0]);
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float reduce_sum(vec v) { return reduce_sum<1>({v}); }

// op(a, b) of all lanes, which must not depend on their order. Halves stay vectors of their own
// length: as numbers in memory they took four times as long.
template <int LANES = W, typename Lanes, typename Op>
inline auto reduce(Lanes v, Op op) {
  if constexpr (LANES == 2) {
    return op(v[0], v[1]);
  } else {
    typedef decltype(v[0] + v[0]) Half __attribute__((vector_size(LANES * 2)));
    Half halves[2];
    std::memcpy(halves, &v, sizeof v);
    return reduce<LANES / 2>(op(halves[0], halves[1]), op);
  }
}

inline float reduce_max(vec v) {
  float result = v[0];
  for (int i = 1; i < W; ++i) result = v[i] > result ? v[i] : result;
  return result;
}

// Alternate elements of a and b, from the first half of both or from the second.
inline vec interleave(vec a, vec b, bool second) {
#ifdef __clang__
  vec v;
  for (int i = 0; i < W; ++i) v[i] = (i % 2 ? b : a)[i / 2 + (second ? W / 2 : 0)];
  return v;
#else
  ivec from;
  for (int i = 0; i < W; ++i) from[i] = i / 2 + (second ? W / 2 : 0) + (i % 2 ? W : 0);
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes W rows of W numbers. Each round rotates the bits of the index (row, column) by one.
inline void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
  vec rows[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) rows[i] = load(from + i * stride);
  for (int round = 1; round < W; round *= 2) {
    vec interleaved[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      interleaved[i] = interleave(rows[i / 2], rows[i / 2 + W / 2], i % 2);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = interleaved[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(to + i * to_stride, rows[i]);
}

// e^x to about 2 units in the last place, for x up to 88; below -87.3 it stays at 1e-38.
inline vec exp(vec x) {
  x = max(min(x, broadcast(88.0f)), broadcast(-87.3f));
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const vec n = (x * 1.44269504f + magic) - magic;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec y = broadcast(1.9875691e-4f);
  y = y * r + 1.3981999e-3f;
  y = y * r + 8.3334519e-3f;
  y = y * r + 4.1665796e-2f;
  y = y * r + 1.6666665e-1f;
  y = y * r + 5.0000001e-1f;
  y = y * (r * r) + r + 1.0f;
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  return y * (vec)power;
}

}  // namespace PUNA_ISA
