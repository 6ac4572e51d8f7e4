// What the plain operators share: how work divides into parts, strided loops, and what a maker is given.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "plain.hpp"

namespace sec {
namespace plain {

constexpr int64_t kMaxParts = 64;
constexpr double kPartWork = 65536;      // below this a thread's wake-up costs more than it saves

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return std::max(low, std::min(x, high)); }
// How many parts this much work is worth, when it cannot be cut into more than `units` pieces.
inline int64_t parts_for(double work, int64_t units) {
    return clamp(static_cast<int64_t>(std::min(work / kPartWork, 1e6)), 1, std::min(units, kMaxParts));
}
inline int64_t product(const Shape& shape, size_t from, size_t to) {
    int64_t n = 1;
    for (size_t i = from; i < to; ++i) n *= shape[i];
    return n;
}

struct Make {
    const Node& node;
    const Graph& graph;
    const std::vector<Shape>& in;
    const std::vector<Shape>& out;
    const Kernels& kernels;

    const Attrs& attrs() const { return node.attrs; }
    // The decoded weight, or nothing when the node has none of this role.
    std::vector<float> weight(const std::string& role) const {
        const Weight* w = node.weight(role.c_str(), graph);
        return w ? dense_values(*w) : std::vector<float>();
    }
    // Whether elements are token ids (8 bytes) and not floats.
    bool wide() const { return graph.values[static_cast<size_t>(node.in[0])].dtype == Dtype::i64; }
};

inline const float* or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

struct Io {
    const void* const* inputs;
    void* const* outputs;
    void* scratch;

    const float* in(size_t i) const { return static_cast<const float*>(inputs[i]); }
    float* out(size_t i) const { return static_cast<float*>(outputs[i]); }
    float* floats() const { return static_cast<float*>(scratch); }
};

// An operator whose work is a range of independent units, cut into even parts.
class RangeOp : public PlainOp {
public:
    RangeOp(int64_t units, double work) : units_(units), parts_(parts_for(work, units)), work_(work) {}
    void run(const void* const* in, void* const* out, void* scratch, int64_t part) const final {
        const int64_t whole = units_ / parts_, more = units_ % parts_;
        const int64_t first = part * whole + std::min(part, more);
        range(Io{in, out, scratch}, first, first + whole + (part < more ? 1 : 0));
    }
    int64_t parts() const final { return parts_; }
    double work() const final { return work_; }

protected:
    virtual void range(const Io& io, int64_t first, int64_t last) const = 0;
    // For work that is known only once weights are read; called by constructors.
    void set_work(int64_t units, double work) {
        units_ = units;
        parts_ = parts_for(work, units);
        work_ = work;
    }

private:
    int64_t units_, parts_;
    double work_;
};

// Nested loops over at most 8 dimensions in which K arrays advance by their own strides (in elements).
template <int K> struct Loops {
    int rank = 0;
    int64_t dims[SEC_MAX_DIMS] = {};
    int64_t stride[K][SEC_MAX_DIMS] = {};

    void push(int64_t dim, const int64_t (&strides)[K]) {
        dims[rank] = dim;
        for (int k = 0; k < K; ++k) stride[k][rank] = strides[k];
        ++rank;
    }
    int64_t count() const {
        int64_t n = 1;
        for (int i = 0; i < rank; ++i) n *= dims[i];
        return n;
    }
    // Drops dimensions of 1 and merges neighbours that every array walks as one.
    void collapse() {
        Loops all = *this;
        rank = 0;
        for (int i = 0; i < all.rank; ++i) {
            if (all.dims[i] == 1) continue;
            bool merges = rank > 0;
            for (int k = 0; k < K && merges; ++k) merges = stride[k][rank - 1] == all.stride[k][i] * all.dims[i];
            if (merges) {
                dims[rank - 1] *= all.dims[i];
                for (int k = 0; k < K; ++k) stride[k][rank - 1] = all.stride[k][i];
                continue;
            }
            dims[rank] = all.dims[i];
            for (int k = 0; k < K; ++k) stride[k][rank] = all.stride[k][i];
            ++rank;
        }
    }
};

// Steps through the first `depth` dimensions of some loops, from any index on.
template <int K> struct Walk {
    const Loops<K>& loops;
    const int depth;
    int64_t at[SEC_MAX_DIMS] = {};
    int64_t offset[K] = {};

    Walk(const Loops<K>& l, int d, int64_t index) : loops(l), depth(d) {
        for (int i = depth - 1; i >= 0; --i) {
            at[i] = index % loops.dims[i];
            index /= loops.dims[i];
            for (int k = 0; k < K; ++k) offset[k] += at[i] * loops.stride[k][i];
        }
    }
    void next() {
        for (int i = depth - 1; i >= 0; --i) {
            for (int k = 0; k < K; ++k) offset[k] += loops.stride[k][i];
            if (++at[i] < loops.dims[i]) return;
            for (int k = 0; k < K; ++k) offset[k] -= loops.dims[i] * loops.stride[k][i];
            at[i] = 0;
        }
    }
};

// Row-major strides; 0 along dimensions of 1 when `broadcasts`.
inline std::vector<int64_t> strides_of(const Shape& shape, bool broadcasts) {
    std::vector<int64_t> out(shape.size());
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > 0;) {
        out[i] = broadcasts && shape[i] == 1 ? 0 : step;
        step *= shape[i];
    }
    return out;
}

using Made = std::unique_ptr<PlainOp>;
Made make_conv(const Make& make);
Made make_linear(const Make& make);
Made make_binary(const Make& make);
Made make_unary(const Make& make);
Made make_affine(const Make& make);
Made make_softmax(const Make& make);
Made make_norm(const Make& make);
Made make_pool(const Make& make);
Made make_adaptive(const Make& make);
Made make_reduce(const Make& make);
Made make_matmul(const Make& make);
Made make_attention(const Make& make);
Made make_embedding(const Make& make);
Made make_concat(const Make& make);
Made make_slice(const Make& make);
Made make_reshape(const Make& make);
Made make_permute(const Make& make);
Made make_expand(const Make& make);
Made make_pad(const Make& make);
Made make_recurrent(const Make& make);

}  // namespace plain
}  // namespace sec
