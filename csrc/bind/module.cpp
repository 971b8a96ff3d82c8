// puna.core._C gets addresses. core/native checks dtypes, shapes and lifetimes; the values of ids
// are checked here, where that costs nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind/bind.h"

namespace puna {

std::vector<std::string> instruction_sets() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
      found.push_back("avx512_bf16");  // no processor has the first alone
    found.push_back("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
#endif
  found.push_back("base");
  return found;
}

const Operations& operations(const std::string& isa) {
  static const std::vector<std::string> found = instruction_sets();
  for (const auto& name : found) {
    if (name != isa) continue;
#if defined(__x86_64__)
    if (isa == "avx512_bf16") return operations_avx512_bf16();
    if (isa == "avx512") return operations_avx512();
    if (isa == "avx2") return operations_avx2();
#endif
    return operations_base();
  }
  throw std::invalid_argument("this machine has no " + isa);
}

// A forked child has none of the threads that OpenMP would wait for: it works on one thread.
int usable_threads(int threads) {
  static std::atomic<pid_t> first_parallel{0};
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  pid_t none = 0;
  if (threads > 1) first_parallel.compare_exchange_strong(none, getpid());
  const pid_t first = first_parallel;
  return first && first != getpid() ? 1 : threads;
}

void check_range(const char* name, const int64_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      throw std::invalid_argument(std::string(name) + " holds " + std::to_string(values[i]) +
                                  "; expected 0 to " + std::to_string(limit - 1));
}

// From now on freed memory stays with the process, large pieces too. Does nothing where glibc is
// not the C library.
void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 0x7FFFFFFF);
#endif
}

}  // namespace puna

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &puna::instruction_sets, "What this machine can run, best first.");
  m.def("keep_freed_memory", &puna::keep_freed_memory);
  puna::bind_engine(m);
  puna::bind_attention(m);
  puna::bind_elementwise(m);
  puna::bind_products(m);
}
