#include "safetensors.hpp"

#include <algorithm>
#include <vector>

#include "checks.hpp"
#include "json.hpp"

namespace sec {
namespace safetensors {
namespace {

constexpr size_t kLengthBytes = 8;

struct TypeInfo {
    const char* name;
    Type type;
    int64_t bytes;
};

constexpr TypeInfo kTypes[] = {
    {"F32", Type::f32, 4}, {"F16", Type::f16, 2}, {"BF16", Type::bf16, 2}, {"I8", Type::i8, 1}, {"U8", Type::u8, 1},
};

struct Range {
    int64_t begin, end;
    const std::string* name;
};

const json::Value& field(const json::Value& entry, const char* key, json::Kind kind, const std::string& name) {
    const json::Value* found = entry.find(key);
    if (!found || !found->is(kind)) refuse("tensor " + quoted(name) + ": " + key + " is missing or of a wrong type");
    return *found;
}

const TypeInfo& type_of(const json::Value& entry, const std::string& name) {
    const std::string& text = field(entry, "dtype", json::Kind::string, name).text;
    for (const TypeInfo& info : kTypes)
        if (text == info.name) return info;
    refuse("tensor " + quoted(name) + ": no plan uses dtype " + quoted(text));
}

// Integers in 0 .. kMaxCount.
std::vector<int64_t> integers(const json::Value& list, const std::string& name) {
    std::vector<int64_t> out;
    for (const json::Value& item : list.items) {
        if (!item.exact || item.integer < 0 || item.integer > kMaxCount)
            refuse("tensor " + quoted(name) + ": a dimension or an offset is not an integer from 0 to 2^56");
        out.push_back(item.integer);
    }
    return out;
}

Range tensor_entry(const json::Value& entry, const std::string& name, const uint8_t* data, int64_t data_size,
                   Tensor& out) {
    if (!entry.is(json::Kind::object) || entry.keys.size() != 3)
        refuse("tensor " + quoted(name) + ": expected exactly dtype, shape and data_offsets");
    const TypeInfo& info = type_of(entry, name);
    out.type = info.type;
    out.shape = integers(field(entry, "shape", json::Kind::array, name), name);
    if (out.shape.size() > SEC_MAX_DIMS) refuse("tensor " + quoted(name) + ": more than 8 dimensions");
    const auto offsets = integers(field(entry, "data_offsets", json::Kind::array, name), name);
    if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > data_size)
        refuse("tensor " + quoted(name) + ": data_offsets are not a range of the file's " +
               std::to_string(data_size) + " data bytes");
    int64_t needed = bounded_count(out.shape, kMaxCount);
    if (needed < 0 || !multiply(needed, info.bytes, kMaxCount, &needed) || needed != offsets[1] - offsets[0])
        refuse("tensor " + quoted(name) + ": shape " + text_of(out.shape) + " of " + info.name + " does not take the " +
               std::to_string(offsets[1] - offsets[0]) + " bytes of its data_offsets");
    out.data = data + offsets[0];
    out.size = static_cast<size_t>(needed);
    return {offsets[0], offsets[1], &name};
}

void read_metadata(const json::Value& entry, File& file) {
    if (!entry.is(json::Kind::object)) refuse("__metadata__ of the file is not an object");
    for (size_t i = 0; i < entry.items.size(); ++i) {
        if (!entry.items[i].is(json::Kind::string))
            refuse("__metadata__ " + quoted(entry.keys[i]) + " of the file is not a string");
        file.metadata.emplace(entry.keys[i], entry.items[i].text);
    }
}

void check_cover(std::vector<Range>& ranges, int64_t data_size) {
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) {
        return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
    });
    int64_t end = 0;
    for (const Range& range : ranges) {
        if (range.begin < end) refuse("tensor " + quoted(*range.name) + " overlaps the one before it");
        if (range.begin > end) refuse("bytes of no tensor lie before tensor " + quoted(*range.name));
        end = range.end;
    }
    if (end != data_size)
        refuse("the tensors take " + std::to_string(end) + " bytes, but the file holds " + std::to_string(data_size));
}

}  // namespace

File read(const uint8_t* bytes, size_t size) {
    if (!bytes || size < kLengthBytes) refuse("the file is too short to be a safetensors file");
    if (size > static_cast<uint64_t>(kMaxCount)) refuse("the file is larger than 2^56 bytes");
    uint64_t length = 0;
    for (size_t i = 0; i < kLengthBytes; ++i) length |= static_cast<uint64_t>(bytes[i]) << (8 * i);
    if (length > json::kMaxBytes || length > size - kLengthBytes)
        refuse("the header's length " + std::to_string(length) + " exceeds the file or 100 MB");
    const auto header_size = static_cast<size_t>(length);
    const uint8_t* data = bytes + kLengthBytes + header_size;
    const auto data_size = static_cast<int64_t>(size - kLengthBytes - header_size);
    if (header_size == 0 || bytes[kLengthBytes] != '{') refuse("the header of the file does not begin with {");
    const json::Value header =
        json::parse(reinterpret_cast<const char*>(bytes + kLengthBytes), header_size, "the header of the file");
    File file;
    std::vector<Range> ranges;
    for (size_t i = 0; i < header.items.size(); ++i) {
        const std::string& name = header.keys[i];
        if (name == "__metadata__") read_metadata(header.items[i], file);
        else ranges.push_back(tensor_entry(header.items[i], name, data, data_size, file.tensors[name]));
    }
    check_cover(ranges, data_size);
    return file;
}

}  // namespace safetensors
}  // namespace sec
