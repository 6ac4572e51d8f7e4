// May a batch be run in pieces? Only if every operator keeps the examples apart, one after the other in memory.
#include "prepared.hpp"

namespace sec {
namespace {

enum class Lead { none, batch, lost };                // how a value's first axis relates to the batch

class Checker {
public:
    explicit Checker(const Graph& g) : g_(g), one_(infer(g, 1, INT64_MAX / 64)), two_(infer(g, 2, INT64_MAX / 64)) {}
    bool run() {
        lead_.assign(g_.values.size(), Lead::none);
        for (const Input& in : g_.inputs)
            if (!in.shape.empty() && in.shape[0] == 0) lead_[at(in.value)] = Lead::batch;
        for (const Node& n : g_.nodes) {
            for (int v : n.in)
                if (lead_[at(v)] == Lead::lost) return false;
            const Lead out = visit(n);
            if (out == Lead::lost) return false;
            lead_[at(n.out[0])] = out;
            for (size_t i = 1; i < n.out.size(); ++i) lead_[at(n.out[i])] = Lead::lost;
            if (out == Lead::batch ? !grows(n.out[0]) : one_[at(n.out[0])] != two_[at(n.out[0])]) return false;
        }
        for (int v : g_.outputs)
            if (lead_[at(v)] != Lead::batch) return false;
        return true;
    }

private:
    static size_t at(int v) { return static_cast<size_t>(v); }
    bool leads(int v) const { return lead_[at(v)] == Lead::batch; }
    size_t rank(int v) const { return one_[at(v)].size(); }
    // The first axis doubles with the batch, the others stay.
    bool grows(int v) const {
        const Shape &a = one_[at(v)], &b = two_[at(v)];
        if (a.empty() || a.size() != b.size() || b[0] != 2 * a[0]) return false;
        for (size_t i = 1; i < a.size(); ++i)
            if (a[i] != b[i]) return false;
        return true;
    }
    // An operand without the batch is the same for every example: it must not reach the first axis.
    bool shared(int v, size_t out_rank) const {
        return !leads(v) && (rank(v) < out_rank || one_[at(v)][0] == 1);
    }
    Lead visit(const Node& n) const;
    Lead several(const Node& n) const;

    const Graph& g_;
    std::vector<Shape> one_, two_;
    std::vector<Lead> lead_;
};

// Operators whose operands broadcast.
Lead Checker::several(const Node& n) const {
    bool any = false;
    for (int v : n.in) any = any || leads(v);
    if (!any) return Lead::none;
    const size_t r = rank(n.out[0]);
    for (int v : n.in)
        if (leads(v) ? rank(v) != r : !shared(v, r)) return Lead::lost;
    return Lead::batch;
}

Lead Checker::visit(const Node& n) const {
    if (n.op == Op::constant) return Lead::none;
    const int x = n.in[0];
    const Lead in = lead_[at(x)];
    const Attrs& a = n.attrs;
    switch (n.op) {
        case Op::binary: return several(n);
        case Op::matmul:
            if (rank(n.out[0]) < 2 || (rank(x) < 3 && leads(n.in[1]))) return Lead::lost;
            if (rank(x) == 2) return leads(x) && rank(n.in[1]) > 2 ? Lead::lost : in;
            return several(n);
        case Op::concat:
            for (int v : n.in)
                if (lead_[at(v)] != in) return Lead::lost;
            return in == Lead::batch && a.axis == 0 ? Lead::lost : in;
        case Op::conv:
        case Op::linear:
            for (int v : n.in)
                if (lead_[at(v)] != in) return Lead::lost;
            return in;
        case Op::attention: {
            for (size_t i = 0; i < 3; ++i)
                if (lead_[at(n.in[i])] != in) return Lead::lost;
            if (n.in.size() > 3 && in == Lead::batch) {
                const int m = n.in[3];
                if (leads(m) ? rank(m) != 4 : !shared(m, 4)) return Lead::lost;
            }
            return in;
        }
        default: break;
    }
    if (in != Lead::batch) return n.op == Op::expand && !a.shape.empty() && a.shape[0] == 0 ? Lead::batch : Lead::none;
    switch (n.op) {
        case Op::unary:
        case Op::affine:
        case Op::max_pool:
        case Op::avg_pool:
        case Op::adaptive_avg_pool:
        case Op::group_norm:
        case Op::embedding:
        case Op::reshape: return Lead::batch;
        case Op::softmax:
        case Op::slice: return a.axis == 0 ? Lead::lost : Lead::batch;
        case Op::reduce:
            for (int64_t axis : a.axes)
                if (axis == 0) return Lead::lost;
            return Lead::batch;
        case Op::layer_norm:
        case Op::rms_norm: return a.trailing < static_cast<int64_t>(rank(x)) ? Lead::batch : Lead::lost;
        case Op::permute: return a.dims[0] == 0 ? Lead::batch : Lead::lost;
        case Op::pad: return a.pads[0][0] == 0 && a.pads[0][1] == 0 ? Lead::batch : Lead::lost;
        case Op::expand: return rank(x) == rank(n.out[0]) ? Lead::batch : Lead::lost;
        case Op::lstm:
        case Op::gru: return a.batch_first && n.in.size() == 1 ? Lead::batch : Lead::lost;
        default: return Lead::lost;
    }
}

}  // namespace

// Examples that run together: as many as keep the feature maps in the second-level cache, or one. More would stream each
// layer's maps through the shared cache or memory; lists are read again for every piece, but they are small beside maps.
// Where no value has pixels or tokens the weights are what costs, and the batch stays whole.
int64_t piece_of(const Graph& graph, int64_t batch) {
    constexpr double kCache = 1024.0 * 1024;
    if (batch <= 1 || !graph.batched) return batch;
    const std::vector<Shape> shapes = infer(graph, 1, INT64_MAX / 64);
    int64_t most = 1;
    bool maps = false;
    for (const Shape& s : shapes) most = std::max(most, count(s)), maps = maps || s.size() > 2;
    if (!maps) return batch;
    const double each = 3.0 * 4.0 * static_cast<double>(most);
    int64_t piece = 1;
    while (piece * 2 <= batch && static_cast<double>(piece * 2) * each <= kCache) piece *= 2;
    if (static_cast<double>(batch) * each <= kCache) return batch;
    try {
        return Checker(graph).run() ? piece : batch;
    } catch (const Error&) {
        return batch;
    }
}

}  // namespace sec
