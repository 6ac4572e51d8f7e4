// Sums, maxima and products of plain arrays, four floats at a time on the compiler's vector type.
#pragma once
#include <cstdint>
#include <cstring>

#include "lanes.hpp"

#if defined(__clang__)
#define SEC_PLAIN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SEC_PLAIN_UNROLL _Pragma("GCC unroll 16")
#endif

namespace sec {
namespace plain {

typedef float F4 __attribute__((vector_size(16)));
inline F4 load4(const float* p) { F4 v; std::memcpy(&v, p, sizeof v); return v; }
inline void store4(float* p, F4 v) { std::memcpy(p, &v, sizeof v); }

// The larger; NaN when either is. The test for NaN is a branch that is never taken, the rest one instruction.
inline float max_nan(float a, float b) {
    if (a != a) return a;
    return a > b ? a : b;
}
inline float min_nan(float a, float b) {
    if (a != a) return a;
    return a < b ? a : b;
}

inline F4 max_nan(F4 a, F4 b) {
    typedef int32_t I4 __attribute__((vector_size(16)));
    const I4 take = (a > b) | (a != a);
    return (F4)(((I4)a & take) | ((I4)b & ~take));
}

// Double between blocks: a long float sum would lose its small terms.
double sum(const float* x, int64_t n);
double sum_of_squares(const float* x, int64_t n, float minus);   // of x - minus
float maximum(const float* x, int64_t n);

inline void activate(const Kernels& kernels, float* x, int64_t n, Act act) {
    if (act != Act::none) kernels.activate(x, n, static_cast<Fn>(act));
}

// c = a b, or a b^T: a is M x K, c is M x N; rows lie lda, ldb, ldc apart. `panel` has kPanel floats.
constexpr int64_t kPanelDepth = 256, kPanelWidth = 8, kPanel = kPanelDepth * kPanelWidth;
struct Matrix {
    const float* data;
    int64_t row;
};
void multiply(Matrix a, Matrix b, bool transposed, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
              float* panel);

}  // namespace plain
}  // namespace sec
