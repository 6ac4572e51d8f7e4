// Pooling over windows; one unit is one image's channel.
#include <limits>

#include "plain_base.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

// The taps begin .. end of a window that lie on the input, and where the first of them reads.
struct Span {
    int64_t begin, end, start;
};

class Pool final : public RangeOp {
public:
    explicit Pool(const Make& make)
        : RangeOp(make.out[0][0] * make.out[0][1],
                  static_cast<double>(count(make.out[0]) * make.attrs().kernel[0] * make.attrs().kernel[1])),
          x_(make.in[0]), y_(make.out[0]), attrs_(make.attrs()), maximum_(make.node.op == Op::max_pool) {
        for (size_t axis = 0; axis < 2; ++axis)
            for (int64_t i = 0; i < y_[axis + 2]; ++i) spans_[axis].push_back(span(axis, i));
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        for (int64_t u = first; u < last; ++u) {
            const float* x = io.in(0) + u * x_[2] * x_[3];
            float* y = io.out(0) + u * y_[2] * y_[3];
            for (const Span& rows : spans_[0])
                for (const Span& cols : spans_[1]) *y++ = maximum_ ? highest(x, rows, cols) : average(x, rows, cols);
        }
    }

private:
    Span span(size_t axis, int64_t i) const {
        const int64_t dilation = attrs_.dilation[axis], start = i * attrs_.stride[axis] - attrs_.pad[axis];
        const int64_t begin = start < 0 ? ceil_div(-start, dilation) : 0;
        const int64_t end = start < x_[axis + 2] ? ceil_div(x_[axis + 2] - start, dilation) : 0;
        return {begin, std::min(end, attrs_.kernel[axis]), start + begin * dilation};
    }
    float highest(const float* x, const Span& rows, const Span& cols) const {
        float top = -std::numeric_limits<float>::infinity();
        const float* row = x + rows.start * x_[3] + cols.start;
        for (int64_t ky = rows.begin; ky < rows.end; ++ky, row += attrs_.dilation[0] * x_[3])
            for (int64_t kx = 0; kx < cols.end - cols.begin; ++kx) top = max_nan(top, row[kx * attrs_.dilation[1]]);
        return top;
    }
    float average(const float* x, const Span& rows, const Span& cols) const {
        const int64_t width = std::max<int64_t>(0, cols.end - cols.begin);
        double total = 0;
        for (int64_t ky = rows.begin; ky < rows.end; ++ky) {
            const float* row = x + (rows.start + ky - rows.begin) * x_[3] + cols.start;
            if (width >= 16) {
                total += sum(row, width);
                continue;
            }
            float part = 0;
            for (int64_t kx = 0; kx < width; ++kx) part += row[kx];
            total += static_cast<double>(part);
        }
        const int64_t height = std::max<int64_t>(0, rows.end - rows.begin);
        const int64_t n = attrs_.count_pad ? attrs_.kernel[0] * attrs_.kernel[1] : height * width;
        return static_cast<float>(total / static_cast<double>(n));
    }

    Shape x_, y_;
    Attrs attrs_;
    bool maximum_;
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

Made make_pool(const Make& make) { return std::make_unique<Pool>(make); }
Made make_adaptive(const Make& make) { return std::make_unique<Adaptive>(make); }

}  // namespace plain
}  // namespace sec
