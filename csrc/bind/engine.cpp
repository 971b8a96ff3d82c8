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
                                    const py::dict& shape, Address cos, Address sin) {
  const auto size = [&](const char* name) { return shape[name].cast<int64_t>(); };
  const auto has = [&](const char* name) { return shape[name].cast<bool>(); };
  const ModelShape s{size("layers"),   size("dim"),    size("heads"), size("kv_heads"),
                     size("head_dim"), size("ffn"),    size("vocab"), size("outputs"),
                     has("qkv_bias"),  has("o_bias"), shape["eps"].cast<float>()};
  const Tables tables{at<const float>(cos), at<const float>(sin)};
  const WeightFormat wanted = format_from(format);
  const Operations& native = operations(isa);
  py::gil_scoped_release released;
  return native.make_engine(s, tables, wanted);
}

void pack(Engine& engine, const std::string& part, int64_t layer, int64_t first, int64_t count,
          Address rows) {
  const auto* from = at<const float>(rows);
  py::gil_scoped_release released;
  engine.pack(part, layer, first, count, from);
}

// Whoever comes into a session while another thread is in it is turned away: the two would write to
// one cache.
class Turn {
 public:
  explicit Turn(Session& session) : session_(session) {
    if (session_.busy.exchange(true))
      throw std::runtime_error("another thread is in this session; a call needs one of its own");
  }
  ~Turn() { session_.busy = false; }
  Turn(const Turn&) = delete;

 private:
  Session& session_;
};

void reserve(Session& session, int64_t rows, int64_t max_tokens) {
  const Turn turn(session);
  session.reserve(rows, max_tokens);
}

void copy_row(Session& session, int64_t source, int64_t target, int64_t length) {
  const Turn turn(session);
  session.copy_row(source, target, length);
}

int64_t forward(Session& session, int64_t count, Address tokens, Address rows, Address positions,
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
  const Turn turn(session);
  check_range("tokens", batch.tokens, count, session.vocab());
  check_range("rows", batch.rows, count, session.rows());
  check_range("positions", batch.positions, count, session.max_tokens());
  check_range("wanted", batch.wanted, wanted_count, count);
  if (drawn && session.outputs() != session.vocab())
    throw std::invalid_argument("this head gives no logits of tokens, so there is none to draw");
  if (steps < 1) throw std::invalid_argument("steps must be at least 1");
  for (int64_t i = 0; i < wanted_count; ++i)
    if (batch.positions[batch.wanted[i]] + steps > session.max_tokens())
      throw std::invalid_argument("the cache has no room for " + std::to_string(steps) + " steps");
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  return session.forward(batch, drawn ? &draw : nullptr, threads);
}

uint64_t fingerprint(const std::string& isa, Address values, int64_t count, int threads) {
  return run(&Operations::fingerprint, isa, threads, at<const float>(values), count);
}

}  // namespace

void bind_engine(py::module_& m) {
  m.def("fingerprint", &fingerprint, "isa"_a, "values"_a, "count"_a, "threads"_a);
  m.def("make_engine", &make_engine, "isa"_a, "format"_a, "shape"_a, "cos"_a, "sin"_a);
  py::class_<Engine>(m, "Engine")
      .def("pack", &pack, "part"_a, "layer"_a, "first"_a, "count"_a, "rows"_a)
      .def("new_session", &Engine::new_session, py::keep_alive<0, 1>());
  py::class_<Session>(m, "Session")
      .def("reserve", &reserve, "rows"_a, "max_tokens"_a)
      .def("copy_row", &copy_row, "source"_a, "target"_a, "length"_a)
      .def("forward", &forward, "count"_a, "tokens"_a, "rows"_a, "positions"_a, "wanted_count"_a,
           "wanted"_a, "logits"_a, "steps"_a, "eos"_a, "temperature"_a, "seeds"_a, "drawn"_a,
           "logprobs"_a, "threads"_a)
      .def_property_readonly("rows", &Session::rows)
      .def_property_readonly("max_tokens", &Session::max_tokens);
}

}  // namespace puna
