// The network as the file describes it: names, shapes, attributes and views of the weights. No layouts, no kernels.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "secateur.h"

namespace sec {

struct Error : std::runtime_error {
    int status;
    Error(int s, const std::string& what) : std::runtime_error(what), status(s) {}
};

using Shape = std::vector<int64_t>;

enum class Dtype { f32, i64 };

enum class Op {
    conv, linear, binary, unary, constant, affine, softmax, max_pool, avg_pool, adaptive_avg_pool, reduce, layer_norm,
    rms_norm, group_norm, matmul, attention, embedding, concat, slice, reshape, permute, expand, pad, lstm, gru
};

enum class Act { none, relu, relu6, gelu, gelu_tanh, silu, hardswish, hardsigmoid, sigmoid, tanh };
// Act values double as Fn of `unary`; the rest follow.
enum class Fn {
    none, relu, relu6, gelu, gelu_tanh, silu, hardswish, hardsigmoid, sigmoid, tanh,
    exp, log, sqrt, rsqrt, neg, abs, square, reciprocal,
    add, sub, mul, div, max, min, mean, sum
};

enum class Store { f32, f16, bf16, i8, bitmask };

// A weight as it lies in the (mapped) file. Pointers are into the file's bytes and may be unaligned.
struct Weight {
    std::string name;
    Shape shape;
    Store store = Store::f32;
    Store values = Store::f32;          // element type of `data` (for bitmask: of the stored values)
    const uint8_t* data = nullptr;      // values, in order
    const uint8_t* bits = nullptr;      // bitmask only
    const uint8_t* scale = nullptr;     // i8 only: f32 for each row of the first dimension
    int64_t numel = 0;
    int64_t nnz = 0;                    // bitmask: stored values; dense stores: entries that are not zero
};
// Decodes to row-major float32 (size numel).
std::vector<float> dense_values(const Weight& weight);

struct Attrs {
    std::array<int64_t, 2> stride{1, 1}, dilation{1, 1}, kernel{1, 1}, size{1, 1};
    std::array<int64_t, 4> pad{0, 0, 0, 0};                 // top, left, bottom, right
    std::vector<std::array<int64_t, 2>> pads;               // op pad: before, after for each axis
    int64_t groups = 1, axis = 0, heads = 1, start = 0, stop = 0, step = 1, hidden = 0, layers = 1;
    int64_t trailing = 1;                                   // layer_norm and rms_norm: how many trailing axes
    std::vector<int64_t> axes, dims, shape;
    bool keepdims = false, count_pad = false, causal = false, bidirectional = false, batch_first = false;
    double eps = 0, scale = 1, value = 0;
    Act act = Act::none;
    Fn fn = Fn::none;
};

struct Node {
    Op op;
    std::string name;
    std::vector<int> in, out;                  // value numbers
    std::map<std::string, int> weights;        // role -> index into Graph::weights
    Attrs attrs;
    const Weight* weight(const char* role, const struct Graph& graph) const;   // nullptr when absent
};

struct Value {
    std::string name;
    Dtype dtype = Dtype::f32;
};

struct Input {
    std::string name;
    Dtype dtype;
    Shape shape;                               // 0 in front = batch
    int value;
};

struct Graph {
    std::vector<Value> values;
    std::vector<Input> inputs;
    std::vector<int> outputs;
    std::vector<Weight> weights;
    std::vector<Node> nodes;
    bool batched = false;                      // some input has the batch as its first dimension
};

const char* op_name(Op op);

// Shapes of every value for one batch size; throws Error naming the node when a shape, type or attribute is wrong,
// or when one value has more than `limit` elements.
std::vector<Shape> infer(const Graph& graph, int64_t batch, int64_t limit);

// Parses and checks a plan file's bytes. Weights point into `bytes`.
Graph parse_plan(const uint8_t* bytes, size_t size);

// A file kept mapped for as long as this lives.
class Mapping {
public:
    explicit Mapping(const std::string& path);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    const uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    void forget() const;                            // its pages need not stay in memory; reading brings them back
private:
    const uint8_t* data_ = nullptr;
    size_t size_ = 0;
};

inline int64_t count(const Shape& shape) {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
}

}  // namespace sec
