// Products of two activations: matmul and attention.
#include <limits>

#include "plain_base.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

constexpr int64_t kRows = 128;           // rows of a matmul in one unit
constexpr int64_t kCols = 64;
constexpr int64_t kQueries = 32;

// One unit is a block of rows and columns of one product.
class Matmul final : public RangeOp {
public:
    explicit Matmul(const Make& make) : RangeOp(1, 1), kernels_(make.kernels) {
        const Shape &a = make.in[0], &b = make.in[1], &out = make.out[0];
        m_ = out[out.size() - 2];
        n_ = out.back();
        k_ = a.back();
        const auto sa = strides_of(a, true), sb = strides_of(b, true);
        const size_t skip_a = out.size() - a.size(), skip_b = out.size() - b.size();
        for (size_t i = 0; i + 2 < out.size(); ++i)
            batch_.push(out[i], {i < skip_a ? 0 : sa[i - skip_a], i < skip_b ? 0 : sb[i - skip_b]});
        batch_.collapse();
        set_work(batch_.count() * ceil_div(m_, kRows) * ceil_div(n_, kCols),
                 static_cast<double>(count(out)) * static_cast<double>(k_));
    }
    size_t scratch_bytes() const override { return kPanel * sizeof(float); }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const int64_t cols = ceil_div(n_, kCols), blocks = ceil_div(m_, kRows) * cols;
        Walk<2> at(batch_, batch_.rank, first / blocks);
        for (int64_t u = first; u < last; ++u) {
            const int64_t i = u % blocks / cols * kRows, j = u % cols * kCols;
            const int64_t m = std::min(kRows, m_ - i), n = std::min(kCols, n_ - j);
            const float* a = io.in(0) + at.offset[0] + i * k_;
            float* c = io.out(0) + (u / blocks * m_ + i) * n_ + j;
            if (n_ == 1) kernels_.gemv(a, k_, io.in(1) + at.offset[1], nullptr, nullptr, c, 0, m, Act::none);
            else multiply({a, k_}, {io.in(1) + at.offset[1] + j, n_}, false, c, n_, m, n, k_, io.floats());
            if (u % blocks + 1 == blocks) at.next();
        }
    }

private:
    const Kernels& kernels_;
    int64_t m_, n_, k_;
    Loops<2> batch_;
};

// One unit is a block of queries of one head of one sequence.
class Attention final : public RangeOp {
public:
    explicit Attention(const Make& make)
        : RangeOp(1, 1), kernels_(make.kernels), heads_(make.attrs().heads), queries_(make.in[0][1]),
          keys_(make.in[1][1]), columns_(make.in[0][2]), columns_v_(make.in[2][2]),
          scale_(static_cast<float>(make.attrs().scale)), causal_(make.attrs().causal), masked_(make.in.size() > 3) {
        if (masked_) {
            const Shape& mask = make.in[3];
            const auto stride = strides_of(mask, true);
            for (size_t i = 0; i < mask.size(); ++i) mask_stride_[4 - mask.size() + i] = stride[i];
        }
        const int64_t images = make.in[0][0];
        set_work(images * heads_ * ceil_div(queries_, kQueries),
                 static_cast<double>(images * queries_) * static_cast<double>(keys_) *
                     static_cast<double>(columns_ + columns_v_ + 8 * heads_));
    }
    size_t scratch_bytes() const override {
        return static_cast<size_t>(kPanel + std::min(kQueries, queries_) * keys_) * sizeof(float);
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const int64_t blocks = ceil_div(queries_, kQueries), dim = columns_ / heads_, dim_v = columns_v_ / heads_;
        float* panel = io.floats();
        float* scores = panel + kPanel;
        for (int64_t u = first; u < last; ++u) {
            const int64_t q0 = u % blocks * kQueries, head = u / blocks % heads_, image = u / blocks / heads_;
            const int64_t n = std::min(kQueries, queries_ - q0);
            multiply({io.in(0) + (image * queries_ + q0) * columns_ + head * dim, columns_},
                     {io.in(1) + image * keys_ * columns_ + head * dim, columns_}, true, scores, keys_, n, keys_, dim,
                     panel);
            const int64_t at = image * mask_stride_[0] + head * mask_stride_[1];
            for (int64_t i = 0; i < n; ++i)
                weigh(scores + i * keys_, q0 + i, masked_ ? io.in(3) + at + (q0 + i) * mask_stride_[2] : nullptr);
            multiply({scores, keys_}, {io.in(2) + image * keys_ * columns_v_ + head * dim_v, columns_v_}, false,
                     io.out(0) + (image * queries_ + q0) * columns_v_ + head * dim_v, columns_v_, n, dim_v, keys_,
                     panel);
        }
    }

private:
    // Scores of one query to what each key counts.
    void weigh(float* scores, int64_t query, const float* mask) const {
        for (int64_t k = 0; k < keys_; ++k) scores[k] *= scale_;
        if (mask)
            for (int64_t k = 0; k < keys_; ++k) scores[k] += mask[k * mask_stride_[3]];
        if (causal_ && query + 1 < keys_)
            std::fill(scores + query + 1, scores + keys_, -std::numeric_limits<float>::infinity());
        const float top = maximum(scores, keys_);
        if (top == -std::numeric_limits<float>::infinity()) {        // no key is open
            std::fill(scores, scores + keys_, 0.0f);
            return;
        }
        for (int64_t k = 0; k < keys_; ++k) scores[k] -= top;
        kernels_.activate(scores, keys_, Fn::exp);
        const float scale = static_cast<float>(1.0 / sum(scores, keys_));
        for (int64_t k = 0; k < keys_; ++k) scores[k] *= scale;
    }

    const Kernels& kernels_;
    int64_t heads_, queries_, keys_, columns_, columns_v_;
    int64_t mask_stride_[4] = {};
    float scale_;
    bool causal_, masked_;
};

}  // namespace

Made make_matmul(const Make& make) { return std::make_unique<Matmul>(make); }
Made make_attention(const Make& make) { return std::make_unique<Attention>(make); }

}  // namespace plain
}  // namespace sec
