// OpenMP, kept to two calls. The runtime is the one that torch brought into the process.
#pragma once

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

inline void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

}  // namespace puna
