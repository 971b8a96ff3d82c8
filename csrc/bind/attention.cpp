#include <stdexcept>

#include "bind/bind.h"

namespace puna {

namespace {

void attention(const std::string& isa, const Attention& a, int threads) {
  const Operations& native = operations(isa);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  native.attention(a, threads);
}

void attention_backward(const std::string& isa, const Attention& a, Address d_out,
                        int64_t d_out_stride, Address dq, Address dk, Address dv, int threads) {
  const Operations& native = operations(isa);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  native.attention_backward(
      {a, at<const float>(d_out), d_out_stride, at<float>(dq), at<float>(dk), at<float>(dv)},
      threads);
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<Attention>(m, "Attention")
      .def(py::init([](int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t segments,
                       Address cuts, float scale, Address q, Address k, Address v, int64_t q_stride,
                       int64_t k_stride, int64_t v_stride, Address out, Address lse) {
        return Attention{heads,
                         kv_heads,
                         head_dim,
                         segments,
                         at<const int64_t>(cuts),
                         scale,
                         at<const float>(q),
                         at<const float>(k),
                         at<const float>(v),
                         q_stride,
                         k_stride,
                         v_stride,
                         at<float>(out),
                         at<float>(lse)};
      }));
  m.def("attention", &attention);
  m.def("attention_backward", &attention_backward);
}

}  // namespace puna
