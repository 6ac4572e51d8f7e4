// A strict JSON reader (RFC 8259) for untrusted text: bounded in size, depth and number of values.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace sec {
namespace json {

constexpr size_t kMaxBytes = 100u * 1000u * 1000u;
constexpr size_t kMaxValues = size_t{1} << 21;
constexpr int kMaxDepth = 32;

enum class Kind { null, boolean, number, string, array, object };

struct Value {
    Kind kind = Kind::null;
    bool boolean = false;
    bool exact = false;             // the number was written as an integer that int64 holds
    int64_t integer = 0;            // valid when `exact`
    double number = 0;              // finite
    std::string text;               // valid UTF-8
    std::vector<std::string> keys;  // of an object, sorted and unique; items[i] belongs to keys[i]
    std::vector<Value> items;       // of an array (in order) or an object

    bool is(Kind k) const { return kind == k; }
    const Value* find(const std::string& key) const;  // nullptr when absent
};

// `what` names the text in messages. Throws sec::Error (SEC_ERROR_FILE) on anything that is not one JSON value.
Value parse(const char* text, size_t size, const std::string& what);

// Whether the bytes are UTF-8 without overlong forms, surrogates or code points past U+10FFFF.
bool valid_utf8(const std::string& text);

}  // namespace json
}  // namespace sec
