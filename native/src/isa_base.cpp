#define SEC_ISA isa_base
#define SEC_LANES 4
#define SEC_REGISTERS 16
#define SEC_NAME "base"
#include "kernels.inl"

namespace sec {
const Kernels* kernels_base() { return &SEC_ISA::kTable; }
}  // namespace sec
