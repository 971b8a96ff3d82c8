// All standard headers that the engine uses. bind/isa/*.cpp include them before they select an
// instruction set: an inline function defined after that would be compiled for it, and the linker,
// which keeps one copy of each function, might use that copy in the code for older machines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "base/pace.h"
#include "base/threads.h"
