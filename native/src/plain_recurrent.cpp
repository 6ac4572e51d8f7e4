// lstm and gru. The input's share of all gates is computed for all steps first; a step then adds the state's share.
#include <cstring>

#include "plain_base.hpp"
#include "plain_linear.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

constexpr int64_t kItems = 8;            // sequences that step together, so that they share the weights in the cache

// [item][step][feature], with any distance between items and steps.
struct Sequence {
    float* base;
    int64_t item, step;
};

struct Cell {
    Projection input, state;
    std::vector<float> input_bias, state_bias;
};

// One unit is up to kItems sequences, from the first layer to the last.
class Recurrent final : public RangeOp {
public:
    explicit Recurrent(const Make& make)
        : RangeOp(1, 1), kernels_(make.kernels), lstm_(make.node.op == Op::lstm), hidden_(make.attrs().hidden),
          layers_(make.attrs().layers), dirs_(make.attrs().bidirectional ? 2 : 1),
          time_first_(!make.attrs().batch_first), features_(make.in[0][2]), states_in_(make.in.size() - 1) {
        items_ = make.in[0][time_first_ ? 1 : 0];
        steps_ = make.in[0][time_first_ ? 0 : 1];
        gates_ = (lstm_ ? 4 : 3) * hidden_;
        double work = 0;
        for (int64_t layer = 0; layer < layers_; ++layer)
            for (int64_t dir = 0; dir < dirs_; ++dir) {
                const std::string tail = "." + std::to_string(layer) + "." + std::to_string(dir);
                const int64_t reads = layer == 0 ? features_ : dirs_ * hidden_;
                cells_.push_back({{make.weight("w_ih" + tail), gates_, reads, kernels_},
                                  {make.weight("w_hh" + tail), gates_, hidden_, kernels_},
                                  make.weight("b_ih" + tail), make.weight("b_hh" + tail)});
                work += static_cast<double>(cells_.back().input.stored() + cells_.back().state.stored() + 8 * gates_);
            }
        together_ = std::min(kItems, items_);
        set_work(ceil_div(items_, together_), work * static_cast<double>(items_ * steps_));
    }
    size_t scratch_bytes() const override {
        const int64_t floats = between() * std::min<int64_t>(layers_ - 1, 2) + shares() + pre() + 3 * state();
        return static_cast<size_t>(floats) * sizeof(float);
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        for (int64_t u = first; u < last; ++u) {
            const int64_t item = u * together_;
            layers(io, item, std::min(together_, items_ - item));
        }
    }

private:
    // Floats of the scratch's buffers: a layer's output, the inputs' share of all gates, one step's gates, a state.
    int64_t between() const { return round_up(together_ * steps_ * dirs_ * hidden_, 16); }
    int64_t shares() const { return round_up(together_ * steps_ * gates_, 16); }
    int64_t pre() const { return round_up(together_ * gates_, 16); }
    int64_t state() const { return round_up(together_ * hidden_, 16); }

    Sequence at(float* whole, int64_t item, int64_t width) const {
        const int64_t step = time_first_ ? items_ * width : width, next = time_first_ ? width : steps_ * width;
        return {whole + item * next, next, step};
    }

    void layers(const Io& io, int64_t item, int64_t n) const {
        const int64_t width = dirs_ * hidden_;
        Sequence x = at(const_cast<float*>(io.in(0)), item, features_);
        float* spare = io.floats();
        float* work = spare + between() * std::min<int64_t>(layers_ - 1, 2);
        for (int64_t layer = 0; layer < layers_; ++layer) {
            const bool top = layer + 1 == layers_;
            const Sequence y = top ? at(io.out(0), item, width)
                                   : Sequence{spare + layer % 2 * between(), steps_ * width, width};
            for (int64_t dir = 0; dir < dirs_; ++dir)
                direction(io, layer * dirs_ + dir, item, n, x, {y.base + dir * hidden_, y.item, y.step}, work);
            x = y;
        }
    }

