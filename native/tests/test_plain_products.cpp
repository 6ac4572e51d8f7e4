// linear, matmul, attention.
#include "plain_harness.hpp"

namespace test {
namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

struct LinearCase {
    const char* name;
    Shape x;
    int64_t out;
    double density = 1;
    bool bias = true, residual = false;
    Act act = Act::none;
    bool special = false;
};

void linear(const LinearCase& k) {
    const int64_t cols = k.x.back(), count = sec::count(k.x) / cols;
    Shape out = k.x;
    out.back() = k.out;
    Doubles x = random_values(k.x, 1);
    const Doubles w = random_values(k.out * cols, 2, k.density), b = random_values(k.out, 3), r = random_values(out, 4);
    if (k.special) {
        x[at(cols / 2)] = kNan;
        x[x.size() - 1] = kInf;
    }
    Case c{std::string("linear ") + k.name, Op::linear, {}, {{k.x, x}}, {{"weight", {k.out, cols}, w}}};
    c.attrs.act = k.act;
    if (k.bias) c.weights.push_back({"bias", {k.out}, b});
    if (k.residual) c.in.push_back({out, r});
    Doubles want;
    for (int64_t m = 0; m < count; ++m)
        for (int64_t o = 0; o < k.out; ++o) {
            double total = (k.bias ? b[at(o)] : 0) + (k.residual ? r[want.size()] : 0);
            for (int64_t i = 0; i < cols; ++i) total += w[at(o * cols + i)] * x[at(m * cols + i)];
            want.push_back(apply(k.act, total));
        }
    check(c, {{out, want}}, 1e-4);
}

void linears() {
    linear({"one by one", {1, 1}, 1});
    linear({"vector", {131}, 17, 1, false});
    linear({"rows", {2, 7, 131}, 29, 1, true, true, Act::gelu});
    linear({"sparse rows", {2, 7, 131}, 29, 0.3, true, true, Act::silu});
    linear({"sparse", {1, 1031}, 509, 0.1, true, false, Act::relu});
    linear({"dense", {1, 1031}, 509, 1, true, false, Act::relu});
    linear({"all zero", {3, 31}, 11, 0});
    linear({"mostly set", {5, 83}, 13, 0.7});
    linear({"many rows, few outputs", {4001, 67}, 3, 1, false, true});
    linear({"many rows, sparse", {211, 307}, 101, 0.2, true, true, Act::hardsigmoid});
    linear({"too wide for 16 bits", {2, 70001}, 5, 0.05});
    linear({"as wide as 16 bits", {1, 65536}, 3, 0.05});
    linear({"NaN", {3, 131}, 17, 1, true, false, Act::relu, true});
    Case one{"linear parts", Op::linear, {}, {{{1, 1024}, random_values(1024, 1)}},
             {{"weight", {1024, 1024}, random_values(1024 * 1024, 2, 0.1)}}};
    const Ran sparse = run(one);
    one.weights[0].values = random_values(1024 * 1024, 2);
    expect(sparse.parts > 2 && run(one).parts > sparse.parts, "one token is worth parts, by what is stored");
}

void matmul(const Shape& a, const Shape& b, const Shape& out, bool special) {
    Doubles x = random_values(a, 5);
    const Doubles y = random_values(b, 6);
    if (special) {
        x[x.size() / 2] = kNan;
        x[0] = -kInf;
    }
    const int64_t m = a[a.size() - 2], k = a.back(), n = b.back();
    // Which matrix a batch index of the output reads.
    const auto matrix = [&](int64_t index, const Shape& shape) {
        int64_t where = 0, step = 1;
        for (size_t d = out.size() - 2; d-- > 0; index /= out[d]) {
            if (d + shape.size() < out.size()) break;
            const int64_t dim = shape[d + shape.size() - out.size()];
            where += (dim == 1 ? 0 : index % out[d]) * step;
            step *= dim;
        }
        return where;
    };
    Doubles want;
    for (int64_t batch = 0; batch < sec::count(out) / (m * n); ++batch)
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < n; ++j) {
                double total = 0;
                for (int64_t l = 0; l < k; ++l)
                    total += x[at((matrix(batch, a) * m + i) * k + l)] * y[at((matrix(batch, b) * k + l) * n + j)];
                want.push_back(total);
            }
    check({"matmul " + std::to_string(m) + " x " + std::to_string(k) + " x " + std::to_string(n), Op::matmul, {},
           {{a, x}, {b, y}}, {}},
          {{out, want}}, 1e-4);
}

struct AttentionCase {
    int64_t images, queries, keys, heads, dim, dim_v;
    Shape mask;
    bool masked = false, causal = false, special = false;
};

