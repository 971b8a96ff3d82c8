#pragma once

namespace puna {

// Of the packed weights. int8: groups of 32 inputs share an fp32 scale, for each output.
enum class WeightFormat { fp32, bf16, int8 };

}  // namespace puna
