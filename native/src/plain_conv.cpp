// Convolution without im2col. A band of input rows is copied once, padded and with one plane for each remainder of the
// stride; then every tap of the kernel is a constant offset, and output pixels of all rows are one contiguous run.
#include <cstring>
#include <unordered_map>

#include "plain_base.hpp"
#include "plain_math.hpp"

namespace sec {
namespace plain {
namespace {

constexpr int64_t kBlock = 4;            // output channels that a dense block computes together
constexpr int64_t kOver = 32;            // floats that the widest tile may read past the end
constexpr int64_t kBandFloats = 1 << 16; // of input, so that a band stays in the second-level cache
constexpr double kSparseBelow = 0.6;

// Where the taps of one dimension read: tap k is plane plane[k], shift[k] further on.
struct Taps {
    std::vector<int64_t> rest;           // remainders modulo the stride that occur; one plane each
    std::vector<int64_t> plane, shift;
    int64_t reach = 0;                   // largest shift

    Taps(int64_t kernel, int64_t stride, int64_t dilation) {
        std::unordered_map<int64_t, int64_t> known;
        for (int64_t k = 0; k < kernel; ++k) {
            const int64_t at = k * dilation;
            const auto found = known.emplace(at % stride, planes());
            plane.push_back(found.first->second);
            if (found.second) rest.push_back(at % stride);
            shift.push_back(at / stride);
            reach = std::max(reach, shift.back());
        }
    }
    int64_t planes() const { return static_cast<int64_t>(rest.size()); }
};

class Conv final : public RangeOp {
public:
    explicit Conv(const Make& make)
        : RangeOp(1, 1), x_(make.in[0]), y_(make.out[0]), attrs_(make.attrs()), kernels_(make.kernels),
          bias_(make.weight("bias")), residual_(make.in.size() > 1),
          rows_(kernel_size(make, 2), attrs_.stride[0], attrs_.dilation[0]),
          cols_(kernel_size(make, 3), attrs_.stride[1], attrs_.dilation[1]) {
        per_group_ = y_[1] / attrs_.groups;
        reads_ = x_[1] / attrs_.groups;
        lay_out();
        const std::vector<float> dense = make.weight("weight");
        list_offsets();
        int64_t nonzero = 0;
        for (float w : dense) nonzero += w != 0.0f;
        const bool sparse = static_cast<double>(nonzero) < kSparseBelow * static_cast<double>(dense.size());
        if (sparse || per_group_ < kBlock) {
            list_taps(dense, sparse);
        } else {
            block_ = kBlock;
            pack_blocks(dense);
        }
        divide(static_cast<double>(sparse ? nonzero : static_cast<int64_t>(dense.size())));
    }
    size_t scratch_bytes() const override {
        return static_cast<size_t>(input_floats_ + kBlock * sum_floats_) * sizeof(float);
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const int64_t blocks = ceil_div(per_group_, block_) * attrs_.groups;
        int64_t held = -1;                           // which band of which group lies in the scratch
        for (int64_t u = first; u < last; ++u) {
            const int64_t band = u / chunks_, chunk = u % chunks_;
            for (int64_t b = blocks * chunk / chunks_; b < blocks * (chunk + 1) / chunks_; ++b) {
                const int64_t group = b / ceil_div(per_group_, block_);
                if (held != band * attrs_.groups + group) gather(io, band, group);
                held = band * attrs_.groups + group;
                compute(io, band, group, b);
            }
        }
    }

private:
    static int64_t kernel_size(const Make& make, size_t dim) {
        return make.node.weight("weight", make.graph)->shape[dim];
    }

    void lay_out() {
        pitch_ = y_[3] + cols_.reach;
        const int64_t line = reads_ * rows_.planes() * cols_.planes() * pitch_;
        const int64_t least = std::max<int64_t>(4, 2 * rows_.reach);
        band_ = std::min(y_[2], std::max(least, kBandFloats / line - rows_.reach));
        bands_ = ceil_div(y_[2], band_);
        band_ = ceil_div(y_[2], bands_);
        bands_ = ceil_div(y_[2], band_);
        plane_ = (band_ + rows_.reach) * pitch_;
        channel_ = rows_.planes() * cols_.planes() * plane_;
        input_floats_ = round_up(reads_ * channel_ + kOver, 16);
        sum_floats_ = round_up(band_ * pitch_ + kOver, 16);
        // Where taps reach far, running on from row to row would compute mostly what lies between the rows.
        by_row_ = y_[3] < cols_.reach;
    }

