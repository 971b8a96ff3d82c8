// OpenMP, kept to one region, and a barrier that lets a busy machine breathe. The OpenMP runtime is
// the one that torch brought into the process.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace puna {

template <typename Work>
void parallel(int threads, Work work) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  work(0, 1);
}

// Waits by spinning for some microseconds, then asleep. OpenMP's own barrier spins for a
// millisecond, and there are thirty in a token: with another process on one of two cores that made
// 7 tokens a second out of 5,000.
class Barrier {
 public:
  void wait(int parts) {
    wait(parts, [] {});
  }

  // `last` is called once, when all have come and before any goes on.
  template <typename Last>
  void wait(int parts, Last last) {
    if (parts == 1) return last();
    const uint64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
      arrived_.store(0, std::memory_order_relaxed);
      last();
      const std::lock_guard<std::mutex> lock(mutex_);
      turn_.store(turn + 1, std::memory_order_release);
      if (asleep_) wake_.notify_all();
      return;
    }
    for (int spin = 0; spin < 4000; ++spin) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++asleep_;
    wake_.wait(lock, [&] { return turn_.load(std::memory_order_relaxed) != turn; });
    --asleep_;
  }

 private:
  std::atomic<uint64_t> turn_{0};
  std::atomic<int> arrived_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
  int asleep_ = 0;
};

// Pieces of work for the threads of a region, each piece to whoever is free: shared out beforehand,
// the slower of two threads kept the other waiting for a twentieth of a training step.
class Pieces {
 public:
  // work(i) for each i below `count`. All `parts` threads of the region call it, and return
  // together.
  template <typename Work>
  void each(int parts, int64_t count, Work work) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    barrier_.wait(parts, [&] { next_.store(0, std::memory_order_relaxed); });
  }

 private:
  std::atomic<int64_t> next_{0};
  Barrier barrier_;
};

}  // namespace puna
