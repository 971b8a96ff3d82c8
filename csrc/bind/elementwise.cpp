#include "bind/bind.h"

namespace puna {

namespace {

void rms_norm(const std::string& isa, int64_t rows, int64_t width, Address x, Address weight,
              float eps, Address y, Address scale, int threads) {
  run(&Operations::rms_norm, isa, threads,
      RMSNorm{rows, width, at<const float>(x), at<const float>(weight), eps, at<float>(y),
              at<float>(scale)});
}

void rms_norm_gradient(const std::string& isa, int64_t rows, int64_t width, Address x,
                       Address weight, Address scale, Address d_y, Address d_x, Address d_weight,
                       Address partial, int threads) {
  run(&Operations::rms_norm_gradient, isa, threads,
      RMSNormGradient{rows, width, at<const float>(x), at<const float>(weight),
                      at<const float>(scale), at<const float>(d_y), at<float>(d_x),
                      at<float>(d_weight), at<float>(partial)});
}

void swiglu(const std::string& isa, int64_t count, Address gate, Address up, Address y,
            int threads) {
  run(&Operations::swiglu, isa, threads,
      SwiGLU{count, at<const float>(gate), at<const float>(up), at<float>(y)});
}

void swiglu_gradient(const std::string& isa, int64_t count, Address gate, Address up, Address d_y,
                     Address d_gate, Address d_up, int threads) {
  run(&Operations::swiglu_gradient, isa, threads,
      SwiGLUGradient{count, at<const float>(gate), at<const float>(up), at<const float>(d_y),
                     at<float>(d_gate), at<float>(d_up), nullptr});
}

// (heads, strides of a row, a token and a head, address, address of the result)
Heads heads_from(const py::tuple& t) {
  return {t[0].cast<int64_t>(),
          t[1].cast<int64_t>(),
          t[2].cast<int64_t>(),
          t[3].cast<int64_t>(),
          at<const float>(t[4].cast<Address>()),
          at<float>(t[5].cast<Address>())};
}

void rope(const std::string& isa, int64_t batch, int64_t tokens, int64_t half, const py::tuple& q,
          const py::tuple& k, Address cos, Address sin, int64_t angle_batch_stride,
          int64_t angle_stride, float direction, int threads) {
  run(&Operations::rope, isa, threads,
      Rope{batch, tokens, half, heads_from(q), heads_from(k), at<const float>(cos),
           at<const float>(sin), angle_batch_stride, angle_stride, direction});
}

}  // namespace

void bind_elementwise(py::module_& m) {
  m.def("rms_norm", &rms_norm, "isa"_a, "rows"_a, "width"_a, "x"_a, "weight"_a, "eps"_a, "y"_a,
        "scale"_a, "threads"_a);
  m.def("rms_norm_gradient", &rms_norm_gradient, "isa"_a, "rows"_a, "width"_a, "x"_a, "weight"_a,
        "scale"_a, "d_y"_a, "d_x"_a, "d_weight"_a, "partial"_a, "threads"_a);
  m.def("swiglu", &swiglu, "isa"_a, "count"_a, "gate"_a, "up"_a, "y"_a, "threads"_a);
  m.def("swiglu_gradient", &swiglu_gradient, "isa"_a, "count"_a, "gate"_a, "up"_a, "d_y"_a,
        "d_gate"_a, "d_up"_a, "threads"_a);
  m.def("rope", &rope, "isa"_a, "batch"_a, "tokens"_a, "half"_a, "q"_a, "k"_a, "cos"_a, "sin"_a,
        "angle_batch_stride"_a, "angle_stride"_a, "direction"_a, "threads"_a);
}

}  // namespace puna
