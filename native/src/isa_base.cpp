#define SEC_ISA isa_base
#define SEC_LANES 4
#if defined(__aarch64__)
#define SEC_REGISTERS 32
#define SEC_NAME "neon"
#else
#define SEC_REGISTERS 16
#define SEC_NAME "base"
#endif
#include "kernels.inl"

namespace sec {
const Kernels* kernels_base() { return &SEC_ISA::kTable; }
}  // namespace sec
