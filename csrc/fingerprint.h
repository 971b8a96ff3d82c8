// A number that changes when any of some floats does.
#pragma once

#include <cstdint>

namespace puna {

uint64_t fingerprint_avx512(const float* values, int64_t count, int threads);
uint64_t fingerprint_avx2(const float* values, int64_t count, int threads);
uint64_t fingerprint_base(const float* values, int64_t count, int threads);

}  // namespace puna
