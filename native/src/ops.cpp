#include "ops.hpp"

#include <cfloat>
#include <cmath>
#include <cstring>
#include <sstream>

#include "checks.hpp"

namespace sec {
namespace {

// Windows, strides, groups and heads stay below this, so products of two with a dimension cannot overflow.
constexpr int64_t kMaxWindow = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1024;

const OpSpec kOps[] = {
    {"conv", Op::conv, 1, 2, 1, "weight:4 bias:1?", "stride pad dilation groups act"},
    {"linear", Op::linear, 1, 2, 1, "weight:2 bias:1?", "act"},
    {"binary", Op::binary, 2, 2, 1, "", "fn=binary act"},
    {"unary", Op::unary, 1, 1, 1, "", "fn=unary"},
    {"const", Op::constant, 0, 0, 1, "value:*", ""},
    {"affine", Op::affine, 1, 1, 1, "scale:1 shift:1", "act"},
    {"softmax", Op::softmax, 1, 1, 1, "", "axis"},
    {"max_pool", Op::max_pool, 1, 1, 1, "", "kernel stride pad dilation"},
    {"avg_pool", Op::avg_pool, 1, 1, 1, "", "kernel stride pad count_pad"},
    {"adaptive_avg_pool", Op::adaptive_avg_pool, 1, 1, 1, "", "size"},
    {"reduce", Op::reduce, 1, 1, 1, "", "fn=reduce axes keepdims"},
    {"layer_norm", Op::layer_norm, 1, 1, 1, "weight:*? bias:*?", "axes=trailing eps"},
    {"rms_norm", Op::rms_norm, 1, 1, 1, "weight:*?", "axes=trailing eps"},
    {"group_norm", Op::group_norm, 1, 1, 1, "weight:1? bias:1?", "groups eps"},
    {"matmul", Op::matmul, 2, 2, 1, "", ""},
    {"attention", Op::attention, 3, 4, 1, "", "heads scale causal"},
    {"embedding", Op::embedding, 1, 1, 1, "weight:2", ""},
    {"concat", Op::concat, 1, 1 << 20, 1, "", "axis"},
    {"slice", Op::slice, 1, 1, 1, "", "axis start stop step"},
    {"reshape", Op::reshape, 1, 1, 1, "", "shape"},
    {"permute", Op::permute, 1, 1, 1, "", "dims"},
    {"expand", Op::expand, 1, 1, 1, "", "shape"},
    {"pad", Op::pad, 1, 1, 1, "", "pad=pads value"},
    {"lstm", Op::lstm, 1, 3, 3, "", "hidden layers bidirectional batch_first"},
    {"gru", Op::gru, 1, 2, 2, "", "hidden layers bidirectional batch_first"},
};

struct FnName {
    const char* name;
    Fn fn;
    const char* kinds;  // u unary, b binary, r reduce
};

constexpr FnName kFns[] = {
    {"relu", Fn::relu, "u"}, {"relu6", Fn::relu6, "u"}, {"gelu", Fn::gelu, "u"}, {"gelu_tanh", Fn::gelu_tanh, "u"},
    {"silu", Fn::silu, "u"}, {"hardswish", Fn::hardswish, "u"}, {"hardsigmoid", Fn::hardsigmoid, "u"},
    {"sigmoid", Fn::sigmoid, "u"}, {"tanh", Fn::tanh, "u"}, {"exp", Fn::exp, "u"}, {"log", Fn::log, "u"},
    {"sqrt", Fn::sqrt, "u"}, {"rsqrt", Fn::rsqrt, "u"}, {"neg", Fn::neg, "u"}, {"abs", Fn::abs, "u"},
    {"square", Fn::square, "u"}, {"reciprocal", Fn::reciprocal, "u"}, {"add", Fn::add, "b"}, {"sub", Fn::sub, "b"},
    {"mul", Fn::mul, "b"}, {"div", Fn::div, "b"}, {"max", Fn::max, "br"}, {"min", Fn::min, "b"},
    {"mean", Fn::mean, "r"}, {"sum", Fn::sum, "r"},
};
static_assert(static_cast<int>(Act::tanh) == static_cast<int>(Fn::tanh), "the activations lead both lists alike");

int64_t integer(const json::Value& value, int64_t low, int64_t high, const std::string& what) {
    if (!value.exact || value.integer < low || value.integer > high)
        refuse(what + " is not an integer from " + std::to_string(low) + " to " + std::to_string(high));
    return value.integer;
}

bool boolean(const json::Value& value, const std::string& what) {
    if (!value.is(json::Kind::boolean)) refuse(what + " is not true or false");
    return value.boolean;
}

// A number that float32 holds too.
double real(const json::Value& value, double low, const std::string& what) {
    if (!value.is(json::Kind::number) || value.number < low || std::fabs(value.number) > FLT_MAX)
        refuse(what + " is not a number in its range");
    return value.number;
}

template <size_t N>
void integers(const json::Value& value, int64_t low, const std::string& what, std::array<int64_t, N>& out) {
    if (!value.is(json::Kind::array) || value.items.size() != N)
        refuse(what + " is not a list of " + std::to_string(N) + " integers");
    for (size_t i = 0; i < N; ++i) out[i] = integer(value.items[i], low, kMaxWindow, what);
}

// Axes: each in 0 .. SEC_MAX_DIMS - 1, none twice.
std::vector<int64_t> axes(const json::Value& value, bool may_be_empty, const std::string& what) {
    const Shape list = read_dims(value, 0, what);
    if (list.empty() && !may_be_empty) refuse(what + " is empty");
    unsigned seen = 0;
    for (int64_t axis : list) {
        if (axis >= SEC_MAX_DIMS) refuse(what + " names axis " + std::to_string(axis) + " of at most 8");
        if (seen >> axis & 1u) refuse(what + " names axis " + std::to_string(axis) + " twice");
        seen |= 1u << axis;
    }
    return list;
}

Shape target_shape(const json::Value& value, bool batched, const std::string& what) {
    const Shape shape = read_dims(value, -1, what);
    if (std::count(shape.begin(), shape.end(), -1) > 1) refuse(what + " has more than one -1");
    if (!batched && std::count(shape.begin(), shape.end(), 0) > 0)
        refuse(what + " has a 0, which means the batch, but no input of the graph has one");
    return shape;
}

Fn function(const json::Value& value, char kind, const std::string& what) {
    for (const FnName& entry : kFns)
        if (value.is(json::Kind::string) && value.text == entry.name && std::strchr(entry.kinds, kind)) return entry.fn;
    refuse(what + " is not a function of this operator");
}

Act activation(const json::Value& value, const std::string& what) {
    if (value.is(json::Kind::string) && value.text == "none") return Act::none;
    const Fn fn = function(value, 'u', what);
    if (fn > Fn::tanh) refuse(what + " is not an activation");
    return static_cast<Act>(fn);
}

void read_pads(const json::Value& value, const std::string& what, Attrs& out) {
    if (!value.is(json::Kind::array) || value.items.size() > SEC_MAX_DIMS)
        refuse(what + " is not a list of at most 8 pairs");
    for (const json::Value& item : value.items) {
        const Shape pair = read_dims(item, 0, what);
        if (pair.size() != 2) refuse(what + " holds something else than pairs");
        out.pads.push_back({pair[0], pair[1]});
    }
}

// The attributes that are lists or names; false when `how` is none of them.
bool read_compound(const std::string& how, const json::Value& v, bool batched, const std::string& what, Attrs& out) {
    if (how == "stride") integers(v, 1, what, out.stride);
    else if (how == "dilation") integers(v, 1, what, out.dilation);
    else if (how == "kernel") integers(v, 1, what, out.kernel);
    else if (how == "size") integers(v, 1, what, out.size);
    else if (how == "pad") integers(v, 0, what, out.pad);
    else if (how == "pads") read_pads(v, what, out);
    else if (how == "axes") out.axes = axes(v, false, what);
    else if (how == "dims") out.dims = axes(v, true, what);
    else if (how == "shape") out.shape = target_shape(v, batched, what);
    else if (how == "act") out.act = activation(v, what);
    else if (how == "binary" || how == "unary" || how == "reduce") out.fn = function(v, how[0], what);
    else return false;
    return true;
}

void read_one(const std::string& how, const json::Value& v, bool batched, const std::string& what, Attrs& out) {
    if (read_compound(how, v, batched, what, out)) return;
    if (how == "groups") out.groups = integer(v, 1, kMaxWindow, what);
    else if (how == "heads") out.heads = integer(v, 1, kMaxWindow, what);
    else if (how == "hidden") out.hidden = integer(v, 1, kMaxWindow, what);
    else if (how == "layers") out.layers = integer(v, 1, kMaxLayers, what);
    else if (how == "axis") out.axis = integer(v, 0, SEC_MAX_DIMS - 1, what);
    else if (how == "trailing") out.trailing = integer(v, 1, SEC_MAX_DIMS, what);
    else if (how == "start") out.start = integer(v, 0, kMaxExtent, what);
    else if (how == "stop") out.stop = integer(v, 1, kMaxExtent, what);
    else if (how == "step") out.step = integer(v, 1, kMaxExtent, what);
    else if (how == "eps") out.eps = real(v, 0, what);
    else if (how == "scale") out.scale = real(v, -FLT_MAX, what);
    else if (how == "value") out.value = real(v, -FLT_MAX, what);
    else if (how == "keepdims") out.keepdims = boolean(v, what);
    else if (how == "count_pad") out.count_pad = boolean(v, what);
    else if (how == "causal") out.causal = boolean(v, what);
    else if (how == "bidirectional") out.bidirectional = boolean(v, what);
    else if (how == "batch_first") out.batch_first = boolean(v, what);
    else throw Error(SEC_ERROR_INTERNAL, "the operators' table names an attribute that nobody reads: " + how);
}

}  // namespace

const OpSpec* find_op(const std::string& name) {
    for (const OpSpec& spec : kOps)
        if (name == spec.name) return &spec;
    return nullptr;
}

const OpSpec& spec_of(Op op) {
    for (const OpSpec& spec : kOps)
        if (spec.op == op) return spec;
    throw Error(SEC_ERROR_INTERNAL, "an operator is missing from the table");
}

const char* op_name(Op op) { return spec_of(op).name; }

const Weight* Node::weight(const char* role, const Graph& graph) const {
    const auto at = weights.find(role);
    return at == weights.end() ? nullptr : &graph.weights[static_cast<size_t>(at->second)];
}

std::vector<Role> roles_of(const OpSpec& spec, const Attrs& attrs) {
    std::vector<Role> roles;
    if (spec.op == Op::lstm || spec.op == Op::gru) {
        for (int64_t layer = 0; layer < attrs.layers; ++layer)
            for (int dir = 0; dir < (attrs.bidirectional ? 2 : 1); ++dir) {
                const std::string tail = "." + std::to_string(layer) + "." + std::to_string(dir);
                for (const char* stem : {"w_ih", "w_hh", "b_ih", "b_hh"})
                    roles.push_back({stem + tail, stem[0] == 'w' ? 2 : 1, true});
            }
        return roles;
    }
    std::istringstream stream(spec.roles);
    for (std::string token; stream >> token;) {
        const size_t colon = token.find(':');
        const char rank = token[colon + 1];
        roles.push_back({token.substr(0, colon), rank == '*' ? -1 : rank - '0', token.back() != '?'});
    }
    return roles;
}

Attrs read_attrs(const OpSpec& spec, const json::Value& object, bool batched) {
    Attrs out;
    size_t known = 0;
    std::istringstream stream(spec.attrs);
    for (std::string token; stream >> token; ++known) {
        const size_t equals = token.find('=');
        const std::string key = token.substr(0, equals);
        const json::Value* value = object.find(key);
        if (!value) refuse("attribute " + quoted(key) + " is missing");
        read_one(equals == std::string::npos ? token : token.substr(equals + 1), *value, batched,
                 "attribute " + quoted(key), out);
    }
    if (known == object.keys.size()) return out;
    const std::string all = " " + std::string(spec.attrs) + " ";
    for (const std::string& key : object.keys)
        if (all.find(" " + key + " ") == std::string::npos && all.find(" " + key + "=") == std::string::npos)
            refuse("unknown attribute " + quoted(key));
    throw Error(SEC_ERROR_INTERNAL, "the operators' table names an attribute twice");
}

Shape read_dims(const json::Value& value, int64_t low, const std::string& what) {
    if (!value.is(json::Kind::array) || value.items.size() > SEC_MAX_DIMS)
        refuse(what + " is not a list of at most 8 integers");
    Shape out;
    for (const json::Value& item : value.items) out.push_back(integer(item, low, kMaxExtent, what));
    return out;
}

}  // namespace sec
