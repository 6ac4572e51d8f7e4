// Decides which layout each value takes.
#include <numeric>

#include "prepared.hpp"

namespace sec {

const Weight* constant_of(const Graph& graph, int value) {
    for (const Node& n : graph.nodes)
        if (n.op == Op::constant && n.out[0] == value) return n.weight("value", graph);
    return nullptr;
}

bool token_view(const Shape& from, const Shape& to, int lanes) {
    if (from.empty() || to.empty() || from.back() != to.back() || to.size() < 2) return false;
    const LaneShape a = token_shape(from, lanes, 8), b = token_shape(to, lanes, 8);
    if (a.sequences == b.sequences && a.length == b.length) return true;
    return a.length == a.padded && b.length == b.padded;
}

bool pool_fits(const Node& node, const Shape& in, const Shape& out) {
    if (node.op == Op::adaptive_avg_pool)
        return out[2] > 0 && out[3] > 0 && in[2] % out[2] == 0 && in[3] % out[3] == 0 && in[2] / out[2] <= 64;
    return node.attrs.kernel[0] <= 64;
}

Window window_of(const Node& n, const Graph& graph, const std::vector<Shape>& shapes) {
    Window w{n.attrs.kernel, n.attrs.stride, n.attrs.dilation, n.attrs.pad};
    if (n.op == Op::conv) {
        const Weight* k = n.weight("weight", graph);
        w.kernel = {k->shape[2], k->shape[3]};
    } else if (n.op == Op::adaptive_avg_pool) {
        const Shape &x = shapes[static_cast<size_t>(n.in[0])], &y = shapes[static_cast<size_t>(n.out[0])];
        w.kernel = w.stride = {x[2] / y[2], x[3] / y[3]};
        w.dilation = {1, 1}, w.pad = {0, 0, 0, 0};
    }
    return w;
}

namespace {

constexpr int64_t kCoarsest = 1024;        // rows of a strip for one row after all strides; past this one strip holds all
constexpr int64_t kMostScale = int64_t{1} << 30;     // products of strides stop here, so that no sum overflows

bool lane_function(Fn fn) {
    return fn <= Fn::tanh || fn == Fn::exp || fn == Fn::sqrt || fn == Fn::rsqrt || fn == Fn::neg || fn == Fn::abs ||
           fn == Fn::square || fn == Fn::reciprocal;
}

Operand operand(const Graph& graph, int value, const Shape& shape, const Shape& out, Slot lane, Slot slot) {
    if (const Weight* w = constant_of(graph, value)) {
        if (w->numel == 1) return Operand::scalar;
        const size_t axis = lane == Slot::tokens ? out.size() - 1 : 1;
        const int64_t chans = out[axis];
        if (w->numel != chans || shape.size() > out.size()) return Operand::none;
        const size_t skip = out.size() - shape.size();
        if (axis < skip || shape[axis - skip] != chans) return Operand::none;
        return Operand::channel;
    }
    if (shape == out && slot == lane) return Operand::same;
    if (lane == Slot::image && slot == Slot::single && shape.size() == 4 && shape[0] == out[0] && shape[1] == out[1])
        return Operand::single;
    if (shape == out && lane != Slot::single) return Operand::same;          // packed on demand
    return Operand::none;
}

class Chooser {
public:
    Chooser(const Graph& graph, const std::vector<Shape>& shapes, int lanes) : g_(graph), shapes_(shapes), lanes_(lanes) {
        const size_t n = graph.values.size();
        out_.slot.assign(n, Slot::plain), out_.root.assign(n, -1), out_.scale.assign(n, 1);
        out_.rows.assign(n, 0), out_.reach.assign(n, Reach{});
    }
    Layouts run(int64_t strips);

private:
    void visit(const Node& n);
    void image(int value, int from, int64_t stride) {
        if (out_.root[at(from)] < 0) out_.root[at(from)] = from;
        out_.slot[at(value)] = Slot::image;
        out_.root[at(value)] = out_.root[at(from)], out_.scale[at(value)] = std::min(out_.scale[at(from)] * stride, kMostScale);
    }
    bool set_rows(const Spread& spread);           // false when strips cannot follow the strides
    double cost(const Spread& spread) const;
    void set_reach();
    static size_t at(int v) { return static_cast<size_t>(v); }
    const Shape& shape(int v) const { return shapes_[at(v)]; }
    Slot slot(int v) const { return out_.slot[at(v)]; }

