// Aligned memory for floats, and even splits of a range of numbers among threads.
#pragma once

#include "base/standard.h"

namespace PUNA_ISA {

struct FreeDeleter {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], FreeDeleter>;

// Uninitialized room for `count` floats. Large buffers ask for huge pages: 60 MB were read at
// 56 GB/s instead of 38.
inline Buffer allocate(int64_t count) {
  constexpr size_t huge_page = 2 << 20;
  const size_t wanted = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(float);
  const size_t alignment = wanted < huge_page ? 64 : huge_page;
  const size_t bytes = (wanted + alignment - 1) / alignment * alignment;
  auto* p = static_cast<float*>(std::aligned_alloc(alignment, bytes));
  if (!p) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == huge_page) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Buffer(p);
}

struct Range {
  int64_t begin, end;
};

// Part number `part` of `parts` nearly equal parts of 0 to `count`.
inline Range split(int64_t count, int part, int parts) {
  return {count * part / parts, count * (part + 1) / parts};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace PUNA_ISA
