// From a file's bytes to a Graph, with every check that needs no shapes of values.
#include <unordered_map>

#include "checks.hpp"
#include "json.hpp"
#include "ops.hpp"
#include "safetensors.hpp"
#include "weights.hpp"

namespace sec {
namespace {

constexpr size_t kMaxName = 256;

const json::Value& member(const json::Value& object, const char* key, json::Kind kind, const std::string& what) {
    const json::Value* found = object.find(key);
    if (!found) refuse(what + ": " + key + " is missing");
    if (!found->is(kind)) refuse(what + ": " + key + " is of a wrong type");
    return *found;
}

void check_fields(const json::Value& object, const std::vector<std::string>& known, const std::string& what) {
    if (!object.is(json::Kind::object)) refuse(what + " is not an object");
    for (const std::string& key : object.keys)
        if (std::find(known.begin(), known.end(), key) == known.end()) refuse(what + ": unknown field " + quoted(key));
}

const std::string& checked_name(const json::Value& value, const std::string& what) {
    if (!value.is(json::Kind::string)) refuse(what + " is not a string");
    if (value.text.empty() || value.text.size() > kMaxName) refuse(what + " is not 1 to 256 bytes long");
    for (char c : value.text)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) refuse(what + " holds a control character");
    return value.text;
}

Store read_store(const std::string& text, const std::string& what) {
    if (text == "f32") return Store::f32;
    if (text == "f16") return Store::f16;
    if (text == "bf16") return Store::bf16;
    if (text == "i8") return Store::i8;
    if (text == "bitmask") return Store::bitmask;
    refuse(what + ": unknown store " + quoted(text));
}

// The weights, each tied to tensors of the file that no other weight uses.
class WeightReader {
public:
    explicit WeightReader(const safetensors::File& file) : file_(file) {}

    Weight read(const std::string& name, const json::Value& entry) {
        const std::string what = "weight " + quoted(name);
        check_fields(entry, {"shape", "store"}, what);
        Weight out;
        out.name = name;
        out.shape = read_dims(member(entry, "shape", json::Kind::array, what), 1, what + ": a dimension");
        out.store = read_store(member(entry, "store", json::Kind::string, what).text, what);
        out.numel = bounded_count(out.shape, kMaxCount);
        if (out.numel < 0) refuse(what + ": shape " + text_of(out.shape) + " is too large");
        if (out.store == Store::bitmask) bitmask(out, what);
        else dense(out, what);
        return out;
    }

    void check_all_used() const {
        for (const auto& entry : file_.tensors)
            if (!used_.count(&entry.second)) refuse("tensor " + quoted(entry.first) + " belongs to no weight");
    }

private:
    const safetensors::Tensor& tensor(const std::string& name, const Shape& shape, const std::string& what) {
        const auto at = file_.tensors.find(name);
        if (at == file_.tensors.end()) refuse(what + ": the file holds no tensor " + quoted(name));
        if (!used_.emplace(&at->second, true).second)
            refuse(what + ": tensor " + quoted(name) + " belongs to another weight");
        if (at->second.shape != shape)
            refuse(what + ": tensor " + quoted(name) + " has shape " + text_of(at->second.shape) + ", expected " +
                   text_of(shape));
        return at->second;
    }

    static void check_type(bool right, const std::string& name, const std::string& what) {
        if (!right) refuse(what + ": tensor " + quoted(name) + " has a wrong dtype for this store");
    }

    static Store element_type(safetensors::Type type, const std::string& name, const std::string& what) {
        check_type(type <= safetensors::Type::i8, name, what);
        return type == safetensors::Type::f32    ? Store::f32
               : type == safetensors::Type::f16  ? Store::f16
               : type == safetensors::Type::bf16 ? Store::bf16
                                                 : Store::i8;
    }

    void dense(Weight& out, const std::string& what) {
        const safetensors::Tensor& values = tensor(out.name, out.shape, what);
        out.values = element_type(values.type, out.name, what);
        check_type(out.values == out.store, out.name, what);
        out.data = values.data;
        if (out.store == Store::i8) {
            if (out.shape.empty()) refuse(what + ": store i8 needs at least one dimension");
            const safetensors::Tensor& scale = tensor(out.name + ".scale", {out.shape[0]}, what);
            check_type(scale.type == safetensors::Type::f32, out.name + ".scale", what);
            out.scale = scale.data;
            if (!finite(scale.data, out.shape[0])) refuse(what + ": a scale is not finite");
        }
        out.nnz = count_nonzero(out);
    }

