// What the processor can run, and the kernel table for it.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace flatout {

std::vector<std::string> cpu_features();
std::vector<std::string> usable_isas();      // best first; "portable" is always last
const Ops* ops_for(const std::string& isa);  // throws std::invalid_argument when this processor cannot run it

}  // namespace flatout
