// Convolution and linear layers over lanes: lists of non-zeros for one output channel, or blocks of several.
#include <cstring>
#include <numeric>

#include "step.hpp"

namespace sec {
namespace {

constexpr int64_t kL1 = 32 * 1024;                  // measured: what spills over comes from the second level in time
constexpr int64_t kBestP = 8;                       // more vectors share a list, but its chunks hold fewer channels
constexpr int64_t kShortest = 6;                    // fewer records a channel and chunk cost more than they save

struct Span {
    int64_t start, count;
};

struct Tap {                                        // one weight position of the kernel window
    int64_t ci, ky, kx;
};

class Product final : public Step {
public:
    Product(const ProductSpec& spec, const ProductChoice& choice, const Machine& machine);
    void run(const Arena& arena, int64_t tile, int thread) const override;
    size_t held_bytes() const override { return records_.size() + (begin_.size() + order_.size()) * 4; }

private:
    void choose_path(const std::vector<float>& w, const ProductChoice& choice);
    void choose_tiles(const ProductChoice& choice);
    void choose_chunks(const ProductChoice& choice);
    void count_records(const std::vector<float>& w);
    bool record(const std::vector<float>& w, int64_t u, int64_t ci, int64_t t, uint8_t* rec) const;
    void build(const std::vector<float>& w);
    void split_units();
    int64_t offset_of(const Tap& t) const;
    void run_lists(ListJob job, const Span& rows, const Lanes& in, const Lanes& out, const Lanes& res, int64_t g) const;
    void run_blocks(ListJob job, const Span& rows, const Lanes& in, const Lanes& out, const Lanes& res, int64_t g) const;
    void point(ListJob& job, const Lanes& in, const Lanes& out, const Lanes& res, int64_t g, int64_t r, int64_t x) const;

