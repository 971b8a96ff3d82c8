// As fast as the memory, for weights are read again before every generation: optimizers write to
// them unseen by torch's version counters.
#pragma once

#include "base/simd.h"
#include "base/standard.h"

namespace PUNA_ISA {

// Each lane goes from state to state by steps that can be undone, so that one changed number
// always leaves a changed state.
inline uint64_t fingerprint_part(const float* values, int64_t count) {
  constexpr int CHAINS = 8;  // hide the latency of a product
  constexpr uint32_t odd = 0x9E3779B1u;
  uvec chains[CHAINS];
  for (int c = 0; c < CHAINS; ++c) chains[c] = (c + 1) - uvec{};
  const auto mix = [&](uvec& chain, uvec value) {
    chain = (chain ^ value) * odd;
    chain ^= chain >> 15;  // a product moves nothing downwards
  };
  int64_t i = 0;
  for (; i + CHAINS * W <= count; i += CHAINS * W)
    for (int c = 0; c < CHAINS; ++c) mix(chains[c], (uvec)load(values + i + c * W));
  float rest[CHAINS * W] = {};
  std::memcpy(rest, values + i, (count - i) * sizeof(float));
  uint64_t found = static_cast<uint64_t>(count);
  for (int c = 0; c < CHAINS; ++c) {
    mix(chains[c], (uvec)load(rest + c * W));
    for (int lane = 0; lane < W; ++lane)
      found = ((found ^ chains[c][lane]) * 0x9E3779B97F4A7C15ull) ^ (found >> 31);
  }
  return found;
}

inline uint64_t fingerprint(const float* values, int64_t count, int threads) {
  constexpr int64_t worth_a_thread = 1 << 17;  // half a megabyte
  const int parts =
      static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, count / worth_a_thread)));
  std::vector<uint64_t> found(parts);
  puna::parallel(parts, [&](int mine, int present) {
    for (int part = mine; part < parts; part += present) {
      const int64_t begin = count * part / parts, end = count * (part + 1) / parts;
      found[part] = fingerprint_part(values + begin, end - begin);
    }
  });
  for (int part = 1; part < parts; ++part)
    found[0] = (found[0] << 1 | found[0] >> 63) ^ found[part];
  return found[0];
}

}  // namespace PUNA_ISA
