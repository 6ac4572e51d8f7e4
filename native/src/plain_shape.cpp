// Operators that only move elements. T is float, or int64_t for token ids.
#include <cstring>

#include "checks.hpp"
#include "plain_base.hpp"

namespace sec {
namespace plain {
namespace {

template <class T> const T* input(const Io& io, size_t i = 0) { return static_cast<const T*>(io.inputs[i]); }
template <class T> T* output(const Io& io) { return static_cast<T*>(io.outputs[0]); }
template <class T> void copy(const T* from, T* to, int64_t n) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}
double visits(const Make& make) { return static_cast<double>(count(make.out[0])); }

template <template <class> class Type> Made by_width(const Make& make) {
    if (make.wide()) return std::make_unique<Type<int64_t>>(make);
    return std::make_unique<Type<float>>(make);
}

// One part: a wrong id ends the run, and nothing else is under way then.
class Embedding final : public PlainOp {
public:
    explicit Embedding(const Make& make)
        : table_(make.weight("weight")), name_(make.node.name), ids_(count(make.in[0])), width_(make.out[0].back()),
          rows_(static_cast<int64_t>(table_.size()) / width_) {}
    double work() const override { return static_cast<double>(ids_ * width_); }

    void run(const void* const* in, void* const* out, void*, int64_t) const override {
        const auto* ids = static_cast<const int64_t*>(in[0]);
        auto* to = static_cast<float*>(out[0]);
        for (int64_t i = 0; i < ids_; ++i, to += width_) {
            if (ids[i] < 0 || ids[i] >= rows_)
                throw Error(SEC_ERROR_ARGUMENT, "node " + quoted(name_) + " (embedding): token id " +
                                                    std::to_string(ids[i]) + " is not in 0 .. " +
                                                    std::to_string(rows_ - 1));
            copy(table_.data() + ids[i] * width_, to, width_);
        }
    }

private:
    std::vector<float> table_;
    std::string name_;
    int64_t ids_, width_, rows_;
};

template <class T> class Concat final : public RangeOp {
public:
    explicit Concat(const Make& make)
        : RangeOp(product(make.out[0], 0, static_cast<size_t>(make.attrs().axis)), visits(make)) {
        const auto axis = static_cast<size_t>(make.attrs().axis);
        for (const Shape& shape : make.in) runs_.push_back(product(shape, axis, shape.size()));
        row_ = product(make.out[0], axis, make.out[0].size());
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        for (int64_t u = first; u < last; ++u) {
            T* to = output<T>(io) + u * row_;
            for (size_t i = 0; i < runs_.size(); to += runs_[i++])
                copy(input<T>(io, i) + u * runs_[i], to, runs_[i]);
        }
    }

private:
    std::vector<int64_t> runs_;
    int64_t row_;
};

template <class T> class Slice final : public RangeOp {
public:
    explicit Slice(const Make& make)
        : RangeOp(product(make.in[0], 0, static_cast<size_t>(make.attrs().axis)), visits(make)),
          start_(make.attrs().start), step_(make.attrs().step) {
        const auto axis = static_cast<size_t>(make.attrs().axis);
        entries_ = make.out[0][axis];
        inner_ = product(make.in[0], axis + 1, make.in[0].size());
        row_ = make.in[0][axis] * inner_;
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        for (int64_t u = first; u < last; ++u) {
            const T* from = input<T>(io) + u * row_ + start_ * inner_;
            T* to = output<T>(io) + u * entries_ * inner_;
            if (step_ == 1) copy(from, to, entries_ * inner_);
            else if (inner_ == 1) for (int64_t i = 0; i < entries_; ++i) to[i] = from[i * step_];
            else for (int64_t i = 0; i < entries_; ++i) copy(from + i * step_ * inner_, to + i * inner_, inner_);
        }
    }

private:
    int64_t start_, step_, entries_, inner_, row_;
};

template <class T> class Reshape final : public RangeOp {
public:
    explicit Reshape(const Make& make) : RangeOp(count(make.out[0]), visits(make) / 4) {}

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        copy(input<T>(io) + first, output<T>(io) + first, last - first);
    }
};

// One unit is one tile of a transposition, or one row when the last axis stays the last.
template <class T> class Permute final : public RangeOp {
public:
    explicit Permute(const Make& make) : RangeOp(1, 1) {
        const auto from = strides_of(make.in[0], false), to = strides_of(make.out[0], false);
        Loops<2> all;                                // in the order of the output: its strides, the input's
        for (size_t i = 0; i < to.size(); ++i) {
            const auto d = static_cast<size_t>(make.attrs().dims[i]);
            all.push(make.out[0][i], {to[i], from[d]});
        }
        all.collapse();
        if (all.rank == 0) all.push(1, {1, 1});
        const int last = all.rank - 1;
        wide_ = all.dims[last];
        gap_ = all.stride[1][last];
        for (int i = 0; i < last; ++i) {
            if (all.stride[1][i] == 1) {             // walks the input contiguously: the other side of the tiles
                high_ = all.dims[i];
                line_ = all.stride[0][i];
            } else {
                outer_.push(all.dims[i], {all.stride[0][i], all.stride[1][i]});
            }
        }
        set_work(outer_.count() * ceil_div(high_, kTile), 2 * visits(make));
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const int64_t blocks = ceil_div(high_, kTile);
        Walk<2> at(outer_, outer_.rank, first / blocks);
        for (int64_t u = first; u < last; ++u) {
            const int64_t row = u % blocks * kTile;
            T* to = output<T>(io) + at.offset[0] + row * line_;
            const T* from = input<T>(io) + at.offset[1] + row;
            if (gap_ == 1) copy(from, to, wide_);
            else transpose(from, to, std::min(kTile, high_ - row));
            if (u % blocks + 1 == blocks) at.next();
        }
    }

private:
    static constexpr int64_t kTile = 16;

    void transpose(const T* from, T* to, int64_t rows) const {
        for (int64_t c0 = 0; c0 < wide_; c0 += kTile) {
            const int64_t c1 = std::min(wide_, c0 + kTile);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = c0; c < c1; ++c) to[r * line_ + c] = from[c * gap_ + r];
        }
    }

