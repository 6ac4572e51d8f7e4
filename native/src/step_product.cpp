// Convolution and linear layers over lanes: lists of non-zeros for one output channel, or blocks of several.
#include "step_product.hpp"

#include <algorithm>

namespace sec {
namespace {

constexpr int64_t kBestP = 8;                       // more vectors share a list, but its chunks hold fewer channels
constexpr int64_t kMostTwo = 7;                     // vectors of each of two rows

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

}  // namespace

Product::Product(std::vector<ProductSpec> specs, const ProductChoice& choice, const Machine& machine)
    : specs_(std::move(specs)), k_(*machine.kernels), threads_(machine.threads) {
    const ProductSpec& main = specs_[0];
    outs_ = main.weight->shape[0];
    for (const ProductSpec& s : specs_) {
        if (!s.bias) continue;
        const std::vector<float> more = dense_values(*s.bias);
        bias_.resize(static_cast<size_t>(outs_), 0.0f);
        for (size_t i = 0; i < more.size(); ++i) bias_[i] += more[i];
    }
    masks_ = row_masks(main.out.shape);
    blocks_ = specs_.size() == 1 && main.groups == 1 &&
              (choice.path ? choice.path == 2 : pays_as_blocks(*main.weight, k_.block_mr));
    mr_ = blocks_ ? k_.block_mr : 1;
    units_ = ceil_div(outs_, mr_);
    choose_tiles(choice);
    for (const ProductSpec& s : specs_) packed_.emplace_back(s, mr_, xs_[0].count, rows_[0].count, choice.chunk);
    describe();
    if (choice.path) reason = "chosen by tuning";
    split_units();
    for (Packed& p : packed_) p.build(splits_);
    for (ProductSpec& s : specs_) s.weight = s.bias = nullptr;
    tiles = spans() * x_parts_ * (static_cast<int64_t>(splits_.size()) - 1);
}

Product::~Product() = default;

void Product::describe() {
    nonzeros = packed_[0].nonzeros(), weights = packed_[0].weights();
    const bool dense = nonzeros * 10 > weights * 9;
    path = blocks_ ? (dense ? "dense" : "blocks") : "lists";
    reason = blocks_ ? (dense ? "few zeros" : "rows of a block share their zeros") : "zeros are skipped one by one";
    if (!blocks_ && specs_[0].groups > 1) reason = "grouped";
    double records = 2.0 * static_cast<double>(outs_);
    for (const Packed& p : packed_) records += static_cast<double>(p.records() * mr_);
    const LaneShape& o = specs_[0].out.shape;
    work = records * static_cast<double>(o.groups * o.rows * o.width);
}

void Product::choose_tiles(const ProductChoice& choice) {
    const ProductSpec& s = specs_[0];
    const LaneShape& o = s.out.shape;
    int64_t most = blocks_ ? k_.block_p : std::min<int64_t>(k_.max_p, kBestP);
    if (choice.p) most = std::min<int64_t>(blocks_ ? k_.block_p : k_.max_p, choice.p);
    // Two rows at once: a window of several rows then reads the rows between them once for both.
    int64_t together = 1;
    if (!blocks_ && o.rows >= 2 && (s.kernel_h > 1 || o.width <= kMostTwo) && choice.p <= kMostTwo) {
        together = 2;
        most = std::min(most, kMostTwo);
    }
    xs_ = even(o.width, most);
    for (int64_t r = 0; r < o.rows;) {
        const int64_t n = r + together <= o.rows ? together : 1;
        rows_.push_back({r, n});
        r += n;
    }
}

int64_t Product::spans() const { return specs_[0].out.shape.groups * static_cast<int64_t>(rows_.size()); }

// Enough tiles to share; each split of the output channels has about the same number of records.
void Product::split_units() {
    alone = work < 30000;
    int64_t parts = 1;
    if (!alone && threads_ > 1) {
        const int64_t wanted = 4 * threads_, pixels = spans();
        if (pixels < wanted && xs_.size() > 1)
            x_parts_ = std::min<int64_t>(static_cast<int64_t>(xs_.size()), ceil_div(wanted, pixels));
        parts = std::max<int64_t>(1, std::min(ceil_div(wanted, pixels * x_parts_), units_ / 4));
    }
    std::vector<int64_t> total(static_cast<size_t>(units_ + 1), 0);
    for (int64_t u = 0; u < units_; ++u) {
        int64_t n = 2;
        for (const Packed& p : packed_) n += p.length(u);
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

size_t Product::held_bytes() const {
    size_t bytes = 0;
    for (const Packed& p : packed_) bytes += p.bytes();
    return bytes;
}

struct Product::Site {                              // where a tile lies
    Lanes in[2];
    Lanes out, res;
    int64_t g, r;
};

void Product::point(ListJob& job, const Site& at, size_t source, int64_t x) const {
    const ProductSpec& s = specs_[source];
    const int lanes = s.out.shape.lanes;
    job.step = s.stride_w;
    job.in_row = s.in.shape.row_stride * 4 * s.stride_h;
    job.in = reinterpret_cast<const char*>(
        at.in[source].at(at.g, at.r * s.stride_h - s.pad_top, 0, x * s.stride_w - s.pad_left, lanes));
    job.out = reinterpret_cast<char*>(at.out.at(at.g, at.r, 0, x, lanes));
    job.res = at.res.base ? reinterpret_cast<const char*>(at.res.at(at.g, at.r, 0, x, lanes)) : nullptr;
}

void Product::run_lists(ListJob job, const Span& x_range, const Site& at) const {
    for (int64_t i = x_range.start; i < x_range.start + x_range.count; ++i) {
        const Span& x = xs_[static_cast<size_t>(i)];
        job.p = static_cast<int32_t>(x.count);
        for (size_t n = 0; n < packed_.size(); ++n) {
            point(job, at, n, x.start);
            const int64_t chunks = packed_[n].chunks();
            for (int64_t c = 0; c < chunks; ++c) {
                packed_[n].point(job, c);
                job.first = n == 0 && c == 0, job.last = n + 1 == packed_.size() && c + 1 == chunks;
                k_.list(job);
            }
        }
    }
}

void Product::run_blocks(ListJob job, const Span& x_range, const Site& at) const {
    const int64_t u0 = job.first_unit, u1 = job.last_unit, chunks = packed_[0].chunks();
    for (int64_t c = 0; c < chunks; ++c) {
        packed_[0].point(job, c);
        job.first = c == 0, job.last = c + 1 == chunks;
        for (int64_t u = u0; u < u1; ++u) {
            job.first_unit = u, job.last_unit = u + 1;
            for (int64_t i = x_range.start; i < x_range.start + x_range.count; ++i) {
                const Span& x = xs_[static_cast<size_t>(i)];
                point(job, at, 0, x.start);
                job.p = static_cast<int32_t>(x.count);
                k_.list(job);
            }
        }
    }
}

void Product::run(const Arena& arena, int64_t tile, int) const {
    const int64_t parts = static_cast<int64_t>(splits_.size()) - 1;
    const int64_t xp = tile % x_parts_;             // neighbours may share a cache line: mostly one thread's
    tile /= x_parts_;
    const int64_t part = tile % parts, nx = static_cast<int64_t>(xs_.size());
    run_part(arena, tile / parts, {nx * xp / x_parts_, nx * (xp + 1) / x_parts_ - nx * xp / x_parts_}, part, part + 1);
}

// Output channels of parts `part0` to `part1` of the vectors `xr` (numbers of xs_) of one span of rows.
void Product::run_part(const Arena& arena, int64_t span, const Span& xr, int64_t part0, int64_t part1) const {
    const ProductSpec& s = specs_[0];
    const LaneShape& o = s.out.shape;
    const Span rows = rows_[static_cast<size_t>(span) % rows_.size()];
    Site at{{}, o.at(arena.at(s.out.ref)), {nullptr, 0, 0, 0}, span / static_cast<int64_t>(rows_.size()), rows.start};
    for (size_t n = 0; n < specs_.size(); ++n) at.in[n] = specs_[n].in.shape.at(arena.at(specs_[n].in.ref));
    if (s.res.exists()) at.res = s.res.shape.at(arena.at(s.res.ref));
    ListJob job{};
    job.first_unit = splits_[static_cast<size_t>(part0)], job.last_unit = splits_[static_cast<size_t>(part1)];
    const int64_t c0 = job.first_unit * mr_, c1 = std::min(outs_, job.last_unit * mr_);
    job.channels = outs_;
    job.out_chan = o.chan_stride * 4, job.res_chan = at.res.chan_stride * 4;
    job.bias = bias_.empty() ? nullptr : bias_.data();
    job.out_row = o.row_stride * 4, job.res_row = at.res.row_stride * 4;
    job.mr = static_cast<int32_t>(mr_), job.rows = static_cast<int32_t>(rows.count);
    job.act = s.act;
    if (!masks_.empty() && (o.masked(rows.start) || o.masked(rows.start + rows.count - 1)))
        job.mask = masks_.data() + rows.start * o.lanes;
    if (blocks_) run_blocks(job, xr, at);
    else run_lists(job, xr, at);
    if (!o.bordered()) return;
    const Span &a = xs_[static_cast<size_t>(xr.start)], &b = xs_[static_cast<size_t>(xr.start + xr.count - 1)];
    for (int64_t r = rows.start; r < rows.start + rows.count; ++r)
        finish_rows(k_, o, at.out, at.g, r, c0, c1, a.start, b.start + b.count);
}

std::unique_ptr<Step> make_product(std::vector<ProductSpec> specs, const ProductChoice& choice, const Machine& machine) {
    return std::make_unique<Product>(std::move(specs), choice, machine);
}

}  // namespace sec
