// Shapes of all values for one batch size, and the checks that need them.
#include "checks.hpp"
#include "ops.hpp"

namespace sec {
namespace {

constexpr int64_t kMaxKernel = int64_t{1} << 24;

class Inference {
public:
    Inference(const Graph& graph, int64_t batch, int64_t limit)
        : graph_(graph), batch_(batch), limit_(std::min(limit, kMaxCount)), shapes_(graph.values.size()) {}

    std::vector<Shape> run() {
        for (const Input& input : graph_.inputs) {
            Shape shape = input.shape;
            if (!shape.empty() && shape[0] == 0) shape[0] = batch_;
            check_size(shape, "input " + quoted(input.name));
            shapes_[index(input.value)] = std::move(shape);
        }
        for (const Node& node : graph_.nodes) {
            node_ = &node;
            try {
                infer_node();
            } catch (const Error& error) {
                throw Error(error.status, "node " + quoted(node.name) + " (" + op_name(node.op) + "): " + error.what());
            }
        }
        return std::move(shapes_);
    }

private:
    static size_t index(int64_t i) { return static_cast<size_t>(i); }
    const Attrs& attrs() const { return node_->attrs; }
    bool has(size_t i) const { return node_->in.size() > i; }
    const Shape& in(size_t i) const { return shapes_[index(node_->in[i])]; }
    const Shape& in(size_t i, size_t rank) const {
        if (in(i).size() != rank)
            refuse("input " + std::to_string(i) + " has shape " + text_of(in(i)) + ", expected " +
                   std::to_string(rank) + " dimensions");
        return in(i);
    }

    void check_size(const Shape& shape, const std::string& what) const {
        if (shape.size() > SEC_MAX_DIMS) refuse(what + " of shape " + text_of(shape) + " has more than 8 dimensions");
        for (int64_t d : shape)
            if (d < 1) refuse(what + " of shape " + text_of(shape) + " is empty");
        if (bounded_count(shape, limit_) < 0)
            throw Error(SEC_ERROR_MEMORY, what + " of shape " + text_of(shape) + " has more than " +
                                              std::to_string(limit_) + " elements; use a smaller batch or a larger memory_limit");
    }

    void give(Shape shape, size_t i = 0) {
        check_size(shape, "output");
        shapes_[index(node_->out[i])] = std::move(shape);
    }

    // Work behind a value, in elements of whatever is looped over: its count must stay exact, not small.
    static void check_work(const Shape& loops) {
        if (bounded_count(loops, kMaxCount) < 0)
            throw Error(SEC_ERROR_MEMORY, "loops over " + text_of(loops) + ", more than 2^56 steps");
    }

    static void check_same(const Shape& got, const Shape& expected, const std::string& what) {
        if (got != expected) refuse(what + " has shape " + text_of(got) + ", expected " + text_of(expected));
    }

    void check_weight(const std::string& role, const Shape& expected) const {
        const Weight* weight = node_->weight(role.c_str(), graph_);
        if (weight) check_same(weight->shape, expected, "weight " + quoted(role));
    }

    // The weight of a required role.
    const Shape& weight_shape(const char* role) const {
        const Weight* weight = node_->weight(role, graph_);
        if (!weight) refuse(std::string("weight '") + role + "' is missing");
        return weight->shape;
    }

    size_t axis(int64_t at, const Shape& shape) const {
        if (at < 0 || at >= static_cast<int64_t>(shape.size()))
            refuse("axis " + std::to_string(at) + " of an input of shape " + text_of(shape));
        return index(at);
    }

    static bool broadcasts(const Shape& from, const Shape& to) {
        if (from.size() > to.size()) return false;
        const size_t shift = to.size() - from.size();
        for (size_t i = 0; i < from.size(); ++i)
            if (from[i] != 1 && from[i] != to[shift + i]) return false;
        return true;
    }

