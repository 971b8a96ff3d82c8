// Chooses between one thread and all of them by which was faster lately: two threads that share a
// core with another process wait for each other. Results are the same to the bit either way, so the
// choice may depend on the clock.
#pragma once

#include <chrono>
#include <cstdint>

namespace puna {

class Pace {
 public:
  // Tries both at first; then the slower one again after 16 calls, and after twice as many each
  // time it is still the slower one.
  bool use_all_threads() {
    if (!calls_[1] || !calls_[0]) return trying_ = !calls_[1];
    const bool faster = seconds_[1] <= seconds_[0];
    if (--until_trial_ > 0) return trying_ = faster;
    return trying_ = !faster;
  }

  void record(double seconds) {
    const bool trial = calls_[0] && calls_[1] && until_trial_ <= 0;
    const bool was_faster = seconds_[1] <= seconds_[0];
    // A trial replaces the old time; otherwise the average moves slowly, so that one slow call does
    // not decide.
    seconds_[trying_] =
        trial || !calls_[trying_] ? seconds : 0.8 * seconds_[trying_] + 0.2 * seconds;
    ++calls_[trying_];
    if (!trial) return;
    const bool changed = (seconds_[1] <= seconds_[0]) != was_faster;
    interval_ = changed ? 16 : interval_ < 1024 ? interval_ * 2 : interval_;
    until_trial_ = interval_;
  }

 private:
  bool trying_ = true;
  double seconds_[2] = {0, 0};
  int64_t calls_[2] = {0, 0};
  int64_t interval_ = 16, until_trial_ = 16;
};

inline double now() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

}  // namespace puna