    void list_offsets() {
        for (int64_t c = 0; c < reads_; ++c)
            for (size_t ky = 0; ky < rows_.plane.size(); ++ky)
                for (size_t kx = 0; kx < cols_.plane.size(); ++kx)
                    offset_.push_back(c * channel_ +
                                      (rows_.plane[ky] * cols_.planes() + cols_.plane[kx]) * plane_ +
                                      rows_.shift[ky] * pitch_ + cols_.shift[kx]);
    }
    void list_taps(const std::vector<float>& dense, bool sparse) {
        const size_t taps = offset_.size();
        begin_.push_back(0);
        for (size_t i = 0; i < dense.size(); ++i) {
            if (!sparse || dense[i] != 0.0f) {
                weight_.push_back(dense[i]);
                tap_.push_back(offset_[i % taps]);
            }
            if (i % taps + 1 == taps) begin_.push_back(static_cast<int64_t>(weight_.size()));
        }
    }
    // [group][block][tap][kBlock], zeros where the last block of a group has fewer channels.
    void pack_blocks(const std::vector<float>& dense) {
        const auto taps = static_cast<int64_t>(offset_.size());
        weight_.reserve(static_cast<size_t>(attrs_.groups * round_up(per_group_, kBlock) * taps));
        for (int64_t g = 0; g < attrs_.groups; ++g)
            for (int64_t o = 0; o < per_group_; o += kBlock)
                for (int64_t k = 0; k < taps; ++k)
                    for (int64_t i = o; i < o + kBlock; ++i)
                        weight_.push_back(
                            i < per_group_ ? dense[static_cast<size_t>((g * per_group_ + i) * taps + k)] : 0.0f);
    }
    // Channels are split too when images and bands alone are too few parts.
    void divide(double weights) {
        const double work = (weights + static_cast<double>(8 * y_[1])) * static_cast<double>(x_[0] * y_[2] * y_[3]);
        const int64_t whole = x_[0] * bands_;
        chunks_ = clamp(ceil_div(parts_for(work, kMaxParts), whole), 1, ceil_div(y_[1], 16));
        set_work(whole * chunks_, work);
    }

    int64_t band_rows(int64_t band) const { return std::min(band_, y_[2] - band % bands_ * band_); }

    void gather(const Io& io, int64_t band, int64_t group) const {
        const int64_t y0 = band % bands_ * band_, rows = band_rows(band) + rows_.reach;
        for (int64_t c = 0; c < reads_; ++c) {
            const float* image = io.in(0) + (band / bands_ * x_[1] + group * reads_ + c) * x_[2] * x_[3];
            for (int64_t py = 0; py < rows_.planes(); ++py)
                for (int64_t px = 0; px < cols_.planes(); ++px) {
                    float* to = io.floats() + c * channel_ + (py * cols_.planes() + px) * plane_;
                    for (int64_t r = 0; r < rows; ++r, to += pitch_) {
                        const int64_t in_row =
                            (y0 + r) * attrs_.stride[0] + rows_.rest[static_cast<size_t>(py)] - attrs_.pad[0];
                        const bool exists = in_row >= 0 && in_row < x_[2];
                        gather_row(exists ? image + in_row * x_[3] : nullptr,
                                   cols_.rest[static_cast<size_t>(px)] - attrs_.pad[1], to);
                    }
                }
        }
        std::fill_n(io.floats() + reads_ * channel_, kOver, 0.0f);
    }
    // to[i] = from[i * stride + start], 0 outside of the row.
    void gather_row(const float* from, int64_t start, float* to) const {
        const int64_t stride = attrs_.stride[1];
        const int64_t low = from ? clamp(start < 0 ? ceil_div(-start, stride) : 0, 0, pitch_) : pitch_;
        const int64_t high = start < x_[3] ? clamp(ceil_div(x_[3] - start, stride), low, pitch_) : low;
        std::fill(to, to + low, 0.0f);
        if (low < high && stride == 1)
            std::memcpy(to + low, from + start + low, static_cast<size_t>(high - low) * sizeof(float));
        else
            for (int64_t i = low; i < high; ++i) to[i] = from[start + i * stride];
        std::fill(to + high, to + pitch_, 0.0f);
    }