    static Shape broadcast(const Shape& a, const Shape& b) {
        const Shape& longer = a.size() >= b.size() ? a : b;
        const Shape& shorter = a.size() >= b.size() ? b : a;
        Shape out = longer;
        const size_t shift = longer.size() - shorter.size();
        for (size_t i = 0; i < shorter.size(); ++i) {
            const int64_t s = shorter[i];
            int64_t& l = out[shift + i];
            if (l != s && l != 1 && s != 1) refuse("shapes " + text_of(a) + " and " + text_of(b) + " do not broadcast");
            if (l == 1) l = s;
        }
        return out;
    }

    // Height and width after a window has moved over x.
    std::array<int64_t, 2> windows(const Shape& x, const std::array<int64_t, 2>& kernel) const {
        const Attrs& a = attrs();
        std::array<int64_t, 2> out{};
        Shape padded = x;
        for (size_t i = 0; i < 2; ++i) {
            if (kernel[i] < 1 || kernel[i] > kMaxKernel || a.stride[i] < 1 || a.dilation[i] < 1 ||
                a.dilation[i] > kMaxKernel || a.pad[i] < 0 || a.pad[i + 2] < 0 ||
                std::max(a.pad[i], a.pad[i + 2]) > kMaxExtent)
                refuse("a kernel, stride, dilation or padding is out of its range");
            padded[i + 2] += a.pad[i] + a.pad[i + 2];
            const int64_t reach = (kernel[i] - 1) * a.dilation[i] + 1;
            if (reach > padded[i + 2])
                refuse("a window of " + std::to_string(reach) + " exceeds the padded input of shape " + text_of(padded));
            out[i] = (padded[i + 2] - reach) / a.stride[i] + 1;
        }
        check_size(padded, "the padded input");
        return out;
    }

    void conv() {
        const Shape& x = in(0, 4);
        const Shape& w = weight_shape("weight");
        const int64_t groups = attrs().groups;
        if (x[1] % groups != 0 || x[1] / groups != w[1] || w[0] % groups != 0)
            refuse("weight of shape " + text_of(w) + " does not fit an input of shape " + text_of(x) + " in " +
                   std::to_string(groups) + " groups");
        check_weight("bias", {w[0]});
        const auto size = windows(x, {w[2], w[3]});
        const Shape out{x[0], w[0], size[0], size[1]};
        check_work({x[0], x[1], w[2], w[3], size[0], size[1]});
        if (has(1)) check_same(in(1), out, "input 1");
        give(out);
    }

    void linear() {
        Shape out = in(0);
        const Shape& w = weight_shape("weight");
        if (out.empty() || out.back() != w[1])
            refuse("weight of shape " + text_of(w) + " does not fit an input of shape " + text_of(out));
        check_weight("bias", {w[0]});
        out.back() = w[0];
        if (has(1)) check_same(in(1), out, "input 1");
        give(std::move(out));
    }

    void affine() {
        const Shape& x = in(0);
        const size_t channel = axis(1, x);
        check_weight("scale", {x[channel]});
        check_weight("shift", {x[channel]});
        give(x);
    }

    void pool() {
        const Shape& x = in(0, 4);
        const Attrs& a = attrs();
        const auto size = windows(x, a.kernel);
        check_work({x[0], x[1], a.kernel[0], a.kernel[1], size[0], size[1]});
        give({x[0], x[1], size[0], size[1]});
    }

    void adaptive_avg_pool() {
        const Shape& x = in(0, 4);
        give({x[0], x[1], attrs().size[0], attrs().size[1]});
    }

    void reduce() {
        const Shape& x = in(0);
        std::vector<bool> gone(x.size(), false);
        for (int64_t a : attrs().axes) gone[axis(a, x)] = true;
        Shape out;
        for (size_t i = 0; i < x.size(); ++i)
            if (!gone[i] || attrs().keepdims) out.push_back(gone[i] ? 1 : x[i]);
        give(std::move(out));
    }

    void trailing_norm() {
        const Shape& x = in(0);
        const int64_t trailing = attrs().trailing;
        if (trailing < 1 || trailing > static_cast<int64_t>(x.size()))
            refuse("normalises " + std::to_string(trailing) + " axes of an input of shape " + text_of(x));
        const Shape tail(x.end() - static_cast<std::ptrdiff_t>(trailing), x.end());
        check_weight("weight", tail);
        check_weight("bias", tail);
        give(x);
    }

