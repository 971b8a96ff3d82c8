#include "bind/bind.h"

namespace puna {

namespace {

Attention make_attention(int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t segments,
                         Address cu_seqlens, float scale, Address q, Address k, Address v,
                         int64_t q_stride, int64_t k_stride, int64_t v_stride, Address out,
                         Address lse, bool bf16) {
  return {heads,
          kv_heads,
          head_dim,
          segments,
          at<const int64_t>(cu_seqlens),
          scale,
          at<const float>(q),
          at<const float>(k),
          at<const float>(v),
          q_stride,
          k_stride,
          v_stride,
          at<float>(out),
          at<float>(lse),
          bf16};
}

void attention(const std::string& isa, const Attention& a, int threads) {
  run(&Operations::attention, isa, threads, a);
}

void attention_backward(const std::string& isa, const Attention& a, Address d_out,
                        int64_t d_out_stride, Address dq, Address dk, Address dv, int threads) {
  run(&Operations::attention_backward, isa, threads,
      AttentionBackward{a, at<const float>(d_out), d_out_stride, at<float>(dq), at<float>(dk),
                        at<float>(dv)});
}

}  // namespace

void bind_attention(py::module_& m) {
  py::class_<Attention>(m, "Attention")
      .def(py::init(&make_attention), "heads"_a, "kv_heads"_a, "head_dim"_a, "segments"_a,
           "cu_seqlens"_a, "scale"_a, "q"_a, "k"_a, "v"_a, "q_stride"_a, "k_stride"_a, "v_stride"_a,
           "out"_a, "lse"_a, "bf16"_a);
  m.def("attention", &attention, "isa"_a, "attention"_a, "threads"_a);
  m.def("attention_backward", &attention_backward, "isa"_a, "attention"_a, "d_out"_a,
        "d_out_stride"_a, "dq"_a, "dk"_a, "dv"_a, "threads"_a);
}

}  // namespace puna
