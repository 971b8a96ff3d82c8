// puna.core._C: addresses in. core/native.py checks dtypes, shapes and lifetimes; what the numbers
// themselves may be is checked here, where it costs nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "engine.h"
#include "fingerprint.h"
#include "losses.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

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

void check_isa(const std::string& isa) {
  static const std::vector<std::string> found = instruction_sets();
  for (const auto& name : found)
    if (name == isa) return;
  throw std::invalid_argument("this machine has no " + isa);
}

puna::Format format_called(const std::string& name) {
  if (name == "fp32") return puna::Format::fp32;
  if (name == "bf16") return puna::Format::bf16;
  if (name == "int8") return puna::Format::int8;
  throw std::invalid_argument("weights are fp32, bf16 or int8, not " + name);
}

std::unique_ptr<puna::Engine> make_engine(const std::string& isa, const std::string& format,
                                          const py::dict& shape, const py::dict& weights,
                                          const py::list& layers) {
  const auto size = [&](const char* name) { return shape[name].cast<int64_t>(); };
  const puna::Shape s{size("layers"),   size("dim"), size("heads"), size("kv_heads"),
                      size("head_dim"), size("ffn"), size("vocab"),
                      shape["eps"].cast<float>()};
  const auto tensor = [](const py::dict& from, const char* name) {
    return at<const float>(from[name].cast<Address>());
  };
  puna::Weights w{tensor(weights, "embedding"), tensor(weights, "head"), tensor(weights, "norm"),
                  tensor(weights, "cos"),       tensor(weights, "sin"),  {},
                  format_called(format)};
  for (const auto& item : layers) {
    const auto one = item.cast<py::dict>();
    w.layers.push_back({tensor(one, "q"), tensor(one, "k"), tensor(one, "v"), tensor(one, "o"),
                        tensor(one, "gate"), tensor(one, "up"), tensor(one, "down"),
                        tensor(one, "attention_norm"), tensor(one, "ffn_norm")});
  }
  check_isa(isa);
#if defined(__x86_64__)
  if (isa == "avx512") return puna::make_engine_avx512(s, w);
  if (isa == "avx2") return puna::make_engine_avx2(s, w);
#endif
  return puna::make_engine_base(s, w);
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

int64_t forward(puna::Engine& engine, int64_t count, Address tokens, Address rows,
                Address positions, int64_t wanted_count, Address wanted, Address logits,
                int64_t steps, int64_t eos, float temperature, Address seeds, Address drawn,
                Address logprobs, int threads) {
  const puna::Batch batch{count,
                          at<const int64_t>(tokens),
                          at<const int64_t>(rows),
                          at<const int64_t>(positions),
                          wanted_count,
                          at<const int64_t>(wanted),
                          at<float>(logits)};
  const puna::Draw draw{steps, eos, temperature, at<const int64_t>(seeds), at<int64_t>(drawn),
                        at<float>(logprobs)};
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

void softmax_loss(const std::string& isa, int64_t rows, int64_t vocab, Address logits,
                  Address labels, Address scale, float z_loss, Address losses, int threads) {
  const puna::SoftmaxLoss work{rows,   vocab, at<float>(logits), at<const int64_t>(labels),
                               at<const float>(scale), z_loss, at<float>(losses)};
  check_isa(isa);
  check_range("targets", work.labels, rows, vocab);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
#if defined(__x86_64__)
  if (isa == "avx512") return puna::softmax_loss_avx512(work, threads);
  if (isa == "avx2") return puna::softmax_loss_avx2(work, threads);
#endif
  puna::softmax_loss_base(work, threads);
}

uint64_t fingerprint(const std::string& isa, Address address, int64_t count, int threads) {
  const auto* values = at<const float>(address);
  check_isa(isa);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
#if defined(__x86_64__)
  if (isa == "avx512") return puna::fingerprint_avx512(values, count, threads);
  if (isa == "avx2") return puna::fingerprint_avx2(values, count, threads);
#endif
  return puna::fingerprint_base(values, count, threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("instruction_sets", &instruction_sets, "What this machine can run, best first.");
  m.def("fingerprint", &fingerprint);
  m.def("softmax_loss", &softmax_loss);
  m.def("make_engine", &make_engine);
  py::class_<puna::Engine>(m, "Engine")
      .def("reserve", &puna::Engine::reserve)
      .def("copy_row", &puna::Engine::copy_row)
      .def("forward", &forward)
      .def_property_readonly("rows", &puna::Engine::rows)
      .def_property_readonly("slots", &puna::Engine::slots);
}