    void group_norm() {
        const Shape& x = in(0);
        const int64_t channels = x[axis(1, x)];
        if (channels % attrs().groups != 0)
            refuse(std::to_string(channels) + " channels do not divide into " + std::to_string(attrs().groups) + " groups");
        check_weight("weight", {channels});
        check_weight("bias", {channels});
        give(x);
    }

    void matmul() {
        const Shape &a = in(0), &b = in(1);
        if (a.size() < 2 || b.size() < 2 || a.back() != b[b.size() - 2])
            refuse("cannot multiply shapes " + text_of(a) + " and " + text_of(b));
        Shape out = broadcast(Shape(a.begin(), a.end() - 2), Shape(b.begin(), b.end() - 2));
        out.push_back(a[a.size() - 2]);
        out.push_back(b.back());
        check_size(out, "output");
        Shape loops = out;
        loops.push_back(a.back());
        check_work(loops);
        give(std::move(out));
    }

    void attention() {
        const Shape &q = in(0, 3), &k = in(1, 3), &v = in(2, 3);
        const int64_t heads = attrs().heads;
        if (k[0] != q[0] || v[0] != q[0] || k[2] != q[2] || v[1] != k[1])
            refuse("q, k and v of shapes " + text_of(q) + ", " + text_of(k) + " and " + text_of(v) + " do not fit");
        if (q[2] % heads != 0 || v[2] % heads != 0)
            refuse(std::to_string(q[2]) + " or " + std::to_string(v[2]) + " columns do not divide into " +
                   std::to_string(heads) + " heads");
        const Shape scores{q[0], heads, q[1], k[1]};
        check_work({q[0], q[1], k[1], std::max(q[2], v[2])});
        if (has(3) && !broadcasts(in(3), scores))
            refuse("a mask of shape " + text_of(in(3)) + " does not broadcast to " + text_of(scores));
        give({q[0], q[1], v[2]});
    }

    void embedding() {
        Shape out = in(0);
        out.push_back(weight_shape("weight")[1]);
        give(std::move(out));
    }

    void concat() {
        Shape out = in(0);
        const size_t at = axis(attrs().axis, out);
        for (size_t i = 1; i < node_->in.size(); ++i) {
            Shape rest = in(i);
            const int64_t added = rest.size() == out.size() ? rest[at] : 0;
            if (added > 0) rest[at] = out[at];
            check_same(rest, out, "input " + std::to_string(i) + ", joined on axis " + std::to_string(at) + ",");
            out[at] += added;  // each is at most the limit, so the sum is exact
            check_size(out, "output");
        }
        give(std::move(out));
    }

    void slice() {
        Shape out = in(0);
        const Attrs& a = attrs();
        const size_t at = axis(a.axis, out);
        if (a.start < 0 || a.start >= a.stop || a.stop > out[at] || a.step < 1)
            refuse("slice " + std::to_string(a.start) + ":" + std::to_string(a.stop) + ":" + std::to_string(a.step) +
                   " of axis " + std::to_string(at) + " of shape " + text_of(out));
        out[at] = (a.stop - a.start - 1) / a.step + 1;
        give(std::move(out));
    }

    void reshape() {
        const int64_t total = count(in(0));
        Shape out = attrs().shape;
        int64_t known = 1;
        int64_t* open = nullptr;
        for (int64_t& d : out) {
            if (d == 0) d = batch_;
            if (d == -1) open = &d;
            else if (!multiply(known, d, total, &known)) known = total + 1;
        }
        if (open && total % known == 0) *open = total / known;
        else if (open || known != total)
            refuse("an input of shape " + text_of(in(0)) + " does not fill the shape " + text_of(out));
        give(std::move(out));
    }

    void permute() {
        const Shape& x = in(0);
        const auto& dims = attrs().dims;
        if (dims.size() != x.size())
            refuse("dims " + text_of(dims) + " are not an order of the axes of shape " + text_of(x));
        Shape out;
        std::vector<bool> seen(x.size(), false);
        for (int64_t d : dims) {
            const size_t from = axis(d, x);
            if (seen[from]) refuse("dims " + text_of(dims) + " name an axis twice");
            seen[from] = true;
            out.push_back(x[from]);
        }
        give(std::move(out));
    }

