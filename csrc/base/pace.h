// One thread, or all of them? Whichever was faster lately for a batch of this size. Two threads
// that share a core with another process wait for each other; the result is the same to the bit,
// so the choice can follow the clock.
#pragma once

#include <chrono>
#include <cstdint>

namespace puna {

class Pace {
 public:
  // True: all threads. Tries both at first; then the slower one again after 16 calls, and after
  // twice as many each time it stays the slower one.
  bool all() {
    if (!calls_[1] || !calls_[0]) return trying_ = !calls_[1];
    const bool faster = seconds_[1] <= seconds_[0];
    if (--until_trial_ > 0) return trying_ = faster;
    return trying_ = !faster;
  }

  void took(double seconds) {
    const bool trial = calls_[0] && calls_[1] && until_trial_ <= 0;
    const bool was_faster = seconds_[1] <= seconds_[0];
    // A trial replaces what was known; else the figure follows slowly, so that one hiccup is not
    // a verdict.
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
