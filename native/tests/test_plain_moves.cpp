// Operators that move elements: every element of the input has a value of its own.
#include "plain_harness.hpp"

namespace test {
namespace {

Doubles numbered(const Shape& shape, double from = 0) {
    Doubles out;
    for (int64_t i = 0; i < sec::count(shape); ++i) out.push_back(from + static_cast<double>(i));
    return out;
}
// The value of numbered(shape) at coordinates.
double value_at(const Shape& shape, const Shape& at) {
    int64_t i = 0;
    for (size_t d = 0; d < shape.size(); ++d) i = i * shape[d] + at[d];
    return static_cast<double>(i);
}
Doubles over(const Shape& shape, const std::function<double(const Shape&)>& f) {
    Doubles out;
    for (int64_t i = 0; i < sec::count(shape); ++i) {
        Shape at(shape.size());
        int64_t rest = i;
        for (size_t d = shape.size(); d-- > 0; rest /= shape[d]) at[d] = rest % shape[d];
        out.push_back(f(at));
    }
    return out;
}
// As floats and as token ids.
void both(Case c, const Shape& out, const Doubles& want) {
    check(c, {{out, want}}, 0);
    for (Array& a : c.in) a.dtype = Dtype::i64;
    c.out_dtype = Dtype::i64;
    for (Array& a : c.in)
        for (double& v : a.values) v = 4294967296.0 * 3 - v;     // both halves of the 8 bytes matter
    Doubles wide = want;
    for (double& v : wide) v = 4294967296.0 * 3 - v;
    check(c, {{out, wide}}, 0);
}

void permute(const Shape& shape, const std::vector<int64_t>& dims) {
    Shape out;
    for (int64_t d : dims) out.push_back(shape[static_cast<size_t>(d)]);
    Case c{"permute", Op::permute, {}, {{shape, numbered(shape)}}, {}};
    for (int64_t d : dims) c.name += " " + std::to_string(d);
    c.attrs.dims = dims;
    both(c, out, over(out, [&](const Shape& at) {
             Shape from(shape.size());
             for (size_t d = 0; d < dims.size(); ++d) from[static_cast<size_t>(dims[d])] = at[d];
             return value_at(shape, from);
         }));
}

void expand(const Shape& shape, const Shape& out) {
    Case c{"expand", Op::expand, {}, {{shape, numbered(shape)}}, {}};
    c.attrs.shape = out;
    both(c, out, over(out, [&](const Shape& at) {
             Shape from;
             for (size_t d = 0; d < shape.size(); ++d)
                 from.push_back(shape[d] == 1 ? 0 : at[out.size() - shape.size() + d]);
             return value_at(shape, from);
         }));
}

void slice(const Shape& shape, int64_t axis, int64_t start, int64_t stop, int64_t step) {
    Shape out = shape;
    const auto d = static_cast<size_t>(axis);
    out[d] = 0;
    for (int64_t i = start; i < stop; i += step) ++out[d];
    Case c{"slice of axis " + std::to_string(axis), Op::slice, {}, {{shape, numbered(shape)}}, {}};
    c.attrs.axis = axis;
    c.attrs.start = start;
    c.attrs.stop = stop;
    c.attrs.step = step;
    both(c, out, over(out, [&](Shape at) {
             at[d] = start + at[d] * step;
             return value_at(shape, at);
         }));
}

void concat(const Shape& shape, int64_t axis, const std::vector<int64_t>& sizes) {
    const auto d = static_cast<size_t>(axis);
    Case c{"concat on axis " + std::to_string(axis), Op::concat, {}, {}, {}};
    c.attrs.axis = axis;
    Shape out = shape;
    out[d] = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
        Shape part = shape;
        part[d] = sizes[i];
        out[d] += sizes[i];
        c.in.push_back({part, numbered(part, 100000.0 * static_cast<double>(i))});
    }
    both(c, out, over(out, [&](Shape at) {
             size_t i = 0;
             while (at[d] >= sizes[i]) at[d] -= sizes[i++];
             return 100000.0 * static_cast<double>(i) + value_at(c.in[i].shape, at);
         }));
}

void pad(const Shape& shape, const std::vector<std::array<int64_t, 2>>& pads, double value) {
    Shape out = shape;
    for (size_t d = 0; d < shape.size(); ++d) out[d] += pads[d][0] + pads[d][1];
    Case c{"pad", Op::pad, {}, {{shape, numbered(shape)}}, {}};
    c.attrs.pads = pads;
    c.attrs.value = value;
    check(c, {{out, over(out, [&](Shape at) {
                   for (size_t d = 0; d < shape.size(); ++d) {
                       at[d] -= pads[d][0];
                       if (at[d] < 0 || at[d] >= shape[d]) return value;
                   }
                   return value_at(shape, at);
               })}}, 0);
}

void embedding() {
    const Doubles table = random_values({13, 7}, 1);
    Case c{"words", Op::embedding, {}, {{{2, 3}, {0, 12, 5, 5, 1, 7}, Dtype::i64}}, {{"weight", {13, 7}, table}}};
    Doubles want;
    for (double id : c.in[0].values)
        for (size_t k = 0; k < 7; ++k) want.push_back(table[static_cast<size_t>(id) * 7 + k]);
    check(c, {{{2, 3, 7}, want}}, 0);
    for (double wrong : {-1.0, 13.0, 9007199254740992.0, -9007199254740992.0}) {
        c.in[0].values[4] = wrong;
        try {
            run(c);
            expect(false, "embedding takes a wrong id");
        } catch (const sec::Error& error) {
            const std::string what = error.what();
            expect(error.status == SEC_ERROR_ARGUMENT && what.find("'words'") != std::string::npos &&
                       what.find(std::to_string(static_cast<int64_t>(wrong))) != std::string::npos &&
                       what.find("0 .. 12") != std::string::npos,
                   "embedding names node, id and range: " + what);
        }
    }
}

}  // namespace

