// Matrix products, the feed-forward layer made of them, and what the losses make of logits.
#include "bind/bind.h"

namespace puna {

namespace {

template <typename Work>
void run(void (*Operations::*operation)(const Work&, int), const std::string& isa, const Work& work,
         int threads) {
  const Operations& native = operations(isa);
  threads = usable_threads(threads);
  py::gil_scoped_release released;
  (native.*operation)(work, threads);
}

struct Given {
  const float* data;
  int64_t row, column;
};

Given matrix(const py::tuple& given) {
  return {at<const float>(given[0].cast<Address>()), given[1].cast<int64_t>(),
          given[2].cast<int64_t>()};
}

// a and b: (address, from one row to the next, from one column to the next)
void matmul(const std::string& isa, int64_t rows, int64_t columns, int64_t inner,
            const py::tuple& a, const py::tuple& b, Address c, bool add, int threads) {
  const Given left = matrix(a), right = matrix(b);
  run(&Operations::matmul, isa,
      MatMul{rows, columns, inner, left.data, left.row, left.column, right.data, right.row,
             right.column, at<float>(c), add},
      threads);
}

void feed_forward(const std::string& isa, int64_t rows, int64_t width, int64_t hidden, Address x,
                  Address gate, Address up, Address down, Address gates, Address ups, Address y,
                  int threads) {
  run(&Operations::feed_forward, isa,
      FeedForward{rows, width, hidden, at<const float>(x), at<const float>(gate),
                  at<const float>(up), at<const float>(down), at<float>(gates), at<float>(ups),
                  at<float>(y)},
      threads);
}

void feed_forward_gradient(const std::string& isa, int64_t rows, int64_t width, int64_t hidden,
                           Address x, Address gate, Address up, Address down, Address gates,
                           Address ups, Address d_y, Address d_x, Address d_gate, Address d_up,
                           Address d_down, int threads) {
  run(&Operations::feed_forward_gradient, isa,
      FeedForwardGradient{rows, width, hidden, at<const float>(x), at<const float>(gate),
                          at<const float>(up), at<const float>(down), at<const float>(gates),
                          at<const float>(ups), at<const float>(d_y), at<float>(d_x),
                          at<float>(d_gate), at<float>(d_up), at<float>(d_down)},
      threads);
}

void softmax_loss(const std::string& isa, int64_t rows, int64_t vocab, Address logits,
                  Address labels, Address scale, float z_loss, Address losses, int threads) {
  const SoftmaxLoss work{rows,
                         vocab,
                         at<float>(logits),
                         at<const int64_t>(labels),
                         at<const float>(scale),
                         z_loss,
                         at<float>(losses)};
  check_range("targets", work.labels, rows, vocab);
  run(&Operations::softmax_loss, isa, work, threads);
}

void logprobs(const std::string& isa, int64_t rows, int64_t vocab, Address logits, Address labels,
              float temperature, Address logprobs, Address entropy, Address top, Address total,
              Address mean, int threads) {
  const LogProbs work{rows,
                      vocab,
                      at<const float>(logits),
                      at<const int64_t>(labels),
                      temperature,
                      at<float>(logprobs),
                      at<float>(entropy),
                      at<float>(top),
                      at<float>(total),
                      at<float>(mean)};
  check_range("targets", work.labels, rows, vocab);
  run(&Operations::logprobs, isa, work, threads);
}

void logprobs_gradient(const std::string& isa, int64_t rows, int64_t vocab, Address logits,
                       Address labels, float temperature, Address top, Address total, Address mean,
                       Address d_logprobs, Address d_entropy, int threads) {
  const LogProbsGradient work{rows,
                              vocab,
                              at<float>(logits),
                              at<const int64_t>(labels),
                              temperature,
                              at<const float>(top),
                              at<const float>(total),
                              at<const float>(mean),
                              at<const float>(d_logprobs),
                              at<const float>(d_entropy)};
  check_range("targets", work.labels, rows, vocab);
  run(&Operations::logprobs_gradient, isa, work, threads);
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("matmul", &matmul);
  m.def("feed_forward", &feed_forward);
  m.def("feed_forward_gradient", &feed_forward_gradient);
  m.def("softmax_loss", &softmax_loss);
  m.def("logprobs", &logprobs);
  m.def("logprobs_gradient", &logprobs_gradient);
}

}  // namespace puna
