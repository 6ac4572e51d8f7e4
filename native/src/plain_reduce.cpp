#include "plain_base.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

constexpr int64_t kColumns = 256;

// Axes fall into two nests of loops, those that stay and those that go. Whichever holds the last axis walks contiguous
// memory inside: the sum of a row, or the sum of rows.
class Reduce final : public RangeOp {
public:
    explicit Reduce(const Make& make) : RangeOp(1, 1), fn_(make.attrs().fn) {
        const Shape& x = make.in[0];
        const auto stride = strides_of(x, false);
        std::vector<bool> gone(x.size(), false);
        for (int64_t a : make.attrs().axes) gone[static_cast<size_t>(a)] = true;
        for (size_t i = 0; i < x.size(); ++i) (gone[i] ? gone_ : kept_).push(x[i], {stride[i]});
        kept_.collapse();
        gone_.collapse();
        entries_ = gone_.count();
        Loops<1>& last = ends_in(gone_) ? gone_ : kept_;
        by_row_ = ends_in(gone_);
        if (ends_in(last)) width_ = last.dims[--last.rank];
        set_work(by_row_ ? kept_.count() : kept_.count() * ceil_div(width_, kColumns),
                 static_cast<double>(count(x)));
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        if (by_row_) return rows(io, first, last);
        const int64_t blocks = ceil_div(width_, kColumns);
        Walk<1> at(kept_, kept_.rank, first / blocks);
        for (int64_t u = first; u < last; ++u) {
            const int64_t col = u % blocks * kColumns;
            columns(io.in(0) + at.offset[0] + col, io.out(0) + u / blocks * width_ + col,
                    std::min(kColumns, width_ - col));
            if (u % blocks + 1 == blocks) at.next();
        }
    }

private:
    static bool ends_in(const Loops<1>& loops) { return loops.rank > 0 && loops.stride[0][loops.rank - 1] == 1; }
    float result(double total) const {
        return static_cast<float>(fn_ == Fn::mean ? total / static_cast<double>(entries_) : total);
    }

    void rows(const Io& io, int64_t first, int64_t last) const {
        const int64_t n = gone_.count();
        Walk<1> at(kept_, kept_.rank, first);
        for (int64_t u = first; u < last; ++u, at.next()) {
            const float* x = io.in(0) + at.offset[0];
            Walk<1> inside(gone_, gone_.rank, 0);
            float top = x[0];
            double total = 0;
            for (int64_t i = 0; i < n; ++i, inside.next()) {
                if (fn_ == Fn::max) top = max_nan(top, maximum(x + inside.offset[0], width_));
                else total += sum(x + inside.offset[0], width_);
            }
            io.out(0)[u] = fn_ == Fn::max ? top : result(total);
        }
    }
    void columns(const float* x, float* y, int64_t n) const {
        const int64_t steps = gone_.count();
        Walk<1> inside(gone_, gone_.rank, 0);
        if (fn_ == Fn::max) {
            std::copy(x, x + n, y);
            for (int64_t i = 0; i < steps; ++i, inside.next())
                for (int64_t j = 0; j < n; ++j) y[j] = max_nan(y[j], x[inside.offset[0] + j]);
            return;
        }
        double total[kColumns] = {};
        for (int64_t i = 0; i < steps; ++i, inside.next())
            for (int64_t j = 0; j < n; ++j) total[j] += static_cast<double>(x[inside.offset[0] + j]);
        for (int64_t j = 0; j < n; ++j) y[j] = result(total[j]);
    }

    Loops<1> kept_, gone_;
    int64_t width_ = 1, entries_ = 1;
    bool by_row_ = false;
    Fn fn_;
};

}  // namespace

Made make_reduce(const Make& make) { return std::make_unique<Reduce>(make); }

}  // namespace plain
}  // namespace sec
