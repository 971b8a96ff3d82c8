#include "base/standard.h"
#include "bind/isa/operations.h"
#define PUNA_ISA base
#define PUNA_WIDTH 4
#include "bind/isa/operations_impl.h"

const puna::Operations& puna::operations_base() { return base::operations; }