void attention(const AttentionCase& k) {
    const int64_t e = k.heads * k.dim, ev = k.heads * k.dim_v;
    const Shape qs{k.images, k.queries, e}, ks{k.images, k.keys, e}, vs{k.images, k.keys, ev};
    Doubles q = random_values(qs, 7), mask = random_values(k.mask, 10);
    const Doubles kk = random_values(ks, 8), v = random_values(vs, 9);
    if (k.special) q[q.size() / 2] = kNan;
    if (k.masked && k.special) mask[0] = -kInf;
    Case c{"attention " + std::to_string(k.queries) + " x " + std::to_string(k.keys), Op::attention, {},
           {{qs, q}, {ks, kk}, {vs, v}}, {}};
    if (k.masked) c.in.push_back({k.mask, mask});
    c.attrs.heads = k.heads;
    c.attrs.scale = 0.3;
    c.attrs.causal = k.causal;
    const auto added = [&](std::array<int64_t, 4> index) {
        int64_t i = 0;
        for (size_t d = 0; d < k.mask.size(); ++d)
            i = i * k.mask[d] + (k.mask[d] == 1 ? 0 : index[4 - k.mask.size() + d]);
        return mask[at(i)];
    };
    Doubles want(at(k.images * k.queries * ev));
    for (int64_t n = 0; n < k.images; ++n)
        for (int64_t h = 0; h < k.heads; ++h)
            for (int64_t t = 0; t < k.queries; ++t) {
                Doubles weight;
                double total = 0;
                for (int64_t s = 0; s < k.keys; ++s) {
                    double score = 0;
                    for (int64_t d = h * k.dim; d < (h + 1) * k.dim; ++d)
                        score += q[at((n * k.queries + t) * e + d)] * kk[at((n * k.keys + s) * e + d)];
                    score = score * 0.3 + (k.masked ? added({n, h, t, s}) : 0);
                    weight.push_back(k.causal && s > t ? 0 : std::exp(score));
                    total += weight.back();
                }
                if (total == 0) total = 1;           // no key is open
                for (int64_t d = 0; d < k.dim_v; ++d) {
                    double out = 0;
                    for (int64_t s = 0; s < k.keys; ++s)
                        out += weight[at(s)] / total * v[at((n * k.keys + s) * ev + h * k.dim_v + d)];
                    want[at((n * k.queries + t) * ev + h * k.dim_v + d)] = out;
                }
            }
    check(c, {{{k.images, k.queries, ev}, want}});
}

}  // namespace

void products() {
    linears();
    for (bool special : {false, true}) {
        matmul({7, 5}, {5, 11}, {7, 11}, special);
        matmul({1, 1}, {1, 1}, {1, 1}, special);
        matmul({1, 37}, {37, 19}, {1, 19}, special);
        matmul({19, 37}, {37, 1}, {19, 1}, special);
        matmul({2, 3, 7, 5}, {2, 3, 5, 4}, {2, 3, 7, 4}, special);
        matmul({2, 1, 7, 5}, {3, 5, 4}, {2, 3, 7, 4}, special);
        matmul({7, 5}, {3, 2, 5, 4}, {3, 2, 7, 4}, special);
        matmul({3, 2, 7, 5}, {5, 1}, {3, 2, 7, 1}, special);
        matmul({3, 1, 7, 5}, {1, 2, 5, 9}, {3, 2, 7, 9}, special);
        matmul({131, 523}, {523, 139}, {131, 139}, special);
        matmul({2, 257, 67}, {67, 65}, {2, 257, 65}, special);
        attention({1, 1, 1, 1, 1, 1, {}, false, false, special});
        attention({2, 7, 11, 3, 5, 4, {}, false, false, special});
        attention({2, 7, 7, 2, 8, 8, {}, false, true, special});
        attention({1, 5, 9, 2, 3, 7, {}, false, true, special});
        attention({1, 9, 5, 2, 3, 7, {}, false, true, special});
        attention({2, 7, 11, 3, 5, 4, {7, 11}, true, false, special});
        attention({2, 7, 11, 3, 5, 4, {2, 1, 1, 11}, true, false, special});
        attention({2, 7, 11, 3, 5, 4, {3, 7, 1}, true, true, special});
        attention({2, 7, 11, 3, 5, 4, {2, 3, 7, 11}, true, true, special});
        attention({1, 1, 37, 2, 16, 16, {}, true, false, special});
        attention({2, 67, 71, 4, 17, 19, {}, false, true, special});
    }
}

}  // namespace test
