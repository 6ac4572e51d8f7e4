// lstm and gru, one number at a time.
#include "plain_harness.hpp"

namespace test {
namespace {

struct RecurrentCase {
    const char* name;
    int64_t items, steps, features, hidden, layers = 1;
    bool bidirectional = false, batch_first = true, states = false;
    double density = 1;
    bool special = false;
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

class Reference {
public:
    Reference(const RecurrentCase& k, bool lstm) : k_(k), lstm_(lstm), dirs_(k.bidirectional ? 2 : 1) {
        const int64_t gates = lstm ? 4 : 3, h = k.hidden;
        const Shape first = k.batch_first ? Shape{k.items, k.steps, k.features} : Shape{k.steps, k.items, k.features};
        const Shape state{k.layers * dirs_, k.items, h};
        c_ = Case{std::string(lstm ? "lstm " : "gru ") + k.name, lstm ? Op::lstm : Op::gru, {},
                  {{first, random_values(first, 1)}}, {}};
        if (k.special) c_.in[0].values[c_.in[0].values.size() / 2] = kNan;
        if (k.states) c_.in.push_back({state, random_values(state, 2)});
        if (k.states && lstm) c_.in.push_back({state, random_values(state, 3)});
        c_.attrs.hidden = h;
        c_.attrs.layers = k.layers;
        c_.attrs.bidirectional = k.bidirectional;
        c_.attrs.batch_first = k.batch_first;
        for (int64_t l = 0; l < k.layers; ++l)
            for (int64_t d = 0; d < dirs_; ++d) {
                const std::string tail = "." + std::to_string(l) + "." + std::to_string(d);
                const int64_t reads = l ? dirs_ * h : k.features;
                const auto seed = static_cast<uint64_t>(10 * l + 5 * d + 20);
                add("w_ih" + tail, {gates * h, reads}, seed, k.density);
                add("w_hh" + tail, {gates * h, h}, seed + 1, k.density);
                add("b_ih" + tail, {gates * h}, seed + 2, 1);
                add("b_hh" + tail, {gates * h}, seed + 3, 1);
            }
        hn_ = cn_ = Doubles(static_cast<size_t>(sec::count(state)));
        y_ = Doubles(static_cast<size_t>(k.items * k.steps * dirs_ * h));
    }

    void compare() {
        for (int64_t item = 0; item < k_.items; ++item) sequence(item);
        const int64_t width = dirs_ * k_.hidden;
        const Shape y = k_.batch_first ? Shape{k_.items, k_.steps, width} : Shape{k_.steps, k_.items, width};
        const Shape state{k_.layers * dirs_, k_.items, k_.hidden};
        std::vector<Array> want{{y, y_}, {state, hn_}};
        if (lstm_) want.push_back({state, cn_});
        check(c_, want, 5e-5);
    }

private:
    void add(const std::string& role, const Shape& shape, uint64_t seed, double density) {
        c_.weights.push_back({role, shape, random_values(shape, seed, density)});
        roles_[role] = c_.weights.back().values;
    }
    size_t row(int64_t item, int64_t step, int64_t width) const {
        return static_cast<size_t>((k_.batch_first ? item * k_.steps + step : step * k_.items + item) * width);
    }

    void sequence(int64_t item) {
        std::vector<Doubles> x;
        for (int64_t t = 0; t < k_.steps; ++t) {
            const auto from = c_.in[0].values.begin() + static_cast<std::ptrdiff_t>(row(item, t, k_.features));
            x.emplace_back(from, from + k_.features);
        }
        for (int64_t l = 0; l < k_.layers; ++l) {
            std::vector<Doubles> y(x.size());
            for (int64_t d = 0; d < dirs_; ++d) {
                const std::vector<Doubles> one = direction(l, d, item, x);
                for (size_t t = 0; t < y.size(); ++t) y[t].insert(y[t].end(), one[t].begin(), one[t].end());
            }
            x = y;
        }
        for (int64_t t = 0; t < k_.steps; ++t)
            std::copy(x[static_cast<size_t>(t)].begin(), x[static_cast<size_t>(t)].end(),
                      y_.begin() + static_cast<std::ptrdiff_t>(row(item, t, dirs_ * k_.hidden)));
    }

    std::vector<Doubles> direction(int64_t l, int64_t d, int64_t item, const std::vector<Doubles>& x) {
        const auto hidden = static_cast<size_t>(k_.hidden);
        const size_t place = static_cast<size_t>((l * dirs_ + d) * k_.items + item) * hidden;
        Doubles h(hidden), c(hidden);
        for (size_t i = 0; i < hidden && k_.states; ++i) {
            h[i] = c_.in[1].values[place + i];
            if (lstm_) c[i] = c_.in[2].values[place + i];
        }
        const std::string tail = "." + std::to_string(l) + "." + std::to_string(d);
        std::vector<Doubles> y(x.size());
        for (size_t n = 0; n < x.size(); ++n) {
            const size_t t = d ? x.size() - 1 - n : n;
            const Doubles a = share("_ih" + tail, x[t]), b = share("_hh" + tail, h);
            for (size_t i = 0; i < hidden; ++i) {
                if (lstm_) {
                    const auto gate = [&](size_t g) { return a[g * hidden + i] + b[g * hidden + i]; };
                    c[i] = sigmoid(gate(1)) * c[i] + sigmoid(gate(0)) * std::tanh(gate(2));
                    h[i] = sigmoid(gate(3)) * std::tanh(c[i]);
                } else {
                    const double r = sigmoid(a[i] + b[i]), z = sigmoid(a[hidden + i] + b[hidden + i]);
                    const double fresh = std::tanh(a[2 * hidden + i] + r * b[2 * hidden + i]);
                    h[i] = (1 - z) * fresh + z * h[i];
                }
            }
            y[t] = h;
        }
        std::copy(h.begin(), h.end(), hn_.begin() + static_cast<std::ptrdiff_t>(place));
        std::copy(c.begin(), c.end(), cn_.begin() + static_cast<std::ptrdiff_t>(place));
        return y;
    }
    Doubles share(const std::string& tail, const Doubles& x) {
        const Doubles &w = roles_["w" + tail], &b = roles_["b" + tail];
        Doubles out = b;
        for (size_t o = 0; o < out.size(); ++o)
            for (size_t i = 0; i < x.size(); ++i) out[o] += w[o * x.size() + i] * x[i];
        return out;
    }

    RecurrentCase k_;
    bool lstm_;
    int64_t dirs_;
    Case c_;
    std::map<std::string, Doubles> roles_;
    Doubles hn_, cn_, y_;
};

}  // namespace

void recurrent() {
    for (bool lstm : {true, false}) {
        Reference({"smallest", 1, 1, 1, 1}, lstm).compare();
        Reference({"one layer", 3, 7, 5, 11}, lstm).compare();
        Reference({"time first", 3, 7, 5, 11, 1, false, false, true}, lstm).compare();
        Reference({"two ways", 2, 5, 3, 7, 1, true, true, true}, lstm).compare();
        Reference({"two layers, two ways", 11, 5, 3, 7, 2, true, false, true}, lstm).compare();
        Reference({"four layers", 2, 5, 3, 7, 4, false, true, false}, lstm).compare();
        Reference({"sparse", 9, 5, 31, 23, 3, true, true, true, 0.2}, lstm).compare();
        Reference({"many sequences", 37, 11, 13, 29, 2, true, true, false}, lstm).compare();
        Reference({"NaN", 3, 7, 5, 11, 2, true, true, false, 1, true}, lstm).compare();
    }
}

}  // namespace test