    const Graph& g_;
    const std::vector<Shape>& shapes_;
    int lanes_;
    Layouts out_;
};

void Chooser::visit(const Node& n) {
    const int y = n.out[0];
    const int x = n.in.empty() ? -1 : n.in[0];
    const Slot s = x < 0 ? Slot::plain : slot(x);
    Slot& result = out_.slot[at(y)];
    switch (n.op) {
        case Op::conv:
            // a padded pixel may be all that the window sees: such a layer needs a halo
            if (s == Slot::single && window_of(n, g_, shapes_).kernel == std::array<int64_t, 2>{1, 1} &&
                n.attrs.pad == std::array<int64_t, 4>{} && n.in.size() == 1)
                result = Slot::single;
            else image(y, x, n.attrs.stride[0]);
            break;
        case Op::max_pool:
        case Op::avg_pool:
            if (pool_fits(n, shape(x), shape(y))) image(y, x, n.attrs.stride[0]);
            break;
        case Op::adaptive_avg_pool:
            if (shape(y)[2] == 1 && shape(y)[3] == 1 && s != Slot::single) {
                if (out_.root[at(x)] < 0) out_.root[at(x)] = x;
                result = Slot::single;
            } else if (pool_fits(n, shape(x), shape(y))) {
                image(y, x, shape(x)[2] / shape(y)[2]);
            }
            break;
        case Op::reduce:
            if (n.attrs.fn == Fn::mean && shape(x).size() == 4 && n.attrs.axes == std::vector<int64_t>{2, 3} &&
                n.attrs.keepdims && s == Slot::image)
                result = Slot::single;
            break;
        case Op::linear: {
            const int64_t m = count(shape(x)) / std::max<int64_t>(1, shape(x).back());
            if (m > 1) result = Slot::tokens;
            break;
        }
        case Op::binary: {
            const BinaryPlan p = plan_binary(g_, n, shapes_, out_.slot);
            if (p.slot == Slot::image) image(y, n.in[at(p.lane)], 1);
            else result = p.slot;
            break;
        }
        case Op::unary:
            if (!lane_function(n.attrs.fn)) break;
            if (s == Slot::image) image(y, x, 1);
            else result = s;
            break;
        case Op::affine:
            if (s == Slot::image) image(y, x, 1);
            else if (s == Slot::single) result = s;
            break;
        case Op::layer_norm:
        case Op::rms_norm: {
            const int64_t m = count(shape(x)) / std::max<int64_t>(1, shape(x).back());
            if (n.attrs.trailing == 1 && shape(x).size() >= 2 && m >= 8 && s != Slot::image) result = Slot::tokens;
            break;
        }
        case Op::softmax:
            if (s == Slot::tokens && n.attrs.axis == static_cast<int64_t>(shape(x).size()) - 1) result = Slot::tokens;
            break;
        case Op::attention:
            if (shape(x).size() == 3 && shape(x)[1] >= 8 && shape(n.in[1])[1] >= 8) result = Slot::tokens;
            break;
        case Op::concat: {
            bool all = n.attrs.axis == 1;
            for (int v : n.in) all = all && slot(v) == Slot::image;
            if (all) image(y, x, 1);
            break;
        }
        case Op::slice:
            if (n.attrs.step != 1) break;
            if (s == Slot::image && n.attrs.axis == 1) image(y, x, 1);
            if (s == Slot::tokens && n.attrs.axis == static_cast<int64_t>(shape(x).size()) - 1) result = Slot::tokens;
            break;
        case Op::reshape:
            if (s == Slot::tokens && token_view(shape(x), shape(y), lanes_)) result = Slot::tokens;
            break;
        default: break;
    }
}

bool Chooser::set_rows(const Spread& spread) {
    const size_t n = g_.values.size();
    std::vector<int64_t> most(n, 1), step(n, 1);
    for (size_t v = 0; v < n; ++v) {
        if (out_.root[v] < 0 || shapes_[v].size() != 4) continue;
        const size_t r = at(out_.root[v]);
        most[r] = std::max(most[r], ceil_div(shapes_[v][2], spread.strips) * out_.scale[v]);
        step[r] = std::min(std::lcm(step[r], out_.scale[v]), kMostScale);
        if (spread.strips > 1 && step[r] > kCoarsest) return false;
    }
    for (size_t v = 0; v < n; ++v) {
        if (out_.root[v] < 0 || shapes_[v].size() != 4) continue;
        const size_t r = at(out_.root[v]);
        out_.rows[v] = spread.strips == 1 ? shapes_[v][2] : round_up(most[r], step[r]) / out_.scale[v];
    }
    return true;
}

double Chooser::cost(const Spread& spread) const {
    double total = 0;
    for (const Node& n : g_.nodes) {
        const int y = n.out[0];
        if (n.op != Op::conv || slot(y) != Slot::image) continue;
        const Weight* w = n.weight("weight", g_);
        const double groups = static_cast<double>(ceil_div(shape(y)[0], spread.images));
        total += groups * static_cast<double>(out_.rows[at(y)] * shape(y)[3]) *
                 (static_cast<double>(w->nnz) + 4.0 * static_cast<double>(shape(y)[1]));
    }
    return total;
}

void Chooser::set_reach() {
    for (size_t i = g_.nodes.size(); i-- > 0;) {
        const Node& n = g_.nodes[i];
        if (slot(n.out[0]) != Slot::image) continue;
        const int x = n.in[0], y = n.out[0];
        Reach need;
        const Window a = window_of(n, g_, shapes_);
        if (n.op == Op::slice) need = out_.reach[at(y)];
        if (n.op == Op::conv || n.op == Op::max_pool || n.op == Op::avg_pool || n.op == Op::adaptive_avg_pool) {
            const int64_t span_h = (a.kernel[0] - 1) * a.dilation[0], span_w = (a.kernel[1] - 1) * a.dilation[1];
            need.top = a.pad[0], need.left = a.pad[1];
            const int64_t last = (out_.rows[at(y)] - 1) * a.stride[0] - a.pad[0] + span_h;
            need.bottom = std::max<int64_t>(0, last - (out_.rows[at(x)] - 1));
            need.right = std::max<int64_t>(0, (shape(y)[3] - 1) * a.stride[1] - a.pad[1] + span_w - (shape(x)[3] - 1));
        }
        out_.reach[at(x)].cover(need);
    }
}

Layouts Chooser::run(int64_t strips) {
    for (const Node& n : g_.nodes) visit(n);
    double best = 0;
    bool found = false;
    Spread pick{lanes_, 1};
    for (int64_t s = lanes_; s >= 1; s /= 2) {
        const Spread spread{lanes_ / s, s};
        if ((strips && s != strips) || !set_rows(spread)) continue;
        const double c = cost(spread);
        if (!found || c < best * 0.999) best = c, pick = spread, found = true;
    }
    out_.spread = pick;
    set_rows(pick);
    set_reach();
    return out_;
}

}  // namespace

BinaryPlan plan_binary(const Graph& graph, const Node& node, const std::vector<Shape>& shapes,
                       const std::vector<Slot>& slot) {
    BinaryPlan p;
    const Shape& out = shapes[static_cast<size_t>(node.out[0])];
    for (Slot want : {Slot::image, Slot::tokens, Slot::single})
        for (int i = 0; i < 2; ++i) {
            const size_t a = static_cast<size_t>(node.in[static_cast<size_t>(i)]);
            const int other = node.in[static_cast<size_t>(1 - i)];
            if (slot[a] != want || shapes[a] != out) continue;
            const Operand o = operand(graph, other, shapes[static_cast<size_t>(other)], out, want,
                                      slot[static_cast<size_t>(other)]);
            if (o == Operand::none) continue;
            p.slot = want, p.lane = i, p.other = o;
            return p;
        }
    return p;
}

Layouts choose_layouts(const Graph& graph, const std::vector<Shape>& shapes, int lanes, int64_t strips) {
    return Chooser(graph, shapes, lanes).run(strips);
}

}  // namespace sec
