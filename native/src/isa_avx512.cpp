#define SEC_ISA isa_avx512
#define SEC_LANES 8
#define SEC_REGISTERS 32
#define SEC_NAME "avx512"
#include "kernels.inl"

namespace sec {
const Kernels* kernels_avx512() { return &SEC_ISA::kTable; }
}  // namespace sec
