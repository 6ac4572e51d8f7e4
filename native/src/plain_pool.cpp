// Pooling over windows; one unit is one image's channel.
#include <limits>
#include <type_traits>

#include "plain_base.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

// The taps begin .. end of a window that lie on the input, and where the first of them reads.
struct Span {
    int64_t begin, end, start;
    int64_t size() const { return std::max<int64_t>(0, end - begin); }
};

struct Maximum {
    static constexpr float kNothing = -std::numeric_limits<float>::infinity();
    template <class T> T operator()(T a, T b) const { return max_nan(a, b); }
};
struct Sum {
    static constexpr float kNothing = 0.0f;
    template <class T> T operator()(T a, T b) const { return a + b; }
};

inline F4 every(const float* p, int64_t step) {
    if (step == 1) return load4(p);
    return F4{p[0], p[step], p[2 * step], p[3 * step]};
}

// The rows of a window fold into one padded line, and that line into the outputs of one row.
template <class Fold> class Pool final : public RangeOp {
public:
    explicit Pool(const Make& make)
        : RangeOp(make.out[0][0] * make.out[0][1],
                  static_cast<double>(count(make.out[0]) * make.attrs().kernel[0] * make.attrs().kernel[1])),
          x_(make.in[0]), y_(make.out[0]), attrs_(make.attrs()), line_(x_[3] + attrs_.pad[1] + attrs_.pad[3]) {
        for (size_t axis = 0; axis < 2; ++axis)
            for (int64_t i = 0; i < y_[axis + 2]; ++i) spans_[axis].push_back(span(axis, i));
    }
    size_t scratch_bytes() const override { return static_cast<size_t>(line_) * sizeof(float); }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        float* line = io.floats();
        std::fill(line, line + line_, Fold::kNothing);
        for (int64_t u = first; u < last; ++u) {
            float* y = io.out(0) + u * y_[2] * y_[3];
            for (const Span& rows : spans_[0]) {
                fold_rows(io.in(0) + u * x_[2] * x_[3], rows, line + attrs_.pad[1]);
                fold_line(line, y);
                if (std::is_same<Fold, Sum>::value) average(rows.size(), y);
                y += y_[3];
            }
        }
    }

private:
    Span span(size_t axis, int64_t i) const {
        const int64_t dilation = attrs_.dilation[axis], start = i * attrs_.stride[axis] - attrs_.pad[axis];
        const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
        const int64_t end = start < x_[axis + 2] ? ceil_div(x_[axis + 2] - start, dilation) : 0;
        return {begin, std::min(end, attrs_.kernel[axis]), start + begin * dilation};
    }
    void fold_rows(const float* x, const Span& rows, float* line) const {
        const int64_t width = x_[3];
        if (rows.size() == 0) return std::fill(line, line + width, Fold::kNothing);
        const float* row = x + rows.start * width;
        std::copy(row, row + width, line);
        for (int64_t k = 1; k < rows.size(); ++k) {
            row += attrs_.dilation[0] * width;
            int64_t i = 0;
            for (; i + 4 <= width; i += 4) store4(line + i, Fold()(load4(row + i), load4(line + i)));
            for (; i < width; ++i) line[i] = Fold()(row[i], line[i]);
        }
    }
    void fold_line(const float* line, float* y) const {
        const int64_t step = attrs_.stride[1], taps = attrs_.kernel[1], dilation = attrs_.dilation[1];
        int64_t i = 0;
        for (; i + 4 <= y_[3]; i += 4) {
            const float* p = line + i * step;
            F4 acc = every(p, step);
            for (int64_t k = 1; k < taps; ++k) acc = Fold()(every(p + k * dilation, step), acc);
            store4(y + i, acc);
        }
        for (; i < y_[3]; ++i) {
            y[i] = line[i * step];
            for (int64_t k = 1; k < taps; ++k) y[i] = Fold()(line[i * step + k * dilation], y[i]);
        }
    }
    void average(int64_t rows, float* y) const {
        for (size_t i = 0; i < spans_[1].size(); ++i)
            y[i] /= static_cast<float>(attrs_.count_pad ? attrs_.kernel[0] * attrs_.kernel[1]
                                                        : rows * spans_[1][i].size());
    }

    Shape x_, y_;
    Attrs attrs_;
    int64_t line_;
    std::vector<Span> spans_[2];
};

// Window i of `out` over `size` entries: floor(i * size / out) up to ceil((i + 1) * size / out).
class Adaptive final : public RangeOp {
public:
    explicit Adaptive(const Make& make)
        : RangeOp(make.out[0][0] * make.out[0][1], static_cast<double>(count(make.in[0]) + count(make.out[0]))),
          x_(make.in[0]), y_(make.out[0]) {}

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        for (int64_t u = first; u < last; ++u) {
            const float* x = io.in(0) + u * x_[2] * x_[3];
            float* y = io.out(0) + u * y_[2] * y_[3];
            for (int64_t i = 0; i < y_[2]; ++i)
                for (int64_t j = 0; j < y_[3]; ++j) {
                    const int64_t r0 = i * x_[2] / y_[2], r1 = ceil_div((i + 1) * x_[2], y_[2]);
                    const int64_t c0 = j * x_[3] / y_[3], c1 = ceil_div((j + 1) * x_[3], y_[3]);
                    double total = 0;
                    for (int64_t r = r0; r < r1; ++r) total += sum(x + r * x_[3] + c0, c1 - c0);
                    *y++ = static_cast<float>(total / static_cast<double>((r1 - r0) * (c1 - c0)));
                }
        }
    }

private:
    Shape x_, y_;
};

}  // namespace

Made make_pool(const Make& make) {
    if (make.node.op == Op::max_pool) return std::make_unique<Pool<Maximum>>(make);
    return std::make_unique<Pool<Sum>>(make);
}
Made make_adaptive(const Make& make) { return std::make_unique<Adaptive>(make); }

}  // namespace plain
}  // namespace sec