    void bitmask(Weight& out, const std::string& what) {
        const int64_t size = out.numel / 8 + (out.numel % 8 != 0);
        const safetensors::Tensor& bits = tensor(out.name + ".bits", {size}, what);
        check_type(bits.type == safetensors::Type::u8, out.name + ".bits", what);
        out.bits = bits.data;
        if (out.numel % 8 != 0 && bits.data[size - 1] >> (out.numel % 8) != 0)
            refuse(what + ": bits past the last of its " + std::to_string(out.numel) + " weights are set");
        out.nnz = count_bits(bits.data, bits.size);
        const safetensors::Tensor& values = tensor(out.name + ".values", {out.nnz}, what);
        out.values = element_type(values.type, out.name + ".values", what);
        check_type(out.values != Store::i8, out.name + ".values", what);
        out.data = values.data;
    }

    const safetensors::File& file_;
    std::unordered_map<const safetensors::Tensor*, bool> used_;
};

class GraphReader {
public:
    Graph read(const json::Value& root, const safetensors::File& file) {
        const std::string what = "the graph";
        check_fields(root, {"inputs", "outputs", "weights", "nodes"}, what);
        const auto& inputs = member(root, "inputs", json::Kind::array, what).items;
        const auto& outputs = member(root, "outputs", json::Kind::array, what).items;
        if (inputs.empty() || outputs.empty()) refuse("the graph has no inputs or no outputs");
        read_weights(member(root, "weights", json::Kind::object, what), file);
        for (const json::Value& item : inputs) read_input(item);
        const auto& nodes = member(root, "nodes", json::Kind::array, what).items;
        graph_.nodes.reserve(nodes.size());
        for (const json::Value& item : nodes) read_node(item);
        for (const json::Value& item : outputs) {
            const int value = existing(item, "an output of the graph");
            if (graph_.values[static_cast<size_t>(value)].dtype != Dtype::f32)
                refuse("output " + quoted(item.text) + " of the graph is not f32");
            graph_.outputs.push_back(value);
        }
        return std::move(graph_);
    }

private:
    void read_weights(const json::Value& object, const safetensors::File& file) {
        WeightReader reader(file);
        for (size_t i = 0; i < object.items.size(); ++i) {
            json::Value name;
            name.kind = json::Kind::string;
            name.text = object.keys[i];
            checked_name(name, "the name of a weight");
            weight_index_.emplace(name.text, static_cast<int>(i));
            graph_.weights.push_back(reader.read(name.text, object.items[i]));
        }
        reader.check_all_used();
    }

    void read_input(const json::Value& item) {
        check_fields(item, {"name", "dtype", "shape"}, "an input of the graph");
        Input input;
        input.name = checked_name(member(item, "name", json::Kind::string, "an input of the graph"),
                                  "the name of an input");
        const std::string what = "input " + quoted(input.name);
        const std::string& dtype = member(item, "dtype", json::Kind::string, what).text;
        if (dtype != "f32" && dtype != "i64") refuse(what + ": unknown dtype " + quoted(dtype));
        input.dtype = dtype == "f32" ? Dtype::f32 : Dtype::i64;
        input.shape = read_dims(member(item, "shape", json::Kind::array, what), 0, what + ": a dimension");
        for (size_t i = 1; i < input.shape.size(); ++i)
            if (input.shape[i] == 0) refuse(what + ": only the first dimension may be 0, the batch");
        graph_.batched |= !input.shape.empty() && input.shape[0] == 0;
        input.value = add_value(input.name, input.dtype);
        graph_.inputs.push_back(std::move(input));
    }

    int add_value(const std::string& name, Dtype dtype) {
        const int number = static_cast<int>(graph_.values.size());
        if (!value_index_.emplace(name, number).second) refuse("value " + quoted(name) + " is assigned twice");
        graph_.values.push_back({name, dtype});
        return number;
    }

    int existing(const json::Value& item, const std::string& what) const {
        const auto at = value_index_.find(checked_name(item, what));
        if (at == value_index_.end()) refuse(what + ": no value " + quoted(item.text) + " exists there");
        return at->second;
    }

