// Which kernels this machine can run.
#pragma once
#include <string>
#include <vector>

#include "lanes.hpp"

namespace sec {

std::vector<const Kernels*> machine_kernels();          // best first
const Kernels& pick_kernels(const char* name);          // null or "auto": the best; throws Error(SEC_ERROR_ARGUMENT)
int usable_cores();

}  // namespace sec
