// Reading stored weights, beyond what graph.hpp declares.
#pragma once
#include <cstddef>
#include <cstdint>

#include "graph.hpp"

namespace sec {

size_t store_bytes(Store store);  // of one value; 0 for bitmask
float half_to_float(uint16_t half);
int64_t count_bits(const uint8_t* bytes, size_t size);
// Entries of a dense store that are not zero (both signs of zero are zero; NaN is not).
int64_t count_nonzero(const Weight& weight);
// Whether `count` stored f32 are neither NaN nor infinite.
bool finite(const uint8_t* values, int64_t count);

}  // namespace sec
