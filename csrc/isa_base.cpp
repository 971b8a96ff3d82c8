#include "standard.h"
#define PUNA_ISA base
#define PUNA_WIDTH 4
#include "operations_impl.h"

const puna::Operations& puna::operations_base() { return base::operations; }