    void expand() {
        const Shape& x = in(0);
        Shape out = attrs().shape;
        for (size_t i = 0; i < out.size(); ++i) {
            const size_t back = out.size() - i;
            if (out[i] == 0) out[i] = batch_;
            if (out[i] == -1 && back <= x.size()) out[i] = x[x.size() - back];
        }
        if (!broadcasts(x, out) || std::count(out.begin(), out.end(), -1) > 0)
            refuse("an input of shape " + text_of(x) + " does not broadcast to " + text_of(out));
        give(std::move(out));
    }

    void pad() {
        Shape out = in(0);
        const auto& pads = attrs().pads;
        if (pads.size() != out.size())
            refuse(std::to_string(pads.size()) + " pairs for an input of shape " + text_of(out));
        for (size_t i = 0; i < out.size(); ++i) out[i] += pads[i][0] + pads[i][1];
        give(std::move(out));
    }

    void recurrent() {
        const Attrs& a = attrs();
        const int64_t gates = node_->op == Op::lstm ? 4 : 3;
        const int64_t dirs = a.bidirectional ? 2 : 1;
        Shape out = in(0, 3);
        const int64_t items = out[a.batch_first ? 0 : 1];
        int64_t features = out[2];
        for (int64_t layer = 0; layer < a.layers; ++layer) {
            for (int64_t dir = 0; dir < dirs; ++dir) {
                const std::string tail = "." + std::to_string(layer) + "." + std::to_string(dir);
                check_weight("w_ih" + tail, {gates * a.hidden, features});
                check_weight("w_hh" + tail, {gates * a.hidden, a.hidden});
                check_weight("b_ih" + tail, {gates * a.hidden});
                check_weight("b_hh" + tail, {gates * a.hidden});
            }
            features = dirs * a.hidden;
        }
        const Shape state{a.layers * dirs, items, a.hidden};
        for (size_t i = 1; i < node_->in.size(); ++i) check_same(in(i), state, "input " + std::to_string(i));
        check_work({out[0], out[1], gates * dirs, a.hidden});
        out[2] = dirs * a.hidden;
        give(std::move(out));
        for (size_t i = 1; i < node_->out.size(); ++i) give(state, i);
    }

    void infer_node() {
        switch (node_->op) {
            case Op::conv: return conv();
            case Op::linear: return linear();
            case Op::binary: return give(broadcast(in(0), in(1)));
            case Op::unary: return give(in(0));
            case Op::constant: return give(weight_shape("value"));
            case Op::affine: return affine();
            case Op::softmax: axis(attrs().axis, in(0)); return give(in(0));
            case Op::max_pool: case Op::avg_pool: return pool();
            case Op::adaptive_avg_pool: return adaptive_avg_pool();
            case Op::reduce: return reduce();
            case Op::layer_norm: case Op::rms_norm: return trailing_norm();
            case Op::group_norm: return group_norm();
            case Op::matmul: return matmul();
            case Op::attention: return attention();
            case Op::embedding: return embedding();
            case Op::concat: return concat();
            case Op::slice: return slice();
            case Op::reshape: return reshape();
            case Op::permute: return permute();
            case Op::expand: return expand();
            case Op::pad: return pad();
            case Op::lstm: case Op::gru: return recurrent();
        }
        throw Error(SEC_ERROR_INTERNAL, "an operator without shape inference");
    }

    const Graph& graph_;
    const int64_t batch_, limit_;
    std::vector<Shape> shapes_;
    const Node* node_ = nullptr;
};

}  // namespace

std::vector<Shape> infer(const Graph& graph, int64_t batch, int64_t limit) {
    if (batch < 1 || batch > kMaxExtent)
        throw Error(SEC_ERROR_ARGUMENT,
                    "the batch is " + std::to_string(batch) + ", not from 1 to " + std::to_string(kMaxExtent));
    return Inference(graph, batch, limit).run();
}

}  // namespace sec
