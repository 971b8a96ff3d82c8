// A hash of a model's weights, as fast as the memory: all weights are hashed before every
// generation, because optimizers change them without torch's version counters.
#pragma once

#include "base/simd.h"
#include "base/standard.h"

namespace PUNA_ISA {

// Each step of a lane is invertible, so that one changed number always changes the state.
inline uint64_t fingerprint_part(const float* values, int64_t count) {
  constexpr int CHAINS = 8;  // hide the latency of a product
  constexpr uint32_t odd = 0x9E3779B1u;
  uvec chains[CHAINS];
  for (int c = 0; c < CHAINS; ++c) chains[c] = (c + 1) - uvec{};
  const auto mix = [&](uvec& chain, uvec value) {
    chain = (chain ^ value) * odd;
    chain ^= chain >> 15;  // a product moves no bits downwards
  };
  int64_t i = 0;
  for (; i + CHAINS * W <= count; i += CHAINS * W)
    for (int c = 0; c < CHAINS; ++c) mix(chains[c], (uvec)load(values + i + c * W));
  float rest[CHAINS * W] = {};
  std::memcpy(rest, values + i, (count - i) * sizeof(float));
  uint64_t hash = static_cast<uint64_t>(count);
  for (int c = 0; c < CHAINS; ++c) {
    mix(chains[c], (uvec)load(rest + c * W));
    for (int lane = 0; lane < W; ++lane)
      hash = ((hash ^ chains[c][lane]) * 0x9E3779B97F4A7C15ull) ^ (hash >> 31);
  }
  return hash;
}

inline uint64_t fingerprint(const float* values, int64_t count, int threads) {
  constexpr int64_t floats_per_thread = 1 << 17;  // half a megabyte
  const int parts =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count / floats_per_thread)));
  std::vector<uint64_t> hash(parts);
  puna::parallel(parts, [&](int thread, int thread_count) {
    for (int part = thread; part < parts; part += thread_count) {
      const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
      hash[part] = fingerprint_part(values + begin, end - begin);
    }
  });
  for (int part = 1; part < parts; ++part) hash[0] = (hash[0] << 1 | hash[0] >> 63) ^ hash[part];
  return hash[0];
}

}  // namespace PUNA_ISA
