// All that the engine takes from the standard library, to be included before the line that names
// an instruction set: an inline function defined after it would be compiled for that set, and the
// linker, which keeps one copy of each, might hand it to the code for older machines.
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
