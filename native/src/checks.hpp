// What every reader of untrusted input here shares: how a refusal is written, and arithmetic that cannot overflow.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string>

#include "graph.hpp"

namespace sec {

// No dimension, slice bound or padding of a file exceeds this, so sums and differences of a few stay exact.
constexpr int64_t kMaxExtent = (int64_t{1} << 31) - 1;
// No count of elements (of a value, or of the work behind one) exceeds this, so its size in bytes stays exact.
constexpr int64_t kMaxCount = int64_t{1} << 56;

// A name as it appears in a message: bounded, on one line.
inline std::string quoted(const std::string& text) {
    std::string out = "'";
    for (size_t i = 0; i < text.size() && i < 256; ++i) {
        const auto c = static_cast<unsigned char>(text[i]);
        out += c < 0x20 || c == 0x7f ? '?' : text[i];
    }
    return out + (text.size() > 256 ? "...'" : "'");
}

[[noreturn]] inline void refuse(const std::string& what) { throw Error(SEC_ERROR_FILE, what); }

// a * b for a, b >= 0; false when it exceeds `cap`.
inline bool multiply(int64_t a, int64_t b, int64_t cap, int64_t* out) {
    if (a < 0 || b < 0 || (b != 0 && a > cap / b)) return false;
    *out = a * b;
    return true;
}

// Product of all dimensions, or -1 when one is negative or the product exceeds `cap`.
inline int64_t bounded_count(const Shape& shape, int64_t cap) {
    int64_t n = 1;
    for (int64_t d : shape)
        if (!multiply(n, d, cap, &n)) return -1;
    return n;
}

inline std::string text_of(const Shape& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
    return out + "]";
}

}  // namespace sec
