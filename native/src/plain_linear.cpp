#include "plain_linear.hpp"

#include "plain_base.hpp"

namespace sec {
namespace plain {
namespace {

constexpr int64_t kRowCost = 8;                      // of finishing one output, in multiply-adds
constexpr int64_t kBlockWork = 8192;                 // weights that stay in the first-level cache for all rows of x
constexpr double kSparseBelow = 0.6;
constexpr int64_t kMostIndex = 65536;                // columns that 16 bits can name
constexpr int64_t kMostStored = int64_t{1} << 30;    // positions that 32 bits can name, with room to add

}  // namespace

Projection::Projection(std::vector<float> dense, int64_t rows, int64_t cols, const Kernels& kernels)
    : rows_(rows), cols_(cols), stored_(0), sparse_(false), kernels_(kernels) {
    for (float v : dense) stored_ += v != 0.0f;
    const double density = static_cast<double>(stored_) / static_cast<double>(std::max<int64_t>(rows * cols, 1));
    sparse_ = density < kSparseBelow && cols <= kMostIndex && stored_ <= kMostStored;
    if (sparse_) {
        compress(dense);
    } else {
        stored_ = rows * cols;
        values_ = std::move(dense);
    }
}

void Projection::compress(const std::vector<float>& dense) {
    ptr_.reserve(static_cast<size_t>(rows_) + 1);
    index_.reserve(static_cast<size_t>(stored_));
    values_.reserve(static_cast<size_t>(stored_));
    ptr_.push_back(0);
    const float* w = dense.data();
    for (int64_t r = 0; r < rows_; ++r, w += cols_) {
        for (int64_t c = 0; c < cols_; ++c) {
            if (w[c] == 0.0f) continue;
            index_.push_back(static_cast<uint16_t>(c));
            values_.push_back(w[c]);
        }
        ptr_.push_back(static_cast<int32_t>(values_.size()));
    }
}

int64_t Projection::before(int64_t row) const {
    const int64_t weights = sparse_ ? ptr_[static_cast<size_t>(row)] : row * cols_;
    return weights + row * kRowCost;
}

int64_t Projection::boundary(int64_t part, int64_t parts) const {
    const double goal = static_cast<double>(before(rows_)) * static_cast<double>(part) / static_cast<double>(parts);
    int64_t low = 0, high = rows_;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (static_cast<double>(before(middle)) < goal) low = middle + 1;
        else high = middle;
    }
    return low;
}

void Projection::apply(int64_t first, int64_t last, int64_t count, ConstRows x, const float* bias, ConstRows res,
                       Rows y, Act act) const {
    int64_t r = first;
    while (r < last) {
        int64_t end = last;
        if (count > 1) {                             // a few weight rows meet all rows of x while they are in the cache
            end = r + 1;
            while (end < last && before(end + 1) - before(r) <= kBlockWork) ++end;
        }
        for (int64_t m = 0; m < count; ++m) {
            const float* add = res.base ? res.base + m * res.step : nullptr;
            const float* in = x.base + m * x.step;
            float* out = y.base + m * y.step;
            if (sparse_) kernels_.csr(ptr_.data(), index_.data(), values_.data(), in, bias, add, out, r, end, act);
            else kernels_.gemv(values_.data(), cols_, in, bias, add, out, r, end, act);
        }
        r = end;
    }
}

namespace {

class Linear final : public PlainOp {
public:
    explicit Linear(const Make& make)
        : matrix_(make.weight("weight"), make.out[0].back(), make.in[0].back(), make.kernels),
          bias_(make.weight("bias")), count_(count(make.in[0]) / make.in[0].back()), cols_(make.in[0].back()),
          act_(make.attrs().act), residual_(make.in.size() > 1) {
        work_ = static_cast<double>(matrix_.stored() + kRowCost * matrix_.rows()) * static_cast<double>(count_);
        const int64_t wanted = clamp(static_cast<int64_t>(work_ / kLinearPart), 1, kMaxParts);
        row_parts_ = std::min(wanted, matrix_.rows());
        token_parts_ = clamp(wanted / row_parts_, 1, count_);
    }
    int64_t parts() const override { return row_parts_ * token_parts_; }
    double work() const override { return work_; }

    void run(const void* const* in, void* const* out, void* scratch, int64_t part) const override {
        const Io io{in, out, scratch};
        const int64_t rows = matrix_.rows(), slice = part / row_parts_;
        const int64_t first = matrix_.boundary(part % row_parts_, row_parts_);
        const int64_t last = part % row_parts_ + 1 == row_parts_ ? rows
                                                                 : matrix_.boundary(part % row_parts_ + 1, row_parts_);
        const int64_t m0 = count_ * slice / token_parts_, m1 = count_ * (slice + 1) / token_parts_;
        const ConstRows res{residual_ ? io.in(1) + m0 * rows : nullptr, rows};
        matrix_.apply(first, last, m1 - m0, {io.in(0) + m0 * cols_, cols_}, or_null(bias_), res,
                      {io.out(0) + m0 * rows, rows}, act_);
    }

private:
    static constexpr double kLinearPart = 16384;     // one token is latency: it is cut finer than other work

    Projection matrix_;
    std::vector<float> bias_;
    int64_t count_, cols_, row_parts_ = 1, token_parts_ = 1;
    double work_ = 0;
    Act act_;
    bool residual_;
};

}  // namespace

Made make_linear(const Make& make) { return std::make_unique<Linear>(make); }

}  // namespace plain
}  // namespace sec