    void direction(const Io& io, int64_t place, int64_t item, int64_t n, Sequence x, Sequence y, float* share) const {
        const Cell& cell = cells_[static_cast<size_t>(place)];
        for (int64_t i = 0; i < n; ++i)
            cell.input.apply(0, gates_, steps_, {x.base + i * x.item, x.step}, or_null(cell.input_bias), {nullptr, 0},
                             {share + i * steps_ * gates_, gates_}, Act::none);
        float *gate = share + shares(), *h = gate + pre(), *c = h + state(), *tanh_c = c + state();
        const int64_t from = (place * items_ + item) * hidden_;
        load_state(states_in_ > 0 ? io.in(1) + from : nullptr, n, h);
        if (lstm_) load_state(states_in_ > 1 ? io.in(2) + from : nullptr, n, c);
        const bool backward = place % dirs_ == 1;
        for (int64_t t = 0; t < steps_; ++t) {
            const int64_t step = backward ? steps_ - 1 - t : t;
            if (lstm_) lstm_step(cell, n, share + step * gates_, gate, h, c, tanh_c);
            else gru_step(cell, n, share + step * gates_, gate, h);
            for (int64_t i = 0; i < n; ++i)
                std::copy(h + i * hidden_, h + (i + 1) * hidden_, y.base + i * y.item + step * y.step);
        }
        std::copy(h, h + n * hidden_, io.out(1) + from);
        if (lstm_) std::copy(c, c + n * hidden_, io.out(2) + from);
    }
    void load_state(const float* from, int64_t n, float* to) const {
        if (from) std::copy(from, from + n * hidden_, to);
        else std::fill(to, to + n * hidden_, 0.0f);
    }

    // Gates: input, forget, new, output.
    void lstm_step(const Cell& cell, int64_t n, const float* share, float* gate, float* h, float* c,
                   float* tanh_c) const {
        cell.state.apply(0, gates_, n, {h, hidden_}, or_null(cell.state_bias), {share, steps_ * gates_},
                         {gate, gates_}, Act::none);
        for (int64_t i = 0; i < n; ++i) {
            float *g = gate + i * gates_, *ci = c + i * hidden_;
            kernels_.activate(g, 2 * hidden_, Fn::sigmoid);
            kernels_.activate(g + 2 * hidden_, hidden_, Fn::tanh);
            kernels_.activate(g + 3 * hidden_, hidden_, Fn::sigmoid);
            for (int64_t k = 0; k < hidden_; ++k) ci[k] = g[hidden_ + k] * ci[k] + g[k] * g[2 * hidden_ + k];
        }
        std::copy(c, c + n * hidden_, tanh_c);
        kernels_.activate(tanh_c, n * hidden_, Fn::tanh);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t k = 0; k < hidden_; ++k)
                h[i * hidden_ + k] = gate[i * gates_ + 3 * hidden_ + k] * tanh_c[i * hidden_ + k];
    }
    // Gates: reset, update, new. The reset gate scales the state's whole share of `new`, its bias included.
    void gru_step(const Cell& cell, int64_t n, const float* share, float* gate, float* h) const {
        const float* bias = or_null(cell.state_bias);
        cell.state.apply(0, 2 * hidden_, n, {h, hidden_}, bias, {share, steps_ * gates_}, {gate, gates_}, Act::none);
        cell.state.apply(2 * hidden_, gates_, n, {h, hidden_}, bias, {nullptr, 0}, {gate, gates_}, Act::none);
        for (int64_t i = 0; i < n; ++i) {
            float *g = gate + i * gates_, *fresh = g + 2 * hidden_, *hi = h + i * hidden_;
            const float* from_input = share + i * steps_ * gates_ + 2 * hidden_;
            kernels_.activate(g, 2 * hidden_, Fn::sigmoid);
            for (int64_t k = 0; k < hidden_; ++k) fresh[k] = from_input[k] + g[k] * fresh[k];
            kernels_.activate(fresh, hidden_, Fn::tanh);
            for (int64_t k = 0; k < hidden_; ++k) {
                const float keep = g[hidden_ + k];
                hi[k] = (1.0f - keep) * fresh[k] + keep * hi[k];
            }
        }
    }

    const Kernels& kernels_;
    bool lstm_;
    int64_t hidden_, layers_, dirs_;
    bool time_first_;
    int64_t features_, items_ = 1, steps_ = 1, gates_ = 1, together_ = 1;
    size_t states_in_;
    std::vector<Cell> cells_;
};

}  // namespace

Made make_recurrent(const Make& make) { return std::make_unique<Recurrent>(make); }

}  // namespace plain
}  // namespace sec
