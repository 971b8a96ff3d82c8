// Which tokens of a batch go together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "decode/engine.h"

namespace puna {

// Where each thread's own tokens begin, never inside a row. Empty where the threads should share
// every block instead: the parts would be uneven, or there are so few tokens that reading the
// weights only once is faster.
inline std::vector<int64_t> split_at_rows(const Batch& batch, int threads) {
  if (threads == 1) return {0, batch.count};
  if (batch.count < 8 * threads) return {};
  std::vector<int64_t> bounds{0};
  for (int part = 1; part < threads; ++part) {
    int64_t at = std::max(bounds.back(), batch.count * part / threads);
    while (at < batch.count && at > 0 && batch.rows[at] == batch.rows[at - 1]) ++at;
    bounds.push_back(at);
  }
  bounds.push_back(batch.count);
  for (int part = 0; part < threads; ++part)
    if ((bounds[part + 1] - bounds[part]) * threads > batch.count * 5 / 4) return {};
  return bounds;
}

inline std::vector<int64_t> places(int64_t count) {
  std::vector<int64_t> all(count);
  for (int64_t i = 0; i < count; ++i) all[i] = i;
  return all;
}

// Of a block's tokens, those that the last layer finishes: each row's from its first wanted one
// on. Of the others nothing is read but the keys and values that they leave there.
inline std::vector<int64_t> needed_at_the_end(const Batch& batch, int64_t first, int64_t count) {
  std::vector<bool> wanted(count);
  for (int64_t i = 0; i < batch.wanted_count; ++i)
    if (batch.wanted[i] >= first && batch.wanted[i] < first + count)
      wanted[batch.wanted[i] - first] = true;
  std::vector<int64_t> needed;
  bool begun = false;
  for (int64_t i = 0; i < count; ++i) {
    if (i > 0 && batch.rows[first + i] != batch.rows[first + i - 1]) begun = false;
    begun = begun || wanted[i];
    if (begun) needed.push_back(i);
  }
  return needed;
}

}  // namespace puna
