#include "bind.h"

namespace puna {

void bind_elementwise(py::module_&) {}

}  // namespace puna
