#include "weights.hpp"

#include <cstring>

namespace sec {
namespace {

// Assembled from bytes: the file is little-endian and unaligned, whatever the machine is.
uint32_t load16(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }
uint32_t load32(const uint8_t* p) { return load16(p) | load16(p + 2) << 16; }

float as_float(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

float element(Store type, const uint8_t* p) {
    switch (type) {
        case Store::f32: return as_float(load32(p));
        case Store::f16: return half_to_float(static_cast<uint16_t>(load16(p)));
        case Store::bf16: return as_float(load16(p) << 16);
        case Store::i8: return static_cast<float>(static_cast<int8_t>(*p));
        case Store::bitmask: break;
    }
    throw Error(SEC_ERROR_INTERNAL, "a bitmask is not an element type");
}

void expand_bitmask(const Weight& weight, std::vector<float>& out) {
    const uint8_t* value = weight.data;
    const size_t step = store_bytes(weight.values);
    for (size_t i = 0; i < out.size(); i += 8) {
        const uint32_t byte = weight.bits[i / 8];
        for (size_t k = 0; byte >> k; ++k) {
            if (!(byte >> k & 1u)) continue;
            out[i + k] = element(weight.values, value);
            value += step;
        }
    }
}

}  // namespace

size_t store_bytes(Store store) {
    switch (store) {
        case Store::f32: return 4;
        case Store::f16: case Store::bf16: return 2;
        case Store::i8: return 1;
        case Store::bitmask: break;
    }
    return 0;
}

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t exponent = half >> 10 & 0x1fu;
    const uint32_t fraction = half & 0x3ffu;
    if (exponent == 0x1f) return as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24, exact
    return sign ? -magnitude : magnitude;
}

int64_t count_bits(const uint8_t* bytes, size_t size) {
    int64_t total = 0;
    size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        uint64_t x;
        std::memcpy(&x, bytes + i, sizeof x);
        x -= x >> 1 & 0x5555555555555555u;
        x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
        x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fu;
        total += static_cast<int64_t>((x * 0x0101010101010101u) >> 56);
    }
    for (; i < size; ++i)
        for (uint32_t x = bytes[i]; x; x &= x - 1) ++total;
    return total;
}

int64_t count_nonzero(const Weight& weight) {
    const auto n = static_cast<size_t>(weight.numel);
    int64_t total = 0;
    const uint8_t* p = weight.data;
    switch (weight.values) {
        case Store::f32:
            for (size_t i = 0; i < n; ++i) total += (load32(p + 4 * i) & 0x7fffffffu) != 0;
            break;
        case Store::f16: case Store::bf16:
            for (size_t i = 0; i < n; ++i) total += (load16(p + 2 * i) & 0x7fffu) != 0;
            break;
        case Store::i8:
            for (size_t i = 0; i < n; ++i) total += p[i] != 0;
            break;
        case Store::bitmask: break;
    }
    return total;
}

bool finite(const uint8_t* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if ((load32(values + 4 * i) & 0x7f800000u) == 0x7f800000u) return false;
    return true;
}

std::vector<float> dense_values(const Weight& weight) {
    std::vector<float> out(static_cast<size_t>(weight.numel), 0.0f);
    if (weight.store == Store::bitmask) {
        expand_bitmask(weight, out);
        return out;
    }
    const size_t step = store_bytes(weight.store);
    for (size_t i = 0; i < out.size(); ++i) out[i] = element(weight.store, weight.data + step * i);
    if (weight.store == Store::i8) {
        const size_t row = out.size() / static_cast<size_t>(weight.shape[0]);
        for (size_t i = 0; i < out.size(); ++i) out[i] *= as_float(load32(weight.scale + 4 * (i / row)));
    }
    return out;
}

}  // namespace sec
