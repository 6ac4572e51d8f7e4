// Operators on plain row-major arrays: what has no lane form, or is too small for one.
#pragma once
#include <memory>
#include <vector>

#include "graph.hpp"
#include "lanes.hpp"

namespace sec {

// One node ready to run for fixed shapes: weights decoded once, no allocation in run().
class PlainOp {
public:
    virtual ~PlainOp() = default;
    // in[i] and out[i] are row-major arrays (float, or int64_t where the value's type is i64); an output never
    // overlaps an input. `scratch` has scratch_bytes() bytes, 64-byte aligned. Only the parts [part, part + 1) of
    // parts() are computed: parts may run at the same time on several threads (parts() is 1 where that is not worth it).
    virtual void run(const void* const* in, void* const* out, void* scratch, int64_t part) const = 0;
    virtual int64_t parts() const { return 1; }
    virtual size_t scratch_bytes() const { return 0; }      // for each part
    virtual double work() const = 0;                        // rough count of multiply-adds or element visits
};

// Every operator of the contract except `const`. Throws Error(SEC_ERROR_UNSUPPORTED) for none of them.
std::unique_ptr<PlainOp> make_plain(const Node& node, const Graph& graph, const std::vector<Shape>& in,
                                    const std::vector<Shape>& out, const Kernels& kernels);

}  // namespace sec