    template <int T> void tile_list(const float* in, int64_t begin, int64_t end, float* sums) const {
        F4 acc[T] = {};
        for (int64_t i = begin; i < end; ++i) {
            const float w = weight_[static_cast<size_t>(i)];
            const float* p = in + tap_[static_cast<size_t>(i)];
            SEC_PLAIN_UNROLL for (int t = 0; t < T; ++t) acc[t] += w * load4(p + 4 * t);
        }
        SEC_PLAIN_UNROLL for (int t = 0; t < T; ++t) store4(sums + 4 * t, acc[t]);
    }
    void run_list(const float* in, int64_t n, int64_t channel, float* sums) const {
        const int64_t b = begin_[static_cast<size_t>(channel)], e = begin_[static_cast<size_t>(channel) + 1];
        int64_t i = 0;
        for (; n - i > 16; i += 32) tile_list<8>(in + i, b, e, sums + i);
        if (n - i > 8) tile_list<4>(in + i, b, e, sums + i);
        else if (n - i > 0) tile_list<2>(in + i, b, e, sums + i);
    }
    void run_block(const float* in, int64_t n, int64_t block, float* sums) const {
        const auto taps = static_cast<int64_t>(offset_.size());
        const float* weights = weight_.data() + block * taps * kBlock;
        for (int64_t i = 0; i < n; i += 8) {
            F4 acc[kBlock][2] = {};
            for (int64_t k = 0; k < taps; ++k) {
                const float* p = in + i + offset_[static_cast<size_t>(k)];
                const F4 a = load4(p), b = load4(p + 4);
                SEC_PLAIN_UNROLL for (int m = 0; m < kBlock; ++m) {
                    acc[m][0] += weights[k * kBlock + m] * a;
                    acc[m][1] += weights[k * kBlock + m] * b;
                }
            }
            SEC_PLAIN_UNROLL for (int m = 0; m < kBlock; ++m) {
                store4(sums + m * sum_floats_ + i, acc[m][0]);
                store4(sums + m * sum_floats_ + i + 4, acc[m][1]);
            }
        }
    }

    // `block` counts over all groups; one block is block_ channels of one group, or what is left of it.
    void compute(const Io& io, int64_t band, int64_t group, int64_t block) const {
        const int64_t in_group = block % ceil_div(per_group_, block_) * block_;
        const int64_t channel = group * per_group_ + in_group, rows = band_rows(band);
        float* sums = io.floats() + input_floats_;
        const int64_t runs = by_row_ ? rows : 1, length = by_row_ ? y_[3] : (rows - 1) * pitch_ + y_[3];
        for (int64_t r = 0; r < runs; ++r) {
            if (block_ == 1) run_list(io.floats() + r * pitch_, length, channel, sums + r * pitch_);
            else run_block(io.floats() + r * pitch_, length, block, sums + r * pitch_);
        }
        for (int64_t i = 0; i < std::min(block_, per_group_ - in_group); ++i)
            finish(io, band, channel + i, sums + i * sum_floats_);
    }
    void finish(const Io& io, int64_t band, int64_t channel, const float* sums) const {
        const int64_t rows = band_rows(band), width = y_[3];
        const int64_t at = ((band / bands_ * y_[1] + channel) * y_[2] + band % bands_ * band_) * width;
        const float bias = bias_.empty() ? 0.0f : bias_[static_cast<size_t>(channel)];
        float* out = io.out(0) + at;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < width; ++i) out[r * width + i] = sums[r * pitch_ + i] + bias;
        if (residual_) {
            const float* res = io.in(1) + at;
            for (int64_t i = 0; i < rows * width; ++i) out[i] += res[i];
        }
        activate(kernels_, out, rows * width, attrs_.act);
    }

    Shape x_, y_;
    Attrs attrs_;
    const Kernels& kernels_;
    std::vector<float> bias_;
    bool residual_;
    Taps rows_, cols_;
    int64_t per_group_ = 1, reads_ = 1;              // output and input channels of a group
    int64_t band_ = 1, bands_ = 1, chunks_ = 1, block_ = 1;
    int64_t pitch_ = 1, plane_ = 1, channel_ = 1, input_floats_ = 0, sum_floats_ = 0;
    bool by_row_ = false;
    std::vector<int64_t> offset_;                    // of each (input channel, ky, kx) in the gathered band
    std::vector<int64_t> begin_, tap_;               // listed weights by output channel, and their offsets
    std::vector<float> weight_;
};

}  // namespace

Made make_conv(const Make& make) { return std::make_unique<Conv>(make); }

}  // namespace plain
}  // namespace sec
