#define SEC_ISA isa_avx512w
#define SEC_LANES 16
#define SEC_REGISTERS 32
#define SEC_NAME "avx512-wide"
#include "kernels.inl"

namespace sec {
const Kernels* kernels_avx512w() { return &SEC_ISA::kTable; }
}  // namespace sec
