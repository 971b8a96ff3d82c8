// A parallel region of OpenMP, and a barrier and a work queue for its threads that suit a machine
// with other busy processes. The OpenMP runtime is the one that torch has loaded.
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

// Spins for some microseconds, then sleeps. OpenMP's own barrier spins for a millisecond, and a
// token needs thirty barriers: with another process on one of two cores, decoding fell from 5,000
// tokens a second to 7.
class Barrier {
 public:
  void wait(int parts) {
    wait(parts, [] {});
  }

  // `on_complete` is called once, after the last thread has arrived and before any goes on.
  template <typename OnComplete>
  void wait(int parts, OnComplete on_complete) {
    if (parts == 1) return on_complete();
    const uint64_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
      arrived_.store(0, std::memory_order_relaxed);
      on_complete();
      const std::lock_guard<std::mutex> lock(mutex_);
      generation_.store(generation + 1, std::memory_order_release);
      if (sleeping_) wake_up_.notify_all();
      return;
    }
    for (int spin = 0; spin < 4000; ++spin) {
      if (generation_.load(std::memory_order_acquire) != generation) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    wake_up_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != generation; });
    --sleeping_;
  }

 private:
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> arrived_{0};
  std::mutex mutex_;
  std::condition_variable wake_up_;
  int sleeping_ = 0;
};

// Hands out pieces of work to the threads of a region, the next piece to whichever thread is free.
// With even parts fixed beforehand the slower of two threads kept the other waiting for a twentieth
// of a training step.
class WorkQueue {
 public:
  // Calls work(i) for each i below `count`. All `parts` threads of the region must call it; they
  // return together.
  template <typename Work>
  void for_each(int parts, int64_t count, Work work) {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
    barrier_.wait(parts, [&] { next_.store(0, std::memory_order_relaxed); });
  }

 private:
  std::atomic<int64_t> next_{0};
  Barrier barrier_;
};

}  // namespace puna
