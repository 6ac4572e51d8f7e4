#include "isa.hpp"

#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif

namespace sec {

std::vector<const Kernels*> machine_kernels() {
    std::vector<const Kernels*> out;
    // The build says which units there are. Eight lanes fill better than sixteen at small batches, and AVX2's shorter
    // encoding was never slower where measured.
#if defined(SEC_AVX2)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) out.push_back(kernels_avx2());
#endif
#if defined(SEC_AVX512)
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (avx512) out.push_back(kernels_avx512());
    if (avx512) out.push_back(kernels_avx512w());
#endif
    out.push_back(kernels_base());
    return out;
}

const Kernels& pick_kernels(const char* name) {
    const std::vector<const Kernels*> all = machine_kernels();
    const std::string wanted = name ? name : "auto";
    if (wanted == "auto" || wanted.empty()) return *all.front();
    std::string known;
    for (const Kernels* k : all) {
        if (wanted == k->name) return *k;
        known += std::string(known.empty() ? "" : " ") + k->name;
    }
    throw Error(SEC_ERROR_ARGUMENT, "isa '" + wanted + "' is not one of: auto " + known);
}

int usable_cores() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set) > 0 ? CPU_COUNT(&set) : 1;
#endif
    const unsigned n = std::thread::hardware_concurrency();
    return n ? static_cast<int>(n) : 1;
}

}  // namespace sec