    ProductSpec s_;
    const Kernels& k_;
    int threads_;
    int64_t outs_, per_group_in_, per_group_out_;
    bool blocks_ = false;
    int64_t mr_ = 1, units_ = 0, chunks_ = 1, chunk_channels_ = 0;
    std::vector<Span> rows_, xs_;
    int64_t x_parts_ = 1;
    std::vector<int64_t> splits_;
    std::vector<uint8_t> records_;
    std::vector<int32_t> begin_;                    // [chunk][units + 1]
    std::vector<int32_t> order_;                    // [chunk][units]
    std::vector<int32_t> counts_;                   // [chunk][units], while building
    std::vector<float> bias_;
    std::vector<int32_t> masks_;
};

std::vector<Span> even(int64_t n, int64_t most) {
    std::vector<Span> out;
    const int64_t parts = ceil_div(n, most);
    for (int64_t i = 0, at = 0; i < parts; ++i) {
        const int64_t size = (n - at) / (parts - i) + ((n - at) % (parts - i) ? 1 : 0);
        out.push_back({at, size});
        at += size;
    }
    return out;
}

Product::Product(const ProductSpec& spec, const ProductChoice& choice, const Machine& machine)
    : s_(spec), k_(*machine.kernels), threads_(machine.threads) {
    outs_ = spec.weight->shape[0];
    per_group_in_ = spec.weight->shape[1];
    per_group_out_ = outs_ / spec.groups;
    if (spec.bias) bias_ = dense_values(*spec.bias);
    masks_ = row_masks(spec.out.shape);
    const std::vector<float> w = dense_values(*spec.weight);
    weights = static_cast<int64_t>(w.size());
    for (float v : w) nonzeros += v != 0.0f || v != v;
    choose_path(w, choice);
    choose_tiles(choice);
    choose_chunks(choice);
    count_records(w);
    split_units();
    build(w);
    s_.weight = s_.bias = nullptr;
    const LaneShape& o = s_.out.shape;
    tiles = o.groups * static_cast<int64_t>(rows_.size()) * x_parts_ * (static_cast<int64_t>(splits_.size()) - 1);
}

// Blocks pay where the rows of a block share most of their inputs: dense layers, and 4x1 patterns.
void Product::choose_path(const std::vector<float>& w, const ProductChoice& choice) {
    const int64_t taps = per_group_in_ * s_.kernel_h * s_.kernel_w;
    const int64_t m = k_.block_mr;
    int64_t shared = 0;
    if (s_.groups == 1) {
        for (int64_t u = 0; u * m < outs_; ++u)
            for (int64_t t = 0; t < taps; ++t)
                for (int64_t i = u * m; i < std::min(outs_, (u + 1) * m); ++i)
                    if (w[static_cast<size_t>(i * taps + t)] != 0.0f) {
                        ++shared;
                        break;
                    }
        blocks_ = static_cast<double>(shared * m) * 0.75 < static_cast<double>(nonzeros);
    }
    if (choice.path && s_.groups == 1) blocks_ = choice.path == 2;
    const bool dense = nonzeros * 10 > weights * 9;
    path = blocks_ ? (dense ? "dense" : "blocks") : "lists";
    reason = blocks_ ? (dense ? "few zeros" : "rows of a block share their zeros") : "zeros are skipped one by one";
    if (!blocks_ && s_.groups > 1) reason = "grouped";
    mr_ = blocks_ ? m : 1;
    units_ = ceil_div(outs_, mr_);
    const double records = blocks_ ? static_cast<double>(shared * m) : static_cast<double>(nonzeros);
    const LaneShape& o = s_.out.shape;
    work = (records + 2.0 * static_cast<double>(outs_)) * static_cast<double>(o.groups * o.rows * o.width);
}

void Product::choose_tiles(const ProductChoice& choice) {
    const LaneShape& o = s_.out.shape;
    int64_t most = blocks_ ? k_.block_p : std::min<int64_t>(k_.max_p, kBestP);
    if (choice.p) most = std::min<int64_t>(blocks_ ? k_.block_p : k_.max_p, choice.p);
    // Two rows at once: a window of several rows then reads the rows between them once for both.
    const int64_t most_two = 7;
    int64_t together = 1;
    if (!blocks_ && o.rows >= 2 && (s_.kernel_h > 1 || o.width <= most_two) && choice.p <= most_two) {
        together = 2;
        most = std::min(most, most_two);
    }
    xs_ = even(o.width, most);
    for (int64_t r = 0; r < o.rows;) {
        const int64_t n = r + together <= o.rows ? together : 1;
        rows_.push_back({r, n});
        r += n;
    }
}

void Product::choose_chunks(const ProductChoice& choice) {
    const int64_t taps = s_.kernel_h * s_.kernel_w;
    const int64_t channels = per_group_in_;
    if (s_.groups > 1) {
        chunk_channels_ = s_.in.shape.chans;
        return;
    }
    int64_t per_channel, budget = kL1;
    if (blocks_) {
        per_channel = taps * (mr_ + 1) * 4;         // the block's own weights stay in L1 while x moves
        budget = 12 * 1024;
    } else {
        const int64_t x = (xs_[0].count - 1) * s_.stride_w + (s_.kernel_w - 1) * s_.dil_w + 1;
        const int64_t r = s_.kernel_h + (rows_[0].count - 1) * std::min(s_.stride_h, s_.kernel_h);
        per_channel = x * r * s_.in.shape.lanes * 4;
    }
    if (choice.chunk) budget = choice.chunk;
    int64_t n = ceil_div(channels, std::max<int64_t>(1, budget / per_channel));
    if (!blocks_) {
        const int64_t average = nonzeros / std::max<int64_t>(1, units_ * n);
        if (average < kShortest) n = std::max<int64_t>(1, nonzeros / std::max<int64_t>(1, units_ * kShortest));
    }
    n = std::max<int64_t>(1, std::min(n, channels));
    chunk_channels_ = ceil_div(channels, n);
    chunks_ = ceil_div(channels, chunk_channels_);
}

int64_t Product::offset_of(const Tap& t) const {
    const LaneShape& i = s_.in.shape;
    return 4 * (t.ky * s_.dil_h * i.row_stride + t.ci * i.chan_stride + t.kx * s_.dil_w * i.lanes);
}

// The record of one weight position for the unit's channels; false when all of them are zero.
bool Product::record(const std::vector<float>& w, int64_t u, int64_t ci, int64_t t, uint8_t* rec) const {
    const int64_t taps = s_.kernel_h * s_.kernel_w, row = per_group_in_ * taps;
    bool any = false;
    for (int64_t m = 0; m < mr_; ++m) {
        const int64_t o = u * mr_ + m;
        const float v = o < outs_ ? w[static_cast<size_t>(o * row + ci * taps + t)] : 0.0f;
        any = any || v != 0.0f;
        if (rec) std::memcpy(rec + 4 + 4 * m, &v, 4);
    }
    return any;
}

void Product::count_records(const std::vector<float>& w) {
    const int64_t taps = s_.kernel_h * s_.kernel_w;
    counts_.assign(static_cast<size_t>(chunks_ * units_), 0);
    for (int64_t u = 0; u < units_; ++u)
        for (int64_t ci = 0; ci < per_group_in_; ++ci)
            for (int64_t t = 0; t < taps; ++t)
                counts_[static_cast<size_t>(ci / chunk_channels_ * units_ + u)] += record(w, u, ci, t, nullptr);
}

// Within a split, units of equal length follow each other, so that the end of the kernel's loop can be foreseen.
void Product::build(const std::vector<float>& w) {
    const int64_t taps = s_.kernel_h * s_.kernel_w;
    const size_t size = static_cast<size_t>(4 + 4 * mr_);
    begin_.reserve(static_cast<size_t>(chunks_ * (units_ + 1)));
    order_.resize(static_cast<size_t>(chunks_ * units_));
    records_.reserve(static_cast<size_t>(std::accumulate(counts_.begin(), counts_.end(), int64_t{1})) * size);
    std::vector<uint8_t> rec(size);
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t c0 = chunk * chunk_channels_, c1 = std::min(per_group_in_, c0 + chunk_channels_);
        const int32_t* lengths = counts_.data() + chunk * units_;
        int32_t* order = order_.data() + chunk * units_;
        std::iota(order, order + units_, 0);
        for (size_t part = 0; mr_ == 1 && part + 1 < splits_.size(); ++part)
            std::stable_sort(order + splits_[part], order + splits_[part + 1],
                             [&](int32_t a, int32_t b) { return lengths[a] > lengths[b]; });
        for (int64_t i = 0; i < units_; ++i) {
            const int64_t u = order[i], first_in = (u * mr_ / per_group_out_) * per_group_in_;
            begin_.push_back(static_cast<int32_t>(records_.size() / size));
            for (int64_t ci = c0; ci < c1; ++ci)
                for (int64_t t = 0; t < taps; ++t) {
                    if (!record(w, u, ci, t, rec.data())) continue;
                    const int32_t off = static_cast<int32_t>(offset_of({first_in + ci, t / s_.kernel_w, t % s_.kernel_w}));
                    std::memcpy(rec.data(), &off, 4);
                    records_.insert(records_.end(), rec.begin(), rec.end());
                }
        }
        begin_.push_back(static_cast<int32_t>(records_.size() / size));
    }
    records_.insert(records_.end(), size, 0);       // the spare record
    counts_.clear();
    counts_.shrink_to_fit();
}

// Enough tiles to share; each split of the output channels has about the same number of records.
void Product::split_units() {
    const LaneShape& o = s_.out.shape;
    const int64_t pixels = o.groups * static_cast<int64_t>(rows_.size());
    alone = work < 30000;
    int64_t parts = 1;
    if (!alone && threads_ > 1) {
        const int64_t wanted = 4 * threads_;
        if (pixels < wanted && xs_.size() > 1) x_parts_ = std::min<int64_t>(static_cast<int64_t>(xs_.size()), ceil_div(wanted, pixels));
        parts = std::max<int64_t>(1, std::min(ceil_div(wanted, pixels * x_parts_), units_ / 4));
    }
    std::vector<int64_t> total(static_cast<size_t>(units_ + 1), 0);
    for (int64_t u = 0; u < units_; ++u) {
        int64_t n = 2;
        for (int64_t c = 0; c < chunks_; ++c) n += counts_[static_cast<size_t>(c * units_ + u)];
        total[static_cast<size_t>(u + 1)] = total[static_cast<size_t>(u)] + n;
    }
    splits_.push_back(0);
    for (int64_t p = 1; p < parts; ++p) {
        const int64_t goal = total.back() * p / parts;
        const int64_t u = std::lower_bound(total.begin(), total.end(), goal) - total.begin();
        if (u > splits_.back() && u < units_) splits_.push_back(u);
    }
    splits_.push_back(units_);
}

void Product::point(ListJob& job, const Lanes& in, const Lanes& out, const Lanes& res, int64_t g, int64_t r,
                    int64_t x) const {
    const int lanes = s_.out.shape.lanes;
    job.in = reinterpret_cast<const char*>(in.at(g, r * s_.stride_h - s_.pad_top, 0, x * s_.stride_w - s_.pad_left, lanes));
    job.out = reinterpret_cast<char*>(out.at(g, r, 0, x, lanes));
    job.res = res.base ? reinterpret_cast<const char*>(res.at(g, r, 0, x, lanes)) : nullptr;
}

void Product::run_lists(ListJob job, const Span& x_range, const Lanes& in, const Lanes& out, const Lanes& res,
                        int64_t g) const {
    const int64_t r = job.step;                      // carried in by run()
    job.step = s_.stride_w;
    for (int64_t i = x_range.start; i < x_range.start + x_range.count; ++i) {
        const Span& x = xs_[static_cast<size_t>(i)];
        point(job, in, out, res, g, r, x.start);
        job.p = static_cast<int32_t>(x.count);
        for (int64_t c = 0; c < chunks_; ++c) {
            job.begin = begin_.data() + c * (units_ + 1);
            job.order = order_.data() + c * units_;
            job.first = c == 0, job.last = c + 1 == chunks_;
            k_.list(job);
        }
    }
}

void Product::run_blocks(ListJob job, const Span& x_range, const Lanes& in, const Lanes& out, const Lanes& res,
                         int64_t g) const {
    const int64_t r = job.step, u0 = job.first_unit, u1 = job.last_unit;
    job.step = s_.stride_w;
    for (int64_t c = 0; c < chunks_; ++c) {
        job.begin = begin_.data() + c * (units_ + 1);
        job.first = c == 0, job.last = c + 1 == chunks_;
        for (int64_t u = u0; u < u1; ++u) {
            job.first_unit = u, job.last_unit = u + 1;
            for (int64_t i = x_range.start; i < x_range.start + x_range.count; ++i) {
                const Span& x = xs_[static_cast<size_t>(i)];
                point(job, in, out, res, g, r, x.start);
                job.p = static_cast<int32_t>(x.count);
                k_.list(job);
            }
        }
    }
}

void Product::run(const Arena& arena, int64_t tile, int) const {
    const LaneShape &o = s_.out.shape, &is = s_.in.shape;
    const int64_t parts = static_cast<int64_t>(splits_.size()) - 1;
    const int64_t xp = tile % x_parts_;             // neighbours may share a cache line: mostly one thread's
    tile /= x_parts_;
    const int64_t part = tile % parts;
    tile /= parts;
    const Span rows = rows_[static_cast<size_t>(tile) % rows_.size()];
    const int64_t g = tile / static_cast<int64_t>(rows_.size());
    const Lanes in = is.at(arena.at(s_.in.ref)), out = o.at(arena.at(s_.out.ref));
    Lanes res{nullptr, 0, 0, 0};
    if (s_.res.exists()) res = s_.res.shape.at(arena.at(s_.res.ref));
    const int64_t nx = static_cast<int64_t>(xs_.size());
    const Span xr{nx * xp / x_parts_, nx * (xp + 1) / x_parts_ - nx * xp / x_parts_};
    ListJob job{};
    job.records = records_.data();
    job.first_unit = splits_[static_cast<size_t>(part)], job.last_unit = splits_[static_cast<size_t>(part) + 1];
    job.channels = outs_;
    job.out_chan = o.chan_stride * 4, job.res_chan = res.chan_stride * 4;
    job.bias = bias_.empty() ? nullptr : bias_.data();
    job.in_row = is.row_stride * 4 * s_.stride_h, job.out_row = o.row_stride * 4, job.res_row = res.row_stride * 4;
    job.mr = static_cast<int32_t>(mr_), job.rows = static_cast<int32_t>(rows.count);
    job.act = s_.act;
    job.step = rows.start;
    if (!masks_.empty() && (o.masked(rows.start) || o.masked(rows.start + rows.count - 1)))
        job.mask = masks_.data() + rows.start * o.lanes;
    if (blocks_) run_blocks(job, xr, in, out, res, g);
    else run_lists(job, xr, in, out, res, g);
    if (!o.bordered()) return;
    const Span &a = xs_[static_cast<size_t>(xr.start)], &b = xs_[static_cast<size_t>(xr.start + xr.count - 1)];
    const int64_t c0 = job.first_unit * mr_, c1 = std::min(outs_, splits_[static_cast<size_t>(part) + 1] * mr_);
    for (int64_t r = rows.start; r < rows.start + rows.count; ++r)
        finish_rows(k_, o, out, g, r, c0, c1, a.start, b.start + b.count);
}

}  // namespace

std::unique_ptr<Step> make_product(const ProductSpec& spec, const ProductChoice& choice, const Machine& machine) {
    return std::make_unique<Product>(spec, choice, machine);
}

}  // namespace sec
