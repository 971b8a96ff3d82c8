// Matrix products, the feed-forward layer made of them, and the losses of a chunk of logits.
#include "bind/bind.h"

namespace puna {

namespace {

// (address, stride from one row to the next, from one column to the next)
struct Strided {
  const float* data;
  int64_t row, column;

  explicit Strided(const py::tuple& t)
      : data(at<const float>(t[0].cast<Address>())),
        row(t[1].cast<int64_t>()),
        column(t[2].cast<int64_t>()) {}
};

void matmul(const std::string& isa, int64_t rows, int64_t columns, int64_t inner,
            const py::tuple& a, const py::tuple& b, Address c, bool add, bool bf16, int threads) {
  const Strided left(a), right(b);
  run(&Operations::matmul, isa, threads,
      MatMul{rows, columns, inner, left.data, left.row, left.column, right.data, right.row,
             right.column, at<float>(c), add, bf16});
}

void feed_forward(const std::string& isa, int64_t rows, int64_t width, int64_t hidden, Address x,
                  Address gate, Address up, Address down, Address gates, Address ups, Address y,
                  bool bf16, int threads) {
  run(&Operations::feed_forward, isa, threads,
      FeedForward{rows, width, hidden, at<const float>(x), at<const float>(gate),
                  at<const float>(up), at<const float>(down), at<float>(gates), at<float>(ups),
                  at<float>(y), bf16});
}

void feed_forward_gradient(const std::string& isa, int64_t rows, int64_t width, int64_t hidden,
                           Address x, Address gate, Address up, Address down, Address gates,
                           Address ups, Address d_y, Address d_x, Address d_gate, Address d_up,
                           Address d_down, bool bf16, int threads) {
  run(&Operations::feed_forward_gradient, isa, threads,
      FeedForwardGradient{rows, width, hidden, at<const float>(x), at<const float>(gate),
                          at<const float>(up), at<const float>(down), at<const float>(gates),
                          at<const float>(ups), at<const float>(d_y), at<float>(d_x),
                          at<float>(d_gate), at<float>(d_up), at<float>(d_down), bf16});
}

void softmax_loss(const std::string& isa, int64_t rows, int64_t vocab, Address logits,
                  Address labels, Address scale, float z_loss, Address losses, int threads) {
  check_range("targets", at<const int64_t>(labels), rows, vocab);
  run(&Operations::softmax_loss, isa, threads,
      SoftmaxLoss{rows, vocab, at<float>(logits), at<const int64_t>(labels), at<const float>(scale),
                  z_loss, at<float>(losses)});
}

void logprobs(const std::string& isa, int64_t rows, int64_t vocab, Address logits, Address labels,
              float temperature, Address logprobs, Address entropy, Address max_logit,
              Address sum_exp, Address mean, int threads) {
  check_range("targets", at<const int64_t>(labels), rows, vocab);
  run(&Operations::logprobs, isa, threads,
      LogProbs{rows, vocab, at<const float>(logits), at<const int64_t>(labels), temperature,
               at<float>(logprobs), at<float>(entropy), at<float>(max_logit), at<float>(sum_exp),
               at<float>(mean)});
}

void logprobs_gradient(const std::string& isa, int64_t rows, int64_t vocab, Address logits,
                       Address labels, float temperature, Address max_logit, Address sum_exp,
                       Address mean, Address d_logprobs, Address d_entropy, int threads) {
  check_range("targets", at<const int64_t>(labels), rows, vocab);
  run(&Operations::logprobs_gradient, isa, threads,
      LogProbsGradient{rows, vocab, at<float>(logits), at<const int64_t>(labels), temperature,
                       at<const float>(max_logit), at<const float>(sum_exp), at<const float>(mean),
                       at<const float>(d_logprobs), at<const float>(d_entropy)});
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("matmul", &matmul, "isa"_a, "rows"_a, "columns"_a, "inner"_a, "a"_a, "b"_a, "c"_a, "add"_a,
        "bf16"_a, "threads"_a, "a and b: (address, row stride, column stride)");
  m.def("feed_forward", &feed_forward, "isa"_a, "rows"_a, "width"_a, "hidden"_a, "x"_a, "gate"_a,
        "up"_a, "down"_a, "gates"_a, "ups"_a, "y"_a, "bf16"_a, "threads"_a);
  m.def("feed_forward_gradient", &feed_forward_gradient, "isa"_a, "rows"_a, "width"_a, "hidden"_a,
        "x"_a, "gate"_a, "up"_a, "down"_a, "gates"_a, "ups"_a, "d_y"_a, "d_x"_a, "d_gate"_a,
        "d_up"_a, "d_down"_a, "bf16"_a, "threads"_a);
  m.def("softmax_loss", &softmax_loss, "isa"_a, "rows"_a, "vocab"_a, "logits"_a, "labels"_a,
        "scale"_a, "z_loss"_a, "losses"_a, "threads"_a);
  m.def("logprobs", &logprobs, "isa"_a, "rows"_a, "vocab"_a, "logits"_a, "labels"_a,
        "temperature"_a, "logprobs"_a, "entropy"_a, "max_logit"_a, "sum_exp"_a, "mean"_a,
        "threads"_a);
  m.def("logprobs_gradient", &logprobs_gradient, "isa"_a, "rows"_a, "vocab"_a, "logits"_a,
        "labels"_a, "temperature"_a, "max_logit"_a, "sum_exp"_a, "mean"_a, "d_logprobs"_a,
        "d_entropy"_a, "threads"_a);
}

}  // namespace puna
