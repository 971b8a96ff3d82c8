#if defined(__x86_64__)
#include "base/standard.h"
#include "bind/isa/operations.h"
#pragma GCC target("avx2,fma")
#define PUNA_ISA avx2
#define PUNA_WIDTH 8
#include "bind/isa/operations_impl.h"

const puna::Operations& puna::operations_avx2() { return avx2::operations; }
#endif
