// binary, unary, affine.
#include <cmath>
#include <cstring>

#include "plain_base.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

constexpr int64_t kChunk = 4096;         // elements that stay in the first-level cache between two passes

template <class F> void zip(const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n, F f) {
    if (sa && sb) {
        for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], b[i]);
    } else if (sa) {
        const float y = *b;
        for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], y);
    } else {
        const float x = *a;
        for (int64_t i = 0; i < n; ++i) out[i] = f(x, b[sb * i]);
    }
}
void combine(Fn fn, const float* a, int64_t sa, const float* b, int64_t sb, float* out, int64_t n) {
    switch (fn) {
        case Fn::add: return zip(a, sa, b, sb, out, n, [](float x, float y) { return x + y; });
        case Fn::sub: return zip(a, sa, b, sb, out, n, [](float x, float y) { return x - y; });
        case Fn::mul: return zip(a, sa, b, sb, out, n, [](float x, float y) { return x * y; });
        case Fn::div: return zip(a, sa, b, sb, out, n, [](float x, float y) { return x / y; });
        case Fn::max: return zip(a, sa, b, sb, out, n, [](float x, float y) { return max_nan(x, y); });
        case Fn::min: return zip(a, sa, b, sb, out, n, [](float x, float y) { return min_nan(x, y); });
        default: throw Error(SEC_ERROR_INTERNAL, "a function of two arguments that is none");
    }
}

class Binary final : public RangeOp {
public:
    explicit Binary(const Make& make)
        : RangeOp(count(make.out[0]), static_cast<double>(count(make.out[0]))), kernels_(make.kernels),
          fn_(make.attrs().fn), act_(make.attrs().act) {
        const Shape& out = make.out[0];
        const auto a = strides_of(make.in[0], true), b = strides_of(make.in[1], true);
        const size_t skip_a = out.size() - a.size(), skip_b = out.size() - b.size();
        for (size_t i = 0; i < out.size(); ++i)
            loops_.push(out[i], {i < skip_a ? 0 : a[i - skip_a], i < skip_b ? 0 : b[i - skip_b]});
        loops_.collapse();
        if (loops_.rank == 0) loops_.push(1, {0, 0});
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const int inner = loops_.rank - 1;
        const int64_t width = loops_.dims[inner], sa = loops_.stride[0][inner], sb = loops_.stride[1][inner];
        Walk<2> walk(loops_, inner, first / width);
        int64_t col = first % width, ready = first;
        for (int64_t i = first; i < last;) {
            const int64_t n = std::min({width - col, last - i, kChunk});
            combine(fn_, io.in(0) + walk.offset[0] + col * sa, sa, io.in(1) + walk.offset[1] + col * sb, sb,
                    io.out(0) + i, n);
            i += n;
            col += n;
            if (col == width) {
                col = 0;
                walk.next();
            }
            if (i - ready >= kChunk || i == last) {
                activate(kernels_, io.out(0) + ready, i - ready, act_);
                ready = i;
            }
        }
    }

private:
    const Kernels& kernels_;
    Loops<2> loops_;
    Fn fn_;
    Act act_;
};

class Unary final : public RangeOp {
public:
    explicit Unary(const Make& make)
        : RangeOp(count(make.out[0]), 4.0 * static_cast<double>(count(make.out[0]))), kernels_(make.kernels),
          fn_(make.attrs().fn) {}

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const float* x = io.in(0);
        float* y = io.out(0);
        if (fn_ == Fn::log) {                        // the kernels have no logarithm
            for (int64_t i = first; i < last; ++i) y[i] = std::log(x[i]);
            return;
        }
        for (int64_t i = first; i < last; i += kChunk) {
            const int64_t n = std::min(kChunk, last - i);
            std::memcpy(y + i, x + i, static_cast<size_t>(n) * sizeof(float));
            kernels_.activate(y + i, n, fn_);
        }
    }

private:
    const Kernels& kernels_;
    Fn fn_;
};

// One unit is one image's channel.
class Affine final : public RangeOp {
public:
    explicit Affine(const Make& make)
        : RangeOp(make.out[0][0] * make.out[0][1], static_cast<double>(count(make.out[0]))), kernels_(make.kernels),
          scale_(make.weight("scale")), shift_(make.weight("shift")), channels_(make.out[0][1]),
          inner_(product(make.out[0], 2, make.out[0].size())), act_(make.attrs().act) {}

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        if (inner_ == 1) return vectors(io, first, last);
        for (int64_t u = first; u < last; ++u) {
            const auto c = static_cast<size_t>(u % channels_);
            const float s = scale_[c], t = shift_[c];
            for (int64_t i = 0; i < inner_; i += kChunk) {
                const int64_t n = std::min(kChunk, inner_ - i);
                const float* x = io.in(0) + u * inner_ + i;
                float* y = io.out(0) + u * inner_ + i;
                for (int64_t k = 0; k < n; ++k) y[k] = x[k] * s + t;
                activate(kernels_, y, n, act_);
            }
        }
    }

private:
    void vectors(const Io& io, int64_t first, int64_t last) const {
        for (int64_t u = first; u < last;) {
            const int64_t c = u % channels_, n = std::min(channels_ - c, last - u);
            const float *x = io.in(0) + u, *s = scale_.data() + c, *t = shift_.data() + c;
            float* y = io.out(0) + u;
            for (int64_t k = 0; k < n; ++k) y[k] = x[k] * s[k] + t[k];
            activate(kernels_, y, n, act_);
            u += n;
        }
    }

    const Kernels& kernels_;
    std::vector<float> scale_, shift_;
    int64_t channels_, inner_;
    Act act_;
};

}  // namespace

Made make_binary(const Make& make) { return std::make_unique<Binary>(make); }
Made make_unary(const Make& make) { return std::make_unique<Unary>(make); }
Made make_affine(const Make& make) { return std::make_unique<Affine>(make); }

}  // namespace plain
}  // namespace sec
