// Every plain operator against loops in double precision, on each instruction set that this machine has.
#include "../src/isa.hpp"
#include "plain_harness.hpp"

#include <algorithm>
#include <memory>
#include <new>
#include <thread>

namespace test {

const sec::Kernels* kernels = nullptr;
int failures = 0, checks = 0;

namespace {

// Bytes on both sides of every buffer that must stay as they are. The address sanitizer guards reads too, so its
// buffers end where the operator's memory ends.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 64;
#endif
constexpr std::align_val_t kAlign{64};
constexpr unsigned char kMark = 0xA5;

class Buffer {
public:
    explicit Buffer(size_t size)
        : size_(size), bytes_(static_cast<unsigned char*>(operator new(size + 2 * kGuard, kAlign))) {
        std::memset(bytes_.get(), kMark, size + 2 * kGuard);
        std::memset(data(), 0xFF, size);     // NaN as floats
    }
    void* data() { return bytes_.get() + kGuard; }
    bool intact() const {
        for (size_t i = 0; i < kGuard; ++i)
            if (bytes_[i] != kMark || bytes_[kGuard + size_ + i] != kMark) return false;
        return true;
    }

private:
    struct Free {
        void operator()(unsigned char* p) const { operator delete(p, kAlign); }
    };
    size_t size_;
    std::unique_ptr<unsigned char[], Free> bytes_;
};

size_t width(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 8; }

void put(Buffer& to, const Array& from) {
    for (size_t i = 0; i < from.values.size(); ++i) {
        if (from.dtype == Dtype::f32) static_cast<float*>(to.data())[i] = static_cast<float>(from.values[i]);
        else static_cast<int64_t*>(to.data())[i] = static_cast<int64_t>(from.values[i]);
    }
}
Doubles take(Buffer& from, Dtype dtype, int64_t n) {
    Doubles out(static_cast<size_t>(n));
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = dtype == Dtype::f32 ? static_cast<double>(static_cast<float*>(from.data())[i])
                                     : static_cast<double>(static_cast<int64_t*>(from.data())[i]);
    return out;
}

struct Network {
    sec::Graph graph;
    std::vector<std::vector<float>> storage;
};

// A graph of one node; its weights point into `storage`.
Network network(const Case& c) {
    Network net;
    sec::Node node;
    node.op = c.op;
    node.name = c.name;
    node.attrs = c.attrs;
    for (const Array& a : c.in) {
        node.in.push_back(static_cast<int>(net.graph.values.size()));
        net.graph.inputs.push_back({"in", a.dtype, a.shape, node.in.back()});
        net.graph.values.push_back({"in", a.dtype});
    }
    for (int i = 0; i < (c.op == Op::lstm ? 3 : c.op == Op::gru ? 2 : 1); ++i) {
        node.out.push_back(static_cast<int>(net.graph.values.size()));
        net.graph.values.push_back({"out", c.out_dtype});
    }
    for (const WeightArray& w : c.weights) {
        net.storage.emplace_back(w.values.begin(), w.values.end());
        sec::Weight weight;
        weight.name = w.role;
        weight.shape = w.shape;
        weight.data = reinterpret_cast<const uint8_t*>(net.storage.back().data());
        weight.numel = sec::count(w.shape);
        weight.nnz = weight.numel - std::count(w.values.begin(), w.values.end(), 0.0);
        node.weights[w.role] = static_cast<int>(net.graph.weights.size());
        net.graph.weights.push_back(weight);
    }
    net.graph.nodes.push_back(node);
    return net;
}

// Odd parts on a thread of their own; whether all scratch was left in order.
bool run_parts(const sec::PlainOp& op, const std::vector<const void*>& in, const std::vector<void*>& out) {
    bool intact[2] = {true, true};
    const auto every_other = [&](int64_t rest) {
        for (int64_t part = op.parts(); part-- > 0;) {
            if (part % 2 != rest) continue;
            Buffer scratch(op.scratch_bytes());
            op.run(in.data(), out.data(), scratch.data(), part);
            intact[rest] = intact[rest] && scratch.intact();
        }
    };
    if (op.parts() == 1) {
        every_other(0);
        return intact[0];
    }
    std::thread odd(every_other, 1);
    every_other(0);
    odd.join();
    return intact[0] && intact[1];
}

bool close(double got, double want, double tolerance) {
    if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
    if (std::isinf(want) || std::isinf(got)) return want == got;
    return std::fabs(got - want) <= tolerance * std::max(1.0, std::fabs(want));
}

}  // namespace

Ran run(const Case& c) {
    const Network net = network(c);
    const std::vector<Shape> shapes = sec::infer(net.graph, 1, int64_t{1} << 40);
    const sec::Node& node = net.graph.nodes[0];
    Ran ran;
    std::vector<Shape> in_shapes;
    std::vector<Buffer> in, out;
    std::vector<const void*> in_data;
    std::vector<void*> out_data;
    for (const Array& a : c.in) {
        in_shapes.push_back(a.shape);
        in.emplace_back(a.values.size() * width(a.dtype));
        put(in.back(), a);
    }
    for (int v : node.out) {
        ran.shapes.push_back(shapes[static_cast<size_t>(v)]);
        out.emplace_back(static_cast<size_t>(sec::count(ran.shapes.back())) * width(c.out_dtype));
    }
    for (Buffer& b : in) in_data.push_back(b.data());
    for (Buffer& b : out) out_data.push_back(b.data());
    const std::unique_ptr<sec::PlainOp> op = sec::make_plain(node, net.graph, in_shapes, ran.shapes, *kernels);
    ran.parts = op->parts();
    expect(ran.parts >= 1 && op->work() > 0, c.name + ": parts and work");
    expect(run_parts(*op, in_data, out_data), c.name + ": stays in its scratch");
    for (size_t i = 0; i < in.size(); ++i) {
        Buffer before(c.in[i].values.size() * width(c.in[i].dtype));
        put(before, c.in[i]);
        expect(in[i].intact() && (c.in[i].values.empty() || !std::memcmp(before.data(), in[i].data(),
                                                     c.in[i].values.size() * width(c.in[i].dtype))),
               c.name + ": leaves its inputs");
    }
    for (size_t i = 0; i < out.size(); ++i) {
        expect(out[i].intact(), c.name + ": stays in its outputs");
        ran.out.push_back(take(out[i], c.out_dtype, sec::count(ran.shapes[i])));
    }
    return ran;
}

void expect(bool truth, const std::string& what) {
    ++checks;
    if (truth) return;
    ++failures;
    std::printf("FAILED [%s] %s\n", kernels->name, what.c_str());
}

void check(const Case& c, const std::vector<Array>& want, double tolerance) {
    Ran ran;
    try {
        ran = run(c);
    } catch (const sec::Error& error) {
        return expect(false, c.name + ": " + error.what());
    }
    for (size_t i = 0; i < want.size(); ++i) {
        expect(ran.shapes[i] == want[i].shape, c.name + ": shape");
        if (ran.out[i].size() != want[i].values.size()) return expect(false, c.name + ": size");
        for (size_t k = 0; k < want[i].values.size(); ++k) {
            if (close(ran.out[i][k], want[i].values[k], tolerance)) continue;
            return expect(false, c.name + ": output " + std::to_string(i) + " at " + std::to_string(k) + " is " +
                                     std::to_string(ran.out[i][k]) + ", not " + std::to_string(want[i].values[k]));
        }
        ++checks;
    }
}

double apply(Fn fn, double x) {
    const auto relu6 = [](double v) { return v != v ? v : std::min(std::max(v, 0.0), 6.0); };
    switch (fn) {
        case Fn::none: return x;
        case Fn::relu: return x < 0 ? 0 : x;
        case Fn::relu6: return relu6(x);
        case Fn::gelu: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
        case Fn::gelu_tanh:
            return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
        case Fn::silu: return x / (1 + std::exp(-x));
        case Fn::hardswish: return x * relu6(x + 3) / 6;
        case Fn::hardsigmoid: return relu6(x + 3) / 6;
        case Fn::sigmoid: return 1 / (1 + std::exp(-x));
        case Fn::tanh: return std::tanh(x);
        case Fn::exp: return std::exp(x);
        case Fn::log: return std::log(x);
        case Fn::sqrt: return std::sqrt(x);
        case Fn::rsqrt: return 1 / std::sqrt(x);
        case Fn::neg: return -x;
        case Fn::abs: return std::fabs(x);
        case Fn::square: return x * x;
        case Fn::reciprocal: return 1 / x;
        default: std::abort();
    }
}

}  // namespace test

int main() {
    for (const sec::Kernels* table : sec::machine_kernels()) {
        test::kernels = table;
        test::windows();
        test::elements();
        test::rows();
        test::products();
        test::moves();
        test::recurrent();
        std::printf("%s: %d checks, %d failures\n", table->name, test::checks, test::failures);
    }
    return test::failures ? 1 : 0;
}