    Loops<2> outer_;
    int64_t wide_, gap_;                             // the output's last axis, and its stride in the input
    int64_t high_ = 1, line_ = 0;                    // the input's last axis, and its stride in the output
};

template <class T> class Expand final : public RangeOp {
public:
    explicit Expand(const Make& make) : RangeOp(1, 1) {
        const Shape& out = make.out[0];
        const auto stride = strides_of(make.in[0], true);
        const size_t skip = out.size() - stride.size();
        for (size_t i = 0; i < out.size(); ++i) loops_.push(out[i], {i < skip ? 0 : stride[i - skip]});
        loops_.collapse();
        if (loops_.rank == 0) loops_.push(1, {1});
        width_ = loops_.dims[loops_.rank - 1];
        contiguous_ = loops_.stride[0][loops_.rank - 1] == 1;
        set_work(count(out) / width_, visits(make));
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        Walk<1> at(loops_, loops_.rank - 1, first);
        for (int64_t u = first; u < last; ++u, at.next()) {
            const T* from = input<T>(io) + at.offset[0];
            T* to = output<T>(io) + u * width_;
            if (contiguous_) copy(from, to, width_);
            else std::fill(to, to + width_, *from);
        }
    }

private:
    Loops<1> loops_;
    int64_t width_;
    bool contiguous_;
};

// One unit is one row of the output.
class Pad final : public RangeOp {
public:
    explicit Pad(const Make& make)
        : RangeOp(1, 1), in_(make.in[0]), pads_(make.attrs().pads), value_(static_cast<float>(make.attrs().value)) {
        Shape out = make.out[0];
        if (out.empty()) {
            in_ = out = {1};
            pads_ = {{{0, 0}}};
        }
        const auto stride = strides_of(in_, false);
        for (size_t i = 0; i < out.size(); ++i) {
            loops_.push(out[i], {stride[i]});
            if (i + 1 < out.size()) skipped_ += pads_[i][0] * stride[i];
        }
        set_work(count(out) / out.back(), visits(make));
    }

protected:
    void range(const Io& io, int64_t first, int64_t last) const override {
        const int outer = loops_.rank - 1;
        const int64_t width = loops_.dims[outer], inside = in_.back(), left = pads_.back()[0];
        Walk<1> at(loops_, outer, first);
        for (int64_t u = first; u < last; ++u, at.next()) {
            float* to = io.out(0) + u * width;
            if (!exists(at.at, outer)) {
                std::fill(to, to + width, value_);
                continue;
            }
            std::fill(to, to + left, value_);
            copy(io.in(0) + at.offset[0] - skipped_, to + left, inside);
            std::fill(to + left + inside, to + width, value_);
        }
    }

private:
    bool exists(const int64_t* at, int outer) const {
        for (int i = 0; i < outer; ++i) {
            const auto d = static_cast<size_t>(i);
            if (at[i] < pads_[d][0] || at[i] >= pads_[d][0] + in_[d]) return false;
        }
        return true;
    }

    Shape in_;
    std::vector<std::array<int64_t, 2>> pads_;
    float value_;
    Loops<1> loops_;
    int64_t skipped_ = 0;                            // input elements that the padding in front stands for
};

}  // namespace

Made make_embedding(const Make& make) { return std::make_unique<Embedding>(make); }
Made make_concat(const Make& make) { return by_width<Concat>(make); }
Made make_slice(const Make& make) { return by_width<Slice>(make); }
Made make_reshape(const Make& make) { return by_width<Reshape>(make); }
Made make_permute(const Make& make) { return by_width<Permute>(make); }
Made make_expand(const Make& make) { return by_width<Expand>(make); }
Made make_pad(const Make& make) { return std::make_unique<Pad>(make); }

}  // namespace plain
}  // namespace sec
