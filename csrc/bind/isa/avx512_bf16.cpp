#if defined(__x86_64__)
#include "base/standard.h"
#include "bind/isa/operations.h"
#pragma GCC target("avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx512vnni,avx2,fma")
#define PUNA_ISA avx512_bf16
#define PUNA_WIDTH 16
#define PUNA_MULTIPLIES_BF16
#define PUNA_MULTIPLIES_BYTES
#include "bind/isa/operations_impl.h"

const puna::Operations& puna::operations_avx512_bf16() { return avx512_bf16::operations; }
#endif