    void read_node(const json::Value& item) {
        check_fields(item, {"op", "name", "in", "out", "weights", "attrs"}, "a node");
        const std::string& name = checked_name(member(item, "name", json::Kind::string, "a node"), "the name of a node");
        const std::string what = "node " + quoted(name);
        if (!node_names_.emplace(name, true).second) refuse("two nodes have the name " + quoted(name));
        const std::string& op = member(item, "op", json::Kind::string, what).text;
        const OpSpec* spec = find_op(op);
        if (!spec) throw Error(SEC_ERROR_UNSUPPORTED, what + ": unknown op " + quoted(op));
        try {
            graph_.nodes.push_back(node(*spec, item));
        } catch (const Error& error) {
            throw Error(error.status, what + " (" + op + "): " + error.what());
        }
        graph_.nodes.back().name = name;
    }

    Node node(const OpSpec& spec, const json::Value& item) {
        Node out;
        out.op = spec.op;
        out.attrs = read_attrs(spec, member(item, "attrs", json::Kind::object, "the node"), graph_.batched);
        const auto& in = member(item, "in", json::Kind::array, "the node").items;
        if (in.size() < static_cast<size_t>(spec.min_in) || in.size() > static_cast<size_t>(spec.max_in))
            refuse("takes " + std::to_string(spec.min_in) + " to " + std::to_string(spec.max_in) + " inputs, not " +
                   std::to_string(in.size()));
        if (spec.op == Op::lstm && in.size() == 2) refuse("takes h0 and c0 together, or neither");
        for (size_t i = 0; i < in.size(); ++i) {
            const int value = existing(in[i], "input " + std::to_string(i));
            const Dtype expected = spec.op == Op::embedding ? Dtype::i64 : Dtype::f32;
            if (graph_.values[static_cast<size_t>(value)].dtype != expected)
                refuse("input " + quoted(in[i].text) + (expected == Dtype::i64 ? " is not i64" : " is not f32"));
            out.in.push_back(value);
        }
        read_roles(spec, member(item, "weights", json::Kind::object, "the node"), out);
        const auto& outs = member(item, "out", json::Kind::array, "the node").items;
        if (outs.size() != static_cast<size_t>(spec.outs))
            refuse("gives " + std::to_string(spec.outs) + " values, not " + std::to_string(outs.size()));
        for (const json::Value& value : outs) out.out.push_back(add_value(checked_name(value, "an out"), Dtype::f32));
        return out;
    }

    void read_roles(const OpSpec& spec, const json::Value& object, Node& out) {
        size_t found = 0;
        for (const Role& role : roles_of(spec, out.attrs)) {
            const json::Value* item = object.find(role.name);
            if (!item && role.required) refuse("weight " + quoted(role.name) + " is missing");
            if (!item) continue;
            ++found;
            const auto at = weight_index_.find(checked_name(*item, "the name of weight " + quoted(role.name)));
            if (at == weight_index_.end()) refuse("the graph has no weight " + quoted(item->text));
            const Shape& shape = graph_.weights[static_cast<size_t>(at->second)].shape;
            if (role.rank >= 0 && shape.size() != static_cast<size_t>(role.rank))
                refuse("weight " + quoted(role.name) + " has shape " + text_of(shape) + ", expected " +
                       std::to_string(role.rank) + " dimensions");
            out.weights.emplace(role.name, at->second);
        }
        if (found == object.keys.size()) return;
        for (const std::string& key : object.keys)
            if (!out.weights.count(key)) refuse("unknown weight " + quoted(key));
    }

    Graph graph_;
    std::unordered_map<std::string, int> value_index_, weight_index_;
    std::unordered_map<std::string, bool> node_names_;
};

const std::string& metadata(const safetensors::File& file, const char* key) {
    const auto at = file.metadata.find(key);
    if (at == file.metadata.end()) refuse(std::string("not a plan: the file's metadata has no ") + key);
    return at->second;
}

}  // namespace

Graph parse_plan(const uint8_t* bytes, size_t size) {
    const safetensors::File file = safetensors::read(bytes, size);
    const std::string& format = metadata(file, "format");
    if (format != "secateur-plan") refuse("not a plan: the file's format is " + quoted(format));
    const std::string& version = metadata(file, "version");
    if (version != "1")
        throw Error(SEC_ERROR_UNSUPPORTED, "the plan has version " + quoted(version) + "; this library reads 1");
    const std::string& text = metadata(file, "graph");
    return GraphReader().read(json::parse(text.data(), text.size(), "the graph"), file);
}

}  // namespace sec
