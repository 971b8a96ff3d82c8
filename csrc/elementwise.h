// What stands between a training step's matrix products.
#pragma once

#include <cstdint>

namespace puna {

struct Elementwise {
};

}  // namespace puna
