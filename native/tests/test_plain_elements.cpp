// binary, unary, affine; softmax, norms, reduce.
#include "plain_harness.hpp"

namespace test {
namespace {

// Coordinates of element i of a shape.
Shape place(int64_t i, const Shape& shape) {
    Shape at(shape.size());
    for (size_t d = shape.size(); d-- > 0; i /= shape[d]) at[d] = i % shape[d];
    return at;
}
// The element that broadcasting reads there.
double read(const Doubles& values, const Shape& shape, const Shape& at) {
    int64_t i = 0;
    for (size_t d = 0; d < shape.size(); ++d)
        i = i * shape[d] + (shape[d] == 1 ? 0 : at[at.size() - shape.size() + d]);
    return values[static_cast<size_t>(i)];
}

double combine(Fn fn, double a, double b) {
    switch (fn) {
        case Fn::add: return a + b;
        case Fn::sub: return a - b;
        case Fn::mul: return a * b;
        case Fn::div: return a / b;
        case Fn::max: return std::isnan(a) || std::isnan(b) ? kNan : std::max(a, b);
        default: return std::isnan(a) || std::isnan(b) ? kNan : std::min(a, b);
    }
}

void binary(const Shape& a, const Shape& b, const Shape& out, Fn fn, Act act, bool special) {
    Doubles x = random_values(a, 1), y = random_values(b, 2);
    if (special) {
        x[x.size() / 2] = kNan;
        y[y.size() / 3] = 0;
        x[0] = kInf;
        y[y.size() - 1] = -kInf;
    }
    Case c{"binary", Op::binary, {}, {{a, x}, {b, y}}, {}};
    c.attrs.fn = fn;
    c.attrs.act = act;
    Doubles want;
    for (int64_t i = 0; i < sec::count(out); ++i) {
        const Shape at = place(i, out);
        want.push_back(apply(act, combine(fn, read(x, a, at), read(y, b, at))));
    }
    c.name += " " + std::to_string(static_cast<int>(fn)) + " of " + std::to_string(a.size()) + " and " +
              std::to_string(b.size()) + " dimensions, " + std::to_string(sec::count(out)) + " elements";
    check(c, {{out, want}});
}

void binaries() {
    struct Shapes {
        Shape a, b, out;
    };
    const std::vector<Shapes> shapes{
        {{3, 5, 7}, {3, 5, 7}, {3, 5, 7}}, {{3, 5, 7}, {}, {3, 5, 7}}, {{1}, {3, 5, 7}, {3, 5, 7}}, {{}, {}, {}},
        {{3, 5, 7}, {7}, {3, 5, 7}}, {{5, 1, 1}, {2, 5, 3, 4}, {2, 5, 3, 4}}, {{2, 1, 7}, {1, 5, 1}, {2, 5, 7}},
        {{2, 5, 1}, {1, 1, 7}, {2, 5, 7}}, {{3, 1}, {3, 5}, {3, 5}},
        {{1, 3, 1, 5, 1, 2}, {2, 1, 4, 1, 3, 1}, {2, 3, 4, 5, 3, 2}},
        {{97, 1031}, {1031}, {97, 1031}}, {{61, 13, 7, 31}, {13, 1, 1}, {61, 13, 7, 31}},
        {{200003}, {200003}, {200003}},
        {{70001, 3}, {70001, 1}, {70001, 3}}};
    for (const Shapes& s : shapes)
        for (Fn fn : {Fn::add, Fn::sub, Fn::mul, Fn::div, Fn::max, Fn::min}) {
            if (fn == Fn::div) binary(s.a, s.b, s.out, fn, Act::none, true);     // 1 / tiny leaves no relative error
            else binary(s.a, s.b, s.out, fn, fn == Fn::add ? Act::tanh : fn == Fn::mul ? Act::relu : Act::none,
                        fn != Fn::add);
        }
}

void unary(Fn fn) {
    Doubles x;
    for (int i = 0; i < 4999; ++i) x.push_back(static_cast<double>(static_cast<float>(i * 0.004 - 10)));
    x.insert(x.end(), {kNan, 0.0, 1e-3, 30, -30, 80, -80});
    const bool bounded = fn == Fn::exp || fn == Fn::rsqrt || fn == Fn::reciprocal || fn == Fn::log || fn == Fn::sqrt ||
                         fn <= Fn::relu6 || fn == Fn::neg || fn == Fn::abs || fn == Fn::square;
    if (bounded || fn == Fn::sigmoid || fn == Fn::tanh || fn == Fn::hardsigmoid) x.insert(x.end(), {kInf, -kInf});
    const Shape shape{static_cast<int64_t>(x.size())};
    Case c{"unary " + std::to_string(static_cast<int>(fn)), Op::unary, {}, {{shape, x}}, {}};
    c.attrs.fn = fn;
    Doubles want;
    for (double v : x) want.push_back(apply(fn, v));
    const bool product = fn == Fn::gelu || fn == Fn::gelu_tanh;      // 80 times the rounding of 1 + tanh
    check(c, {{shape, want}}, product ? 1e-5 : 1e-6);
}

void affine(const Shape& shape, Act act) {
    Doubles x = random_values(shape, 3);
    x[x.size() / 2] = kNan;
    x[x.size() / 3] = kInf;
    const Doubles s = random_values(shape[1], 4), t = random_values(shape[1], 5);
    Case c{"affine", Op::affine, {}, {{shape, x}}, {{"scale", {shape[1]}, s}, {"shift", {shape[1]}, t}}};
    c.attrs.act = act;
    Doubles want;
    for (int64_t i = 0; i < sec::count(shape); ++i) {
        const auto ch = static_cast<size_t>(place(i, shape)[1]);
        want.push_back(apply(act, x[static_cast<size_t>(i)] * s[ch] + t[ch]));
    }
    check(c, {{shape, want}});
}

// The elements that share all coordinates but those of `axes` with element i, as one list for each such set.
std::map<Shape, std::vector<size_t>> sets(const Shape& shape, const std::vector<int64_t>& axes) {
    std::map<Shape, std::vector<size_t>> out;
    for (int64_t i = 0; i < sec::count(shape); ++i) {
        Shape at = place(i, shape);
        for (int64_t a : axes) at[static_cast<size_t>(a)] = 0;
        out[at].push_back(static_cast<size_t>(i));
    }
    return out;
}

void softmax(const Shape& shape, int64_t axis, bool special) {
    Doubles x = random_values(shape, 6);
    for (double& v : x) v *= 8;
    if (special) {
        x[x.size() / 2] = kNan;
        x[0] = -kInf;
        x[x.size() - 1] = kInf;
    }
    Case c{"softmax over " + std::to_string(axis), Op::softmax, {}, {{shape, x}}, {}};
    c.attrs.axis = axis;
    Doubles want(x.size());
    for (const auto& set : sets(shape, {axis})) {
        double top = -kInf, total = 0;
        for (size_t i : set.second) top = combine(Fn::max, top, x[i]);
        for (size_t i : set.second) total += std::exp(x[i] - top);
        for (size_t i : set.second) want[i] = std::exp(x[i] - top) / total;
    }
    check(c, {{shape, want}});
}

void reduce(const Shape& shape, const std::vector<int64_t>& axes, Fn fn, bool keep, bool special) {
    Doubles x = random_values(shape, 7);
    if (special) {
        x[x.size() / 2] = kNan;
        x[0] = kInf;
    }
    Case c{"reduce " + std::to_string(static_cast<int>(fn)), Op::reduce, {}, {{shape, x}}, {}};
    c.attrs.fn = fn;
    c.attrs.axes = axes;
    c.attrs.keepdims = keep;
    for (int64_t a : axes) c.name += " axis " + std::to_string(a);
    Shape out;
    for (size_t d = 0; d < shape.size(); ++d) {
        bool gone = false;
        for (int64_t a : axes) gone |= static_cast<size_t>(a) == d;
        if (!gone || keep) out.push_back(gone ? 1 : shape[d]);
    }
    Doubles want;
    for (const auto& set : sets(shape, axes)) {      // in the order of the coordinates that stay
        double total = 0, top = -kInf;
        for (size_t i : set.second) {
            total += x[i];
            top = combine(Fn::max, top, x[i]);
        }
        want.push_back(fn == Fn::max ? top : fn == Fn::sum ? total : total / static_cast<double>(set.second.size()));
    }
    check(c, {{out, want}});
}

void reduces() {
    for (Fn fn : {Fn::mean, Fn::sum, Fn::max})
        for (bool keep : {false, true})
            for (bool special : {false, true}) {
                reduce({3, 5, 7, 11}, {2, 3}, fn, keep, special);
                reduce({3, 5, 7, 11}, {1}, fn, keep, special);
                reduce({3, 5, 7, 11}, {3, 0}, fn, keep, special);
                reduce({3, 5, 7, 11}, {0, 2}, fn, keep, special);
                reduce({3, 5, 7, 11}, {1, 3}, fn, keep, special);
                reduce({3, 5, 7, 11}, {0, 1, 2, 3}, fn, keep, special);
                reduce({4, 1}, {1}, fn, keep, special);
                reduce({4, 1}, {0}, fn, keep, special);
                reduce({1, 1, 1}, {1}, fn, keep, special);
                reduce({3, 601}, {0}, fn, keep, special);
                reduce({5, 1, 601, 1}, {1, 0}, fn, keep, special);
                reduce({7, 5, 601}, {1}, fn, keep, special);
                reduce({61, 67, 71}, {1}, fn, keep, special);
                reduce({61, 67, 71}, {0, 2}, fn, keep, special);
            }
    Doubles ones(30000019, 1.0);                     // a plain float sum stops at 2^24
    Case c{"reduce long", Op::reduce, {}, {{{30000019}, ones}}, {}};
    c.attrs.fn = Fn::sum;
    c.attrs.axes = {0};
    check(c, {{{}, {30000019.0}}}, 1e-7);
}

// `set` says which elements are normalised together, `weight_at` which weight an element has.
void norm(Op op, const Shape& shape, const std::vector<int64_t>& axes, bool weighted, bool special,
          const Shape& normed, const std::function<Shape(const Shape&)>& weight_at) {
    Doubles x = random_values(shape, 8);
    for (double& v : x) v = static_cast<double>(static_cast<float>(v + 3));
    if (special) {
        x[x.size() / 2] = kNan;
        x[0] = kInf;
    }
    Shape tail{shape[1 % shape.size()]};
    if (op != Op::group_norm) tail.assign(shape.end() - static_cast<std::ptrdiff_t>(axes.size()), shape.end());
    const Doubles w = random_values(tail, 9), b = random_values(tail, 10);
    const bool rms = op == Op::rms_norm;
    Case c{std::string(sec::op_name(op)) + (weighted ? " weighted" : "") + (special ? " special" : ""), op, {},
           {{shape, x}}, {}};
    c.attrs.eps = 1e-3;
    c.attrs.trailing = static_cast<int64_t>(axes.size());
    if (op == Op::group_norm) c.attrs.groups = normed[1];
    if (weighted) c.weights.push_back({"weight", tail, w});
    if (weighted && !rms) c.weights.push_back({"bias", tail, b});
    Doubles want(x.size());
    for (const auto& set : sets(normed, axes)) {
        double mean = 0, square = 0;
        const auto n = static_cast<double>(set.second.size());
        for (size_t i : set.second) mean += rms ? 0 : x[i] / n;
        for (size_t i : set.second) square += (x[i] - mean) * (x[i] - mean) / n;
        for (size_t i : set.second) {
            const Shape at = weight_at(place(static_cast<int64_t>(i), shape));
            want[i] = (x[i] - mean) / std::sqrt(square + c.attrs.eps);
            if (weighted) want[i] = want[i] * read(w, tail, at) + (rms ? 0 : read(b, tail, at));
        }
    }
    check(c, {{shape, want}});
}

void norms() {
    for (bool weighted : {false, true})
        for (bool special : {false, true}) {
            const auto last = [](const Shape& at) { return at; };
            const auto channel = [](const Shape& at) { return Shape{at[1]}; };
            for (Op op : {Op::layer_norm, Op::rms_norm}) {
                norm(op, {3, 5, 37}, {2}, weighted, special, {3, 5, 37}, last);
                norm(op, {3, 5, 37}, {1, 2}, weighted, special, {3, 5, 37}, last);
                norm(op, {41}, {0}, weighted, special, {41}, last);
                norm(op, {211, 301}, {1}, weighted, special, {211, 301}, last);
            }
            norm(Op::group_norm, {2, 6, 5, 7}, {2}, weighted, special, {2, 3, 70}, channel);
            norm(Op::group_norm, {2, 6, 5, 7}, {2}, weighted, special, {2, 1, 210}, channel);
            norm(Op::group_norm, {3, 10}, {2}, weighted, special, {3, 5, 2}, channel);
            norm(Op::group_norm, {3, 32, 41, 43}, {2}, weighted, special, {3, 8, 4 * 41 * 43}, channel);
        }
}

}  // namespace

void elements() {
    binaries();
    for (int fn = static_cast<int>(Fn::relu); fn <= static_cast<int>(Fn::reciprocal); ++fn) unary(static_cast<Fn>(fn));
    affine({3, 5, 7, 11}, Act::relu);
    affine({3, 5}, Act::none);
    affine({2, 3, 4999}, Act::silu);
    affine({1009, 211}, Act::none);
    affine({7, 61, 29, 31}, Act::none);
}

void rows() {
    for (bool special : {false, true}) {
        softmax({3, 5, 7}, 0, special);
        softmax({3, 5, 7}, 1, special);
        softmax({3, 5, 7}, 2, special);
        softmax({1}, 0, special);
        softmax({2, 11, 131}, 1, special);
        softmax({307, 401}, 1, special);
        softmax({7, 401, 203}, 1, special);
    }
    reduces();
    norms();
}

}  // namespace test
