// Fixed-width vectors on the compiler's vector types, and the functions that the epilogues need.
// Included by one translation unit per instruction set, inside that unit's own namespace: nothing here may be shared
// between units, or the linker could keep a copy that the machine cannot execute.
#pragma once
#include <cstdint>
#include <cstring>

#include "graph.hpp"

#if defined(__clang__)
#define SEC_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SEC_UNROLL _Pragma("GCC unroll 32")
#endif
#define SEC_INLINE inline __attribute__((always_inline))

namespace sec {
namespace SEC_ISA {
namespace {

typedef float V __attribute__((vector_size(4 * SEC_LANES)));
typedef int32_t VI __attribute__((vector_size(4 * SEC_LANES)));
constexpr int L = SEC_LANES;

SEC_INLINE V load(const void* p) { return *static_cast<const V*>(p); }          // aligned to the vector
SEC_INLINE void store(void* p, V v) { *static_cast<V*>(p) = v; }
SEC_INLINE V load_any(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
SEC_INLINE void store_any(float* p, V v) { std::memcpy(p, &v, sizeof v); }
SEC_INLINE V spread(float x) {
    if constexpr (L == 4) return V{x, x, x, x};
#if SEC_LANES >= 8
    if constexpr (L == 8) return V{x, x, x, x, x, x, x, x};
#endif
#if SEC_LANES >= 16
    if constexpr (L == 16) return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}
SEC_INLINE VI splat_i(int32_t x) { return VI{} + x; }
SEC_INLINE V bits_and(V v, VI m) { return (V)((VI)v & m); }
SEC_INLINE V choose(VI m, V a, V b) { return (V)(((VI)a & m) | ((VI)b & ~m)); }   // m ? a : b, m all ones or all zeros
SEC_INLINE V vmin(V a, V b) { return choose(b < a, b, a); }                       // a NaN in `a` stays
SEC_INLINE V vmax(V a, V b) { return choose(b > a, b, a); }
SEC_INLINE V nan_from(V x, V y) { return choose(x != x, x, y); }                  // y, but x where x is NaN
SEC_INLINE V max_nan(V a, V b) { return nan_from(a, nan_from(b, vmax(a, b))); }
SEC_INLINE V min_nan(V a, V b) { return nan_from(a, nan_from(b, vmin(a, b))); }
SEC_INLINE V vabs(V x) { return bits_and(x, splat_i(0x7fffffff)); }
SEC_INLINE V vsqrt(V x) {
    V v{};
    SEC_UNROLL for (int i = 0; i < L; ++i) v[i] = __builtin_sqrtf(x[i]);
    return v;
}
SEC_INLINE float sum_lanes(V v) {
    float s = 0;
    for (int i = 0; i < L; ++i) s += v[i];
    return s;
}
SEC_INLINE V permute(V v, VI index) {
#if defined(__clang__)
    V r;
    for (int i = 0; i < L; ++i) r[i] = v[index[i]];
    return r;
#else
    return __builtin_shuffle(v, index);
#endif
}

// e^x to about 1e-7 relative: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2].
SEC_INLINE V vexp(V x) {
    V c = vmin(vmax(x, spread(-87.3f)), spread(88.7f));
    V t = c * 1.44269504f;
    const V magic = spread(12582912.0f);                    // adding 1.5 * 2^23 rounds to the nearest integer
    V n = (t + magic) - magic;
    V r = c - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = spread(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    VI k = __builtin_convertvector(n, VI);
    VI half = k >> 1;                                       // two factors: 2^128 itself is not a float
    V s = (V)((half + 127) << 23), u = (V)((k - half + 127) << 23);
    V y = p * s * u;
    y = choose(x > spread(88.72283f), spread(__builtin_inff()), y);
    y = bits_and(y, ~(x < spread(-87.33f)));
    return nan_from(x, y);
}
// t, but exactly 1 with the sign of x past the bound: what 1 + t leaves there must not grow with a factor x.
SEC_INLINE V one_past(V x, float bound, V t) {
    const V one = (V)(((VI)x & splat_i(INT32_MIN)) | (VI)spread(1.0f));
    return choose(vabs(x) > spread(bound), one, t);
}
SEC_INLINE V vtanh(V x) {
    V c = vmin(vmax(x, spread(-7.90531110763549805f)), spread(7.90531110763549805f));
    V q = c * c;
    V p = spread(-2.76076847742355e-16f);
    p = p * q + 2.00018790482477e-13f;
    p = p * q + -8.60467152213735e-11f;
    p = p * q + 5.12229709037114e-08f;
    p = p * q + 1.48572235717979e-05f;
    p = p * q + 6.37261928875436e-04f;
    p = p * q + 4.89352455891786e-03f;
    V d = spread(1.19825839466702e-06f);
    d = d * q + 1.18534705686654e-04f;
    d = d * q + 2.26843463243900e-03f;
    d = d * q + 4.89352518554385e-03f;
    return nan_from(x, one_past(x, 9.0f, c * p / d));
}
SEC_INLINE V verf(V x) {
    V c = vmin(vmax(x, spread(-4.0f)), spread(4.0f));
    V q = c * c;
    V p = spread(-2.72614225801306e-10f);
    p = p * q + 2.77068142495902e-08f;
    p = p * q + -2.10102402082508e-06f;
    p = p * q + -5.69250639462346e-05f;
    p = p * q + -7.34990630326855e-04f;
    p = p * q + -2.95459980854025e-03f;
    p = p * q + -1.60960333262415e-02f;
    V d = spread(-1.45660718464996e-05f);
    d = d * q + -2.13374055278905e-04f;
    d = d * q + -1.68282697438203e-03f;
    d = d * q + -7.37332916720468e-03f;
    d = d * q + -1.42647390514189e-02f;
    return nan_from(x, one_past(x, 4.0f, c * p / d));
}
SEC_INLINE V vsigmoid(V x) {
    V e = vexp(-vabs(x));                                   // never overflows
    V small = e / (1.0f + e), large = 1.0f / (1.0f + e);
    return nan_from(x, choose(x < V{}, small, large));
}
SEC_INLINE V relu_of(V x) { return choose(x < V{}, V{}, x); }

template <class F> SEC_INLINE void each(V* v, int n, F f) {
    for (int i = 0; i < n; ++i) v[i] = f(v[i]);
}
// Activation over n vectors in memory; out of line because the epilogue of one output channel calls it once.
[[gnu::noinline]] void activate_slow(V* v, int n, Act act) {
    switch (act) {
        case Act::gelu: each(v, n, [](V x) { return 0.5f * x * (1.0f + verf(x * 0.70710678118654752f)); }); break;
        case Act::gelu_tanh:
            each(v, n, [](V x) {
                return 0.5f * x * (1.0f + vtanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
            });
            break;
        case Act::silu: each(v, n, [](V x) { return x * vsigmoid(x); }); break;
        case Act::hardswish:
            each(v, n, [](V x) { return x * (vmin(relu_of(x + 3.0f), spread(6.0f)) * (1.0f / 6.0f)); });
            break;
        case Act::hardsigmoid:
            each(v, n, [](V x) { return vmin(relu_of(x + 3.0f), spread(6.0f)) * (1.0f / 6.0f); });
            break;
        case Act::sigmoid: each(v, n, [](V x) { return vsigmoid(x); }); break;
        case Act::tanh: each(v, n, [](V x) { return vtanh(x); }); break;
        case Act::relu: each(v, n, [](V x) { return relu_of(x); }); break;
        case Act::relu6: each(v, n, [](V x) { return vmin(relu_of(x), spread(6.0f)); }); break;
        case Act::none: break;
    }
}

}  // namespace
}  // namespace SEC_ISA
}  // namespace sec
