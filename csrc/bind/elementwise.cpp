#include "bind/bind.h"

namespace puna {

namespace {

template <typename Work>
void run(void (*Elementwise::*operation)(const Work&, int), const std::string& isa,
         const Work& work, int threads) {
  const Operations& native = operations(isa);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  (native.elementwise.*operation)(work, threads);
}

void rms_norm(const std::string& isa, int64_t rows, int64_t width, Address x, Address weight,
              float eps, Address y, Address scale, int threads) {
  run(&Elementwise::rms_norm, isa,
      RMSNorm{rows, width, at<const float>(x), at<const float>(weight), eps, at<float>(y),
              at<float>(scale)},
      threads);
}

void rms_norm_gradient(const std::string& isa, int64_t rows, int64_t width, Address x,
                       Address weight, Address scale, Address d_y, Address d_x, Address d_weight,
                       Address partial, int threads) {
  run(&Elementwise::rms_norm_gradient, isa,
      RMSNormGradient{rows, width, at<const float>(x), at<const float>(weight),
                      at<const float>(scale), at<const float>(d_y), at<float>(d_x),
                      at<float>(d_weight), at<float>(partial)},
      threads);
}

void swiglu(const std::string& isa, int64_t count, Address gate, Address up, Address y,
            int threads) {
  run(&Elementwise::swiglu, isa,
      SwiGLU{count, at<const float>(gate), at<const float>(up), at<float>(y)}, threads);
}

void swiglu_gradient(const std::string& isa, int64_t count, Address gate, Address up, Address d_y,
                     Address d_gate, Address d_up, int threads) {
  run(&Elementwise::swiglu_gradient, isa,
      SwiGLUGradient{count, at<const float>(gate), at<const float>(up), at<const float>(d_y),
                     at<float>(d_gate), at<float>(d_up), nullptr},
      threads);
}

// (heads, strides of a row, a token and a head, address, address of the result)
Heads heads_of(const py::tuple& given) {
  return {given[0].cast<int64_t>(),
          given[1].cast<int64_t>(),
          given[2].cast<int64_t>(),
          given[3].cast<int64_t>(),
          at<const float>(given[4].cast<Address>()),
          at<float>(given[5].cast<Address>())};
}

void rope(const std::string& isa, int64_t batch, int64_t tokens, int64_t half, const py::tuple& q,
          const py::tuple& k, Address cos, Address sin, int64_t angle_batch_stride,
          int64_t angle_stride, float direction, int threads) {
  run(&Elementwise::rope, isa,
      Rope{batch, tokens, half, heads_of(q), heads_of(k), at<const float>(cos),
           at<const float>(sin), angle_batch_stride, angle_stride, direction},
      threads);
}

}  // namespace

void bind_elementwise(py::module_& m) {
  m.def("rms_norm", &rms_norm);
  m.def("rms_norm_gradient", &rms_norm_gradient);
  m.def("swiglu", &swiglu);
  m.def("swiglu_gradient", &swiglu_gradient);
  m.def("rope", &rope);
}

}  // namespace puna
