#include "packed.hpp"

#include <cstring>
#include <numeric>

namespace sec {
namespace {

constexpr int64_t kL1 = 32 * 1024;                  // measured: what spills over comes from the second level in time
constexpr int64_t kL1Blocks = 12 * 1024;            // a block's own weights stay there while x moves
constexpr int64_t kShortest = 6;                    // fewer records a channel and chunk cost more than they save

}  // namespace

// Do rows of a block share most of their inputs? Dense layers and 4x1 patterns do.
bool pays_as_blocks(const Weight& weight, int64_t m) {
    const std::vector<float> w = dense_values(weight);
    const int64_t outs = weight.shape[0], taps = static_cast<int64_t>(w.size()) / std::max<int64_t>(1, outs);
    int64_t shared = 0, nonzeros = 0;
    for (int64_t first = 0; first < outs; first += m)
        for (int64_t t = 0; t < taps; ++t) {
            int64_t here = 0;
            for (int64_t i = first; i < std::min(outs, first + m); ++i) {
                const float v = w[static_cast<size_t>(i * taps + t)];
                here += v != 0.0f || v != v;
            }
            shared += here > 0, nonzeros += here;
        }
    return static_cast<double>(shared * m) * 0.75 < static_cast<double>(nonzeros);
}

Packed::Packed(const ProductSpec& spec, int64_t block, int64_t x, int64_t rows, int64_t chunk) : s_(spec), mr_(block) {
    outs_ = spec.weight->shape[0], per_group_in_ = spec.weight->shape[1];
    per_group_out_ = outs_ / spec.groups, taps_ = spec.kernel_h * spec.kernel_w, units_ = ceil_div(outs_, mr_);
    values_ = dense_values(*spec.weight);
    values_count_ = values_.size();
    s_.weight = s_.bias = nullptr;
    for (float v : values_) nonzeros_ += v != 0.0f || v != v;
    choose_chunks(x, rows, chunk);
    counts_.assign(static_cast<size_t>(chunks_ * units_), 0);
    for (int64_t u = 0; u < units_; ++u)
        for (int64_t ci = 0; ci < per_group_in_; ++ci)
            for (int64_t t = 0; t < taps_; ++t)
                counts_[static_cast<size_t>(ci / chunk_channels_ * units_ + u)] += record(u, ci, t, nullptr);
    records_count_ = std::accumulate(counts_.begin(), counts_.end(), int64_t{0});
}

// Input channels that fit the first-level cache together, unless their lists become too short.
void Packed::choose_chunks(int64_t x, int64_t rows, int64_t chunk) {
    if (s_.groups > 1) {
        chunk_channels_ = s_.in.shape.chans;
        return;
    }
    int64_t per_channel, budget = kL1;
    if (mr_ > 1) {
        per_channel = taps_ * (mr_ + 1) * 4, budget = kL1Blocks;
    } else {
        const int64_t wide = (x - 1) * s_.stride_w + (s_.kernel_w - 1) * s_.dil_w + 1;
        const int64_t high = s_.kernel_h + (rows - 1) * std::min(s_.stride_h, s_.kernel_h);
        per_channel = wide * high * s_.in.shape.lanes * 4;
    }
    if (chunk) budget = chunk;
    int64_t n = ceil_div(per_group_in_, std::max<int64_t>(1, budget / per_channel));
    if (mr_ == 1) {
        const int64_t average = nonzeros_ / std::max<int64_t>(1, units_ * n);
        if (average < kShortest) n = std::max<int64_t>(1, nonzeros_ / std::max<int64_t>(1, units_ * kShortest));
    }
    n = std::max<int64_t>(1, std::min(n, per_group_in_));
    chunk_channels_ = ceil_div(per_group_in_, n);
    chunks_ = ceil_div(per_group_in_, chunk_channels_);
}

int64_t Packed::offset(int64_t ci, int64_t tap) const {
    const LaneShape& i = s_.in.shape;
    const int64_t ky = tap / s_.kernel_w, kx = tap % s_.kernel_w;
    return 4 * (ky * s_.dil_h * i.row_stride + ci * i.chan_stride + kx * s_.dil_w * i.lanes);
}

// The record of one weight position for the unit's channels; false when all of them are zero.
bool Packed::record(int64_t u, int64_t ci, int64_t t, uint8_t* out) const {
    const int64_t row = per_group_in_ * taps_;
    bool any = false;
    for (int64_t m = 0; m < mr_; ++m) {
        const int64_t o = u * mr_ + m;
        const float v = o < outs_ ? values_[static_cast<size_t>(o * row + ci * taps_ + t)] : 0.0f;
        any = any || v != 0.0f;
        if (out) std::memcpy(out + 4 + 4 * m, &v, 4);
    }
    return any;
}

int64_t Packed::length(int64_t unit) const {
    int64_t n = 0;
    for (int64_t c = 0; c < chunks_; ++c) n += counts_[static_cast<size_t>(c * units_ + unit)];
    return n;
}

void Packed::build(const std::vector<int64_t>& splits) {
    const size_t size = static_cast<size_t>(4 + 4 * mr_);
    begin_.reserve(static_cast<size_t>(chunks_ * (units_ + 1)));
    order_.resize(static_cast<size_t>(chunks_ * units_));
    records_.reserve(static_cast<size_t>(records_count_ + 1) * size);
    std::vector<uint8_t> rec(size);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t c0 = chunk * chunk_channels_, c1 = std::min(per_group_in_, c0 + chunk_channels_);
        const int32_t* lengths = counts_.data() + chunk * units_;
        int32_t* order = order_.data() + chunk * units_;
        std::iota(order, order + units_, 0);
        for (size_t part = 0; mr_ == 1 && part + 1 < splits.size(); ++part)
            std::stable_sort(order + splits[part], order + splits[part + 1],
                             [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
        for (int64_t i = 0; i < units_; ++i) {
            const int64_t u = order[i], first_in = (u * mr_ / per_group_out_) * per_group_in_;
            begin_.push_back(static_cast<int32_t>(records_.size() / size));
            for (int64_t ci = c0; ci < c1; ++ci)
                for (int64_t t = 0; t < taps_; ++t) {
                    if (!record(u, ci, t, rec.data())) continue;
                    const int32_t off = static_cast<int32_t>(offset(first_in + ci, t));
                    std::memcpy(rec.data(), &off, 4);
                    records_.insert(records_.end(), rec.begin(), rec.end());
                }
        }
        begin_.push_back(static_cast<int32_t>(records_.size() / size));
    }
    records_.insert(records_.end(), size, 0);       // the kernel reads one offset ahead
    values_ = {};
    counts_ = {};
}

}  // namespace sec
