// A network planned for one batch size: steps, buffers, constants.
#pragma once
#include <map>

#include "step.hpp"

namespace sec {

struct Tuning {                                    // choices that override the rules; from the session's options
    int64_t strips = 0;
    int64_t vectors_per_row = 0;
    int64_t piece = 0;
    std::map<std::string, ProductChoice> layers;
};

struct Prepared {
    int64_t batch = 0;
    std::vector<Shape> shapes;
    std::vector<std::unique_ptr<Step>> steps;
    std::vector<std::vector<float>> constants;
    std::vector<Arena> arenas;                     // one, or one for each thread that runs pieces of its own
    Block memory, scratch;
    std::vector<int> input_buffers, output_buffers;
    Spread spread;
    size_t bytes = 0;                              // activations, scratch and packed weights
};

std::unique_ptr<Prepared> prepare(const Graph& graph, int64_t batch, const Machine& machine, const Tuning& tuning,
                                  int64_t memory_limit, int arenas = 1, const Mapping* file = nullptr);

// How many examples of a batch to run together; the batch itself where it cannot or need not be cut.
int64_t piece_of(const Graph& graph, int64_t batch);

// Which layout each value takes, decided before any step exists.
enum class Slot { plain, image, tokens, single };  // single: a 1x1 map, replicated over strips

struct Layouts {
    std::vector<Slot> slot;
    std::vector<int> root;                         // image values: where their chain of maps begins
    std::vector<int64_t> scale;                    // and by how much its rows have shrunk since
    std::vector<int64_t> rows;                     // rows of a strip
    std::vector<Reach> reach;
    Spread spread;
};
Layouts choose_layouts(const Graph& graph, const std::vector<Shape>& shapes, int lanes, int64_t strips);

// The window of a convolution or pool.
struct Window {
    std::array<int64_t, 2> kernel, stride, dilation;
    std::array<int64_t, 4> pad;
};
Window window_of(const Node& node, const Graph& graph, const std::vector<Shape>& shapes);

// Where binary's second operand comes from, when the first is in lanes.
enum class Operand { none, same, channel, scalar, single };
struct BinaryPlan {
    Slot slot = Slot::plain;
    int lane = 0;                                  // which of the two inputs is the lane tensor
    Operand other = Operand::none;
};
BinaryPlan plan_binary(const Graph& graph, const Node& node, const std::vector<Shape>& shapes,
                       const std::vector<Slot>& slot);
const Weight* constant_of(const Graph& graph, int value);
bool token_view(const Shape& from, const Shape& to, int lanes);
bool pool_fits(const Node& node, const Shape& in, const Shape& out);

}  // namespace sec
