// Norms, rotations and gates, a row at a time, forward and backward.
#include "elementwise.h"
#include "simd.h"
#include "standard.h"

namespace PUNA_ISA {

constexpr puna::Elementwise elementwise{};

}  // namespace PUNA_ISA
