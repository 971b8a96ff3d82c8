#include <pybind11/stl.h>

#include <stdexcept>

#include "bind/bind.h"

namespace puna {

namespace {

WeightFormat format_from(const std::string& name) {
  if (name == "fp32") return WeightFormat::fp32;
  if (name == "bf16") return WeightFormat::bf16;
  if (name == "int8") return WeightFormat::int8;
  throw std::invalid_argument("weights are fp32, bf16 or int8, not " + name);
}

std::unique_ptr<Engine> make_engine(const std::string& isa, const std::string& format,
                                    const py::dict& shape, const py::dict& weights,
                                    const py::list& layers) {
  const auto size = [&](const char* name) { return shape[name].cast<int64_t>(); };
  const ModelShape s{size("layers"),   size("dim"), size("heads"), size("kv_heads"),
                     size("head_dim"), size("ffn"), size("vocab"), shape["eps"].cast<float>()};
  const auto tensor = [](const py::dict& from, const char* name) {
    return at<const float>(from[name].cast<Address>());
  };
  Weights w{tensor(weights, "embedding"), tensor(weights, "head"), tensor(weights, "norm"),
            tensor(weights, "cos"),       tensor(weights, "sin"),  {},
            format_from(format)};
  for (const auto& item : layers) {
    const auto one = item.cast<py::dict>();
    w.layers.push_back({tensor(one, "q"), tensor(one, "k"), tensor(one, "v"), tensor(one, "o"),
                        tensor(one, "gate"), tensor(one, "up"), tensor(one, "down"),
                        tensor(one, "attention_norm"), tensor(one, "ffn_norm")});
  }
  return operations(isa).make_engine(s, w);
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
  check_range("positions", batch.positions, count, engine.max_tokens());
  check_range("wanted", batch.wanted, wanted_count, count);
  if (steps < 1) throw std::invalid_argument("steps must be at least 1");
  for (int64_t i = 0; i < wanted_count; ++i)
    if (batch.positions[batch.wanted[i]] + steps > engine.max_tokens())
      throw std::invalid_argument("the cache has no room for " + std::to_string(steps) + " steps");
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  return engine.forward(batch, drawn ? &draw : nullptr, threads);
}

uint64_t fingerprint(const std::string& isa, Address values, int64_t count, int threads) {
  return run(&Operations::fingerprint, isa, threads, at<const float>(values), count);
}

}  // namespace

void bind_engine(py::module_& m) {
  m.def("fingerprint", &fingerprint, "isa"_a, "values"_a, "count"_a, "threads"_a);
  m.def("make_engine", &make_engine, "isa"_a, "format"_a, "shape"_a, "weights"_a, "layers"_a);
  py::class_<Engine>(m, "Engine")
      .def("reserve", &Engine::reserve, "rows"_a, "max_tokens"_a)
      .def("copy_row", &Engine::copy_row, "source"_a, "target"_a, "length"_a)
      .def("forward", &forward, "count"_a, "tokens"_a, "rows"_a, "positions"_a, "wanted_count"_a,
           "wanted"_a, "logits"_a, "steps"_a, "eos"_a, "temperature"_a, "seeds"_a, "drawn"_a,
           "logprobs"_a, "threads"_a)
      .def_property_readonly("rows", &Engine::rows)
      .def_property_readonly("max_tokens", &Engine::max_tokens);
}

}  // namespace puna
