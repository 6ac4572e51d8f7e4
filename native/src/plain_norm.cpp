// softmax, and the norms over contiguous rows.
#include <cmath>

#include "plain_base.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

constexpr int64_t kColumns = 64;         // neighbouring rows that a softmax over an inner axis takes at once

class Softmax final : public RangeOp {
public:
    explicit Softmax(const Make& make)
        : RangeOp(1, 1), kernels_(make.kernels), length_(make.in[0][static_cast<size_t>(make.attrs().axis)]),
          inner_(product(make.in[0], static_cast<size_t>(make.attrs().axis) + 1, make.in[0].size())) {
        const int64_t outer = count(make.in[0]) / (length_ * inner_);
        set_work(outer * ceil_div(inner_, kColumns), 8.0 * static_cast<double>(count(make.in[0])));
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const int64_t blocks = ceil_div(inner_, kColumns);
        for (int64_t u = first; u < last; ++u) {
            const int64_t from = u / blocks * length_ * inner_ + u % blocks * kColumns;
            if (inner_ == 1) row(io.in(0) + from, io.out(0) + from);
            else columns(io.in(0) + from, io.out(0) + from, std::min(kColumns, inner_ - u % blocks * kColumns));
        }
    }

private:
    void row(const float* x, float* y) const {
        const float top = maximum(x, length_);
        for (int64_t i = 0; i < length_; ++i) y[i] = x[i] - top;
        kernels_.activate(y, length_, Fn::exp);
        const float scale = static_cast<float>(1.0 / sum(y, length_));
        for (int64_t i = 0; i < length_; ++i) y[i] *= scale;
    }
    void columns(const float* x, float* y, int64_t n) const {
        float top[kColumns], total[kColumns] = {};
        std::copy(x, x + n, top);
        for (int64_t i = 1; i < length_; ++i)
            for (int64_t j = 0; j < n; ++j) top[j] = max_nan(top[j], x[i * inner_ + j]);
        for (int64_t i = 0; i < length_; ++i) {
            float* to = y + i * inner_;
            for (int64_t j = 0; j < n; ++j) to[j] = x[i * inner_ + j] - top[j];
            kernels_.activate(to, n, Fn::exp);
            for (int64_t j = 0; j < n; ++j) total[j] += to[j];
        }
        for (int64_t i = 0; i < length_; ++i)
            for (int64_t j = 0; j < n; ++j) y[i * inner_ + j] /= total[j];
    }

    const Kernels& kernels_;
    int64_t length_, inner_;
};

// One unit is one normalised row: the trailing axes, or one group of channels of one image.
class Norm final : public RangeOp {
public:
    explicit Norm(const Make& make)
        : RangeOp(1, 1), weight_(make.weight("weight")), bias_(make.weight("bias")),
          eps_(static_cast<float>(make.attrs().eps)), rms_(make.node.op == Op::rms_norm) {
        const Shape& x = make.in[0];
        int64_t rows;
        if (make.node.op == Op::group_norm) {
            groups_ = make.attrs().groups;
            rows = x[0] * groups_;
            inner_ = product(x, 2, x.size());
        } else {
            rows = product(x, 0, x.size() - static_cast<size_t>(make.attrs().trailing));
        }
        length_ = count(x) / rows;
        set_work(rows, 4.0 * static_cast<double>(count(x)));
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        for (int64_t u = first; u < last; ++u) {
            const float* x = io.in(0) + u * length_;
            float* y = io.out(0) + u * length_;
            const auto n = static_cast<double>(length_);
            const float mean = rms_ ? 0.0f : static_cast<float>(sum(x, length_) / n);
            const auto square = static_cast<float>(sum_of_squares(x, length_, mean) / n);
            const float scale = 1.0f / std::sqrt(square + eps_);
            if (inner_ == 0) by_element(x, y, mean, scale);
            else by_channel(x, y, mean, scale, u % groups_ * (length_ / inner_));
        }
    }

private:
    void by_element(const float* x, float* y, float mean, float scale) const {
        for (int64_t i = 0; i < length_; ++i) y[i] = (x[i] - mean) * scale;
        if (!weight_.empty())
            for (int64_t i = 0; i < length_; ++i) y[i] *= weight_[static_cast<size_t>(i)];
        if (!bias_.empty())
            for (int64_t i = 0; i < length_; ++i) y[i] += bias_[static_cast<size_t>(i)];
    }
    void by_channel(const float* x, float* y, float mean, float scale, int64_t channel) const {
        for (int64_t i = 0; i < length_; i += inner_, ++channel) {
            const float w = weight_.empty() ? 1.0f : weight_[static_cast<size_t>(channel)];
            const float b = bias_.empty() ? 0.0f : bias_[static_cast<size_t>(channel)];
            for (int64_t k = i; k < i + inner_; ++k) y[k] = (x[k] - mean) * scale * w + b;
        }
    }

    std::vector<float> weight_, bias_;
    float eps_;
    bool rms_;
    int64_t length_ = 1, groups_ = 1, inner_ = 0;    // inner_: elements of one channel, 0 where weights lie by element
};

}  // namespace

Made make_softmax(const Make& make) { return std::make_unique<Softmax>(make); }
Made make_norm(const Make& make) { return std::make_unique<Norm>(make); }

}  // namespace plain
}  // namespace sec