void moves() {
    permute({3, 5, 7}, {0, 1, 2});
    permute({3, 5, 7}, {0, 2, 1});
    permute({3, 5, 7}, {2, 1, 0});
    permute({3, 5, 7}, {1, 2, 0});
    permute({3, 5, 7}, {1, 0, 2});
    permute({2, 3, 1, 5, 7}, {4, 2, 0, 3, 1});
    permute({2, 17, 3, 19}, {0, 2, 1, 3});
    permute({2, 17, 3, 19}, {0, 2, 3, 1});
    permute({2, 17, 3, 19}, {3, 0, 2, 1});
    permute({1, 1}, {1, 0});
    permute({1, 5, 1}, {2, 0, 1});
    permute({}, {});
    permute({331, 337}, {1, 0});
    permute({2, 3, 2, 3, 2, 3, 2, 3}, {7, 0, 6, 1, 5, 2, 4, 3});
    expand({3, 1, 7}, {3, 5, 7});
    expand({1}, {11});
    expand({}, {2, 3});
    expand({5, 1}, {2, 3, 5, 4});
    expand({2, 1, 3, 1}, {2, 5, 3, 7});
    expand({3}, {3});
    expand({1, 1031}, {211, 1031});
    slice({3, 5, 7}, 0, 1, 3, 1);
    slice({3, 5, 7}, 1, 0, 5, 2);
    slice({3, 5, 7}, 2, 1, 7, 3);
    slice({3, 5, 7}, 2, 2, 5, 1);
    slice({3, 5, 7}, 1, 4, 5, 9);
    slice({701, 3, 211}, 1, 1, 3, 1);
    concat({3, 0, 7}, 1, {2, 5, 1});
    concat({0}, 0, {2, 5, 1});
    concat({3, 5, 0}, 2, {4});
    concat({0, 5, 3}, 0, {1, 2});
    concat({211, 0, 97}, 1, {3, 4});
    pad({3, 5, 7}, {{{0, 0}}, {{1, 2}}, {{3, 0}}}, 0.5);
    pad({3, 5, 7}, {{{2, 1}}, {{0, 0}}, {{0, 0}}}, -1);
    pad({4}, {{{3, 2}}}, 9);
    pad({}, {}, 9);
    pad({1, 61, 67}, {{{1, 1}}, {{11, 1}}, {{5, 6}}}, 0);
    for (const Shape& out : {Shape{15, 7}, Shape{105}, Shape{1, 3, -1, 5}}) {
        Case c{"reshape", Op::reshape, {}, {{{3, 5, 7}, numbered({3, 5, 7})}}, {}};
        c.attrs.shape = out;
        Shape full = out;
        for (int64_t& d : full) d = d < 0 ? 7 : d;
        both(c, full, numbered({3, 5, 7}));
    }
    embedding();
}

}  // namespace test
