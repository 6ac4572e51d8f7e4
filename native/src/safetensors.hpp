// The safetensors container: a JSON header that says where each tensor lies, then the tensors' bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

#include "graph.hpp"

namespace sec {
namespace safetensors {

// The element types that a plan uses; the format has more.
enum class Type { f32, f16, bf16, i8, u8 };

struct Tensor {
    Type type = Type::f32;
    Shape shape;
    const uint8_t* data = nullptr;  // into the bytes that were read; may be unaligned
    size_t size = 0;                // bytes; equal to the elements of `shape` times the element's size
};

struct File {
    std::map<std::string, Tensor> tensors;
    std::map<std::string, std::string> metadata;
};

// Throws sec::Error unless the header is sound and the tensors cover the rest of the bytes without gap or overlap.
File read(const uint8_t* bytes, size_t size);

}  // namespace safetensors
}  // namespace sec
