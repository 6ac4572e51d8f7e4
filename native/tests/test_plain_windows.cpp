// conv and the pools.
#include "plain_harness.hpp"

namespace test {
namespace {

struct Geometry {
    Shape x;
    int64_t kh, kw;
    std::array<int64_t, 2> stride{1, 1};
    std::array<int64_t, 4> pad{0, 0, 0, 0};
    std::array<int64_t, 2> dilation{1, 1};
    int64_t high() const { return (x[2] + pad[0] + pad[2] - (kh - 1) * dilation[0] - 1) / stride[0] + 1; }
    int64_t wide() const { return (x[3] + pad[1] + pad[3] - (kw - 1) * dilation[1] - 1) / stride[1] + 1; }
};

// f(value, or nothing when the tap lies in the padding) for all taps of one window.
template <class F> void window(const Geometry& g, const Doubles& x, int64_t n, int64_t c, int64_t oy, int64_t ox, F f) {
    for (int64_t ky = 0; ky < g.kh; ++ky)
        for (int64_t kx = 0; kx < g.kw; ++kx) {
            const int64_t y = oy * g.stride[0] - g.pad[0] + ky * g.dilation[0];
            const int64_t z = ox * g.stride[1] - g.pad[1] + kx * g.dilation[1];
            const bool inside = y >= 0 && y < g.x[2] && z >= 0 && z < g.x[3];
            f(ky, kx, inside ? &x[static_cast<size_t>(((n * g.x[1] + c) * g.x[2] + y) * g.x[3] + z)] : nullptr);
        }
}
template <class F> Doubles over_outputs(const Geometry& g, int64_t channels, F f) {
    Doubles out;
    for (int64_t n = 0; n < g.x[0]; ++n)
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t y = 0; y < g.high(); ++y)
                for (int64_t z = 0; z < g.wide(); ++z) out.push_back(f(n, c, y, z));
    return out;
}
sec::Attrs attributes(const Geometry& g) {
    sec::Attrs a;
    a.kernel = {g.kh, g.kw};
    a.stride = g.stride;
    a.pad = g.pad;
    a.dilation = g.dilation;
    return a;
}

struct ConvCase {
    const char* name;
    Geometry g;
    int64_t out, groups = 1;
    double density = 1;
    bool bias = true, residual = false;
    Act act = Act::none;
};

// `special` are values put into the input.
void conv(const ConvCase& k, const std::map<size_t, double>& special = {}) {
    const Geometry& g = k.g;
    const int64_t reads = g.x[1] / k.groups, per_group = k.out / k.groups;
    Doubles x = random_values(g.x, 1);
    for (const auto& s : special) x[s.first] = s.second;
    const Doubles w = random_values(k.out * reads * g.kh * g.kw, 2, k.density), b = random_values(k.out, 3);
    const Shape out{g.x[0], k.out, g.high(), g.wide()};
    const Doubles r = random_values(out, 4);
    Case c{std::string("conv ") + k.name, Op::conv, attributes(g), {{g.x, x}}, {}};
    c.weights.push_back({"weight", {k.out, reads, g.kh, g.kw}, w});
    c.attrs.groups = k.groups;
    c.attrs.act = k.act;
    if (k.bias) c.weights.push_back({"bias", {k.out}, b});
    if (k.residual) c.in.push_back({out, r});
    size_t at = 0;
    const Doubles want = over_outputs(g, k.out, [&](int64_t n, int64_t o, int64_t y, int64_t z) {
        double total = k.bias ? b[static_cast<size_t>(o)] : 0;
        for (int64_t i = 0; i < reads; ++i)
            window(g, x, n, o / per_group * reads + i, y, z, [&](int64_t ky, int64_t kx, const double* v) {
                if (v) total += *v * w[static_cast<size_t>(((o * reads + i) * g.kh + ky) * g.kw + kx)];
            });
        if (k.residual) total += r[at];
        ++at;
        return apply(k.act, total);
    });
    check(c, {{out, want}});
}

void convs() {
    conv({"3x3", {{2, 5, 13, 11}, 3, 3, {1, 1}, {1, 1, 1, 1}}, 7});
    conv({"one pixel", {{1, 1, 1, 1}, 1, 1}, 1});
    conv({"uneven padding", {{1, 3, 7, 17}, 3, 5, {1, 2}, {0, 1, 2, 3}}, 11, 1, 1, false});
    conv({"stride 2", {{3, 4, 15, 13}, 3, 3, {2, 2}, {1, 1, 1, 1}}, 9, 1, 1, true, true, Act::relu});
    conv({"stride beyond kernel", {{1, 3, 19, 23}, 1, 2, {3, 5}, {0, 0, 0, 0}}, 5});
    conv({"stride 3, dilation 2", {{1, 3, 29, 31}, 4, 3, {3, 2}, {2, 3, 2, 3}, {2, 3}}, 5});
    conv({"patches", {{1, 3, 32, 48}, 16, 16, {16, 16}}, 13});
    conv({"far taps", {{1, 2, 3, 41}, 1, 3, {1, 1}, {0, 0, 0, 0}, {1, 17}}, 5, 1, 1, true, false, Act::silu});
    conv({"dilation", {{1, 6, 17, 19}, 3, 3, {1, 1}, {4, 4, 4, 4}, {4, 4}}, 5});
    conv({"one dimension", {{2, 3, 1, 103}, 1, 7, {1, 2}, {0, 3, 0, 3}}, 17});
    conv({"groups", {{2, 6, 11, 7}, 3, 3, {1, 1}, {1, 1, 1, 1}}, 10, 2, 1, true, true, Act::hardswish});
    conv({"wide groups", {{1, 9, 5, 7}, 3, 2, {2, 1}, {1, 1, 1, 0}}, 15, 3, 1, false, true, Act::gelu});
    conv({"depthwise", {{2, 13, 9, 10}, 5, 5, {1, 1}, {2, 2, 2, 2}}, 13, 13, 1, true, false, Act::relu6});
    conv({"depthwise x2, stride", {{1, 7, 9, 10}, 3, 3, {2, 2}, {1, 1, 1, 1}}, 14, 7});
    conv({"sparse", {{2, 11, 13, 17}, 3, 3, {1, 1}, {1, 1, 1, 1}}, 19, 1, 0.1, true, true, Act::relu});
    conv({"sparse, stride", {{1, 11, 13, 17}, 3, 3, {2, 2}, {1, 1, 1, 1}}, 19, 1, 0.3});
    conv({"all zero", {{1, 2, 5, 5}, 3, 3, {1, 1}, {1, 1, 1, 1}}, 3, 1, 0});
    conv({"1x1", {{1, 31, 7, 9}, 1, 1}, 37, 1, 1, true, true, Act::sigmoid});
    conv({"bands", {{2, 32, 67, 61}, 3, 3, {1, 1}, {1, 1, 1, 1}}, 18});
    conv({"bands, sparse, stride", {{1, 32, 131, 61}, 3, 3, {2, 2}, {1, 1, 1, 1}}, 18, 2, 0.2, true, true});
    conv({"channel parts", {{1, 64, 7, 7}, 3, 3, {1, 1}, {1, 1, 1, 1}}, 67});
    conv({"NaN and inf", {{2, 3, 9, 9}, 3, 3, {1, 1}, {1, 1, 1, 1}}, 6, 1, 1, true, false, Act::relu},
         {{17, kNan}, {100, kInf}, {300, -kInf}, {400, kNan}});
    conv({"NaN, depthwise", {{1, 3, 9, 9}, 3, 3, {2, 2}, {1, 1, 1, 1}}, 3, 3, 1, true, false, Act::none},
         {{17, kNan}, {100, kInf}});
    Case parts{"conv parts", Op::conv, attributes({{1, 64, 7, 7}, 3, 3}), {{{1, 64, 7, 7}, random_values(3136, 1)}},
               {{"weight", {64, 64, 3, 3}, random_values(64 * 64 * 9, 2)}}};
    expect(run(parts).parts > 1, "one small map is worth several parts");
}

void pool(const std::string& name, const Geometry& g, bool maximum, bool count_pad, Doubles x) {
    Case c{name, maximum ? Op::max_pool : Op::avg_pool, attributes(g), {{g.x, x}}, {}};
    c.attrs.count_pad = count_pad;
    const Doubles want = over_outputs(g, g.x[1], [&](int64_t n, int64_t ch, int64_t y, int64_t z) {
        double top = -kInf, total = 0;
        int64_t counted = 0;
        bool nan = false;
        window(g, x, n, ch, y, z, [&](int64_t, int64_t, const double* v) {
            counted += v || count_pad;
            if (!v) return;
            nan |= std::isnan(*v);
            top = std::max(top, *v);
            total += *v;
        });
        if (maximum) return nan ? kNan : top;
        return total / static_cast<double>(counted);
    });
    check(c, {{{g.x[0], g.x[1], g.high(), g.wide()}, want}});
}

void pools() {
    const std::vector<Geometry> shapes{
        {{2, 3, 11, 13}, 3, 3, {2, 2}, {1, 1, 1, 1}}, {{1, 2, 7, 7}, 7, 7}, {{2, 2, 1, 37}, 1, 5, {1, 3}, {0, 2, 0, 1}},
        {{1, 5, 9, 6}, 2, 3, {2, 1}, {0, 2, 1, 0}},   {{1, 1, 1, 1}, 1, 1}, {{1, 1, 3, 2}, 2, 2, {1, 1}, {3, 3, 3, 3}},
        {{2, 64, 31, 33}, 3, 3, {1, 1}, {1, 1, 1, 1}}, {{1, 2, 5, 67}, 3, 41, {1, 5}, {1, 20, 1, 20}}};
    for (size_t i = 0; i < shapes.size(); ++i) {
        const Geometry& g = shapes[i];
        Doubles x = random_values(g.x, 5);
        const std::string tail = " " + std::to_string(i);
        pool("max_pool" + tail, g, true, false, x);
        pool("avg_pool" + tail, g, false, false, x);
        pool("avg_pool counting" + tail, g, false, true, x);
        x[x.size() / 2] = kNan;
        x[0] = -kInf;
        if (x.size() > 3) x[3] = kInf;
        pool("max_pool NaN" + tail, g, true, false, x);
        pool("avg_pool NaN" + tail, g, false, false, x);
    }
    Geometry dilated{{1, 3, 11, 13}, 3, 3, {1, 2}, {1, 2, 1, 2}, {3, 2}};
    pool("max_pool dilated", dilated, true, false, random_values(dilated.x, 6));
}

void adaptive(Shape shape, std::array<int64_t, 2> size) {
    const Doubles x = random_values(shape, 7);
    Case c{"adaptive", Op::adaptive_avg_pool, {}, {{shape, x}}, {}};
    c.attrs.size = size;
    Doubles want;
    for (int64_t plane = 0; plane < shape[0] * shape[1]; ++plane)
        for (int64_t i = 0; i < size[0]; ++i)
            for (int64_t j = 0; j < size[1]; ++j) {
                double total = 0, n = 0;
                for (int64_t y = 0; y < shape[2]; ++y)
                    for (int64_t z = 0; z < shape[3]; ++z) {       // entry e lies in window i: e < (i+1)s/o, e+1 > is/o
                        const bool row = y * size[0] < (i + 1) * shape[2] && (y + 1) * size[0] > i * shape[2];
                        const bool col = z * size[1] < (j + 1) * shape[3] && (z + 1) * size[1] > j * shape[3];
                        if (!row || !col) continue;
                        total += x[static_cast<size_t>((plane * shape[2] + y) * shape[3] + z)];
                        n += 1;
                    }
                want.push_back(total / n);
            }
    check(c, {{{shape[0], shape[1], size[0], size[1]}, want}});
}

}  // namespace

void windows() {
    convs();
    pools();
    adaptive({2, 3, 7, 7}, {1, 1});
    adaptive({1, 2, 7, 11}, {3, 4});
    adaptive({1, 2, 3, 2}, {5, 7});
    adaptive({4, 32, 37, 33}, {6, 6});
}

}  // namespace test
