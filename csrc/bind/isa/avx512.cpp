#if defined(__x86_64__)
#include "base/standard.h"
#include "bind/isa/operations.h"
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#define PUNA_ISA avx512
#define PUNA_WIDTH 16
#include "bind/isa/operations_impl.h"

const puna::Operations& puna::operations_avx512() { return avx512::operations; }
#endif
