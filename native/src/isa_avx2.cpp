#define SEC_ISA isa_avx2
#define SEC_LANES 8
#define SEC_REGISTERS 16
#define SEC_NAME "avx2"
#include "kernels.inl"

namespace sec {
const Kernels* kernels_avx2() { return &SEC_ISA::kTable; }
}  // namespace sec
