// The operators' table: what each one takes, and how its attributes are read.
#pragma once
#include <string>

#include "graph.hpp"
#include "json.hpp"

namespace sec {

struct OpSpec {
    const char* name;
    Op op;
    int min_in, max_in, outs;
    // Roles of weights, each as `name:rank`, separated by spaces; a trailing ? marks an optional one; rank * is any.
    const char* roles;
    // Attributes, all required, separated by spaces: `name`, or `name=how` where the name alone is ambiguous.
    const char* attrs;
};

const OpSpec* find_op(const std::string& name);  // nullptr when unknown
const OpSpec& spec_of(Op op);

struct Role {
    std::string name;
    int rank;  // -1: any
    bool required;
};
// All roles of a node; those of lstm and gru follow from its attributes.
std::vector<Role> roles_of(const OpSpec& spec, const Attrs& attrs);

// Reads the attributes of one node; `batched` says whether a 0 in a shape has a meaning. Messages name the attribute.
Attrs read_attrs(const OpSpec& spec, const json::Value& object, bool batched);

// A list of at most SEC_MAX_DIMS dimensions, each in low .. kMaxExtent.
Shape read_dims(const json::Value& value, int64_t low, const std::string& what);

}  // namespace sec
