// puna.core._C: addresses in. core/native.py checks dtypes, shapes and lifetimes; what the numbers
// themselves may be is checked here, where it costs nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

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
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    found.push_back("avx512");
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
    if (isa == "avx512") return operations_avx512();
    if (isa == "avx2") return operations_avx2();
#endif
    return operations_base();
  }
  throw std::invalid_argument("this machine has no " + isa);
}

Format format_called(const std::string& name) {
  if (name == "fp32") return Format::fp32;
  if (name == "bf16") return Format::bf16;
  if (name == "int8") return Format::int8;
  throw std::invalid_argument("weights are fp32, bf16 or int8, not " + name);
}

std::unique_ptr<Engine> make_engine(const std::string& isa, const std::string& format,
                                    const py::dict& shape, const py::dict& weights,
                                    const py::list& layers) {
  const auto size = [&](const char* name) { return shape[name].cast<int64_t>(); };
  const Shape s{size("layers"),   size("dim"), size("heads"), size("kv_heads"),
                size("head_dim"), size("ffn"), size("vocab"), shape["eps"].cast<float>()};
  const auto tensor = [](const py::dict& from, const char* name) {
    return at<const float>(from[name].cast<Address>());
  };
  Weights w{tensor(weights, "embedding"), tensor(weights, "head"), tensor(weights, "norm"),
            tensor(weights, "cos"),       tensor(weights, "sin"),  {},
            format_called(format)};
  for (const auto& item : layers) {
    const auto one = item.cast<py::dict>();
    w.layers.push_back({tensor(one, "q"), tensor(one, "k"), tensor(one, "v"), tensor(one, "o"),
                        tensor(one, "gate"), tensor(one, "up"), tensor(one, "down"),
                        tensor(one, "attention_norm"), tensor(one, "ffn_norm")});
  }
  return operations(isa).make_engine(s, w);
}

// A forked child has none of the threads that OpenMP waits for: there, one thread does it all.
int usable_threads(int threads) {
  static pid_t first_parallel = 0;
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");
  if (threads > 1 && !first_parallel) first_parallel = getpid();
  return first_parallel && first_parallel != getpid() ? 1 : threads;
}

void check_range(const char* name, const int64_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= limit)
      throw std::invalid_argument(std::string(name) + " holds " + std::to_string(values[i]) +
                                  "; expected 0 to " + std::to_string(limit - 1));
}

int64_t forward(Engine& engine, int64_t count, Address tokens, Address rows, Address positions,
                int64_t wanted_count, Address wanted, Address logits, int64_t steps, int64_t eos,
                float temperature, Address seeds, Address drawn, Address logprobs, int threads) {
  const Batch batch{count,
                    at<const int64_t>(tokens),
                    at<const int64_t>(rows),
                    at<const int64_t>(positions),
                    wanted_count,
                    at<const int64_t>(wanted),
                    at<float>(logits)};
  const Draw draw{
      steps, eos, temperature, at<const int64_t>(seeds), at<int64_t>(drawn), at<float>(logprobs)};
  check_range("tokens", batch.tokens, count, engine.vocab());
  check_range("rows", batch.rows, count, engine.rows());
  check_range("positions", batch.positions, count, engine.slots());
  check_range("wanted", batch.wanted, wanted_count, count);
  if (steps < 1) throw std::invalid_argument("steps must be at least 1");
  for (int64_t i = 0; i < wanted_count; ++i)
    if (batch.positions[batch.wanted[i]] + steps > engine.slots())
      throw std::invalid_argument("the cache has no room for " + std::to_string(steps) + " steps");
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  return engine.forward(batch, drawn ? &draw : nullptr, threads);
}

// Freed memory stays with the process, large pieces too. (Where glibc is not the C library, what is
// there stays as it is.)
void keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 0x7FFFFFFF);
#endif
}

uint64_t fingerprint(const std::string& isa, Address address, int64_t count, int threads) {
  const Operations& native = operations(isa);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  return native.fingerprint(at<const float>(address), count, threads);
}

}  // namespace puna

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &puna::instruction_sets, "What this machine can run, best first.");
  m.def("fingerprint", &puna::fingerprint);
  m.def("keep_freed_memory", &puna::keep_freed_memory);
  m.def("make_engine", &puna::make_engine);
  py::class_<puna::Engine>(m, "Engine")
      .def("reserve", &puna::Engine::reserve)
      .def("copy_row", &puna::Engine::copy_row)
      .def("forward", &puna::forward)
      .def_property_readonly("rows", &puna::Engine::rows)
      .def_property_readonly("slots", &puna::Engine::slots);
  puna::bind_attention(m);
  puna::bind_elementwise(m);
  puna::bind_products(m);
}
