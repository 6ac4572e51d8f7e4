// Steps over lanes other than convolution and linear layers.
#include <cstring>

#include "step.hpp"

namespace sec {

Block allocate(size_t bytes) {
    const size_t size = (bytes + 127) / 64 * 64;
    void* p = std::aligned_alloc(64, size);
    if (!p) throw Error(SEC_ERROR_MEMORY, "no memory for " + std::to_string(bytes) + " bytes");
    return Block(static_cast<char*>(p));
}

void finish_rows(const Kernels& k, const LaneShape& s, const Lanes& t, int64_t g, int64_t r, int64_t c0, int64_t c1,
                 int64_t x0, int64_t x1) {
    FinishJob j{};
    j.t = t, j.g = g, j.r = r, j.c0 = c0, j.c1 = c1, j.x0 = x0, j.x1 = x1;
    j.width = s.width, j.left = s.halo.left, j.right = s.halo.right;
    j.rows = s.rows, j.halo_top = s.halo.top, j.halo_bottom = s.halo.bottom;
    j.strips = s.strips, j.height = s.height;
    k.finish(j);
}

std::vector<int32_t> row_masks(const LaneShape& s) {
    std::vector<int32_t> out;
    bool any = false;
    for (int64_t r = 0; r < s.rows; ++r) any = any || s.masked(r);
    if (!any) return out;
    for (int64_t r = 0; r < s.rows; ++r)
        for (int l = 0; l < s.lanes; ++l) out.push_back((l % s.strips) * s.rows + r < s.height ? -1 : 0);
    return out;
}

namespace {

// Rows and channel ranges as tiles.
class Rowwise : public Step {
protected:
    Rowwise(const LaneShape& shape, int64_t chans, const Machine& machine, double per_vector) : k_(*machine.kernels) {
        rows_ = shape.rows, groups_ = shape.groups, chans_ = chans;
        work = static_cast<double>(groups_ * rows_ * chans * shape.width) * per_vector;
        alone = work < 30000;
        parts_ = 1;
        if (!alone && machine.threads > 1 && groups_ * rows_ < 4 * machine.threads)
            parts_ = std::min<int64_t>(chans, ceil_div(4 * machine.threads, groups_ * rows_));
        tiles = groups_ * rows_ * parts_;
    }
    struct Place {
        int64_t g, r, c0, c1;
    };
    Place place(int64_t tile) const {
        const int64_t part = tile % parts_, row = tile / parts_;
        return {row / rows_, row % rows_, chans_ * part / parts_, chans_ * (part + 1) / parts_};
    }
    const Kernels& k_;
    int64_t rows_, groups_, chans_, parts_;
};

class Elementwise final : public Rowwise {
public:
    Elementwise(const Form& out, const Form& a, const Form& b, const EltJob& job, std::vector<float> channels,
                std::vector<float> shift, const Machine& m)
        : Rowwise(out.shape, a.shape.chans, m, 2), out_(out), a_(a), b_(b), job_(job), channels_(std::move(channels)),
          shift_(std::move(shift)), masks_(row_masks(out.shape)) {
        path = "lanes";
    }
    void run(const Arena& arena, int64_t tile, int) const override {
        const Place p = place(tile);
        EltJob j = job_;
        j.out = out_.shape.at(arena.at(out_.ref)), j.a = a_.shape.at(arena.at(a_.ref));
        if (b_.exists()) j.b = b_.shape.at(arena.at(b_.ref));
        j.g = p.g, j.r = p.r, j.c0 = p.c0, j.c1 = p.c1, j.width = out_.shape.width;
        if (!shift_.empty()) j.scale = channels_.data(), j.shift = shift_.data();
        else if (!channels_.empty()) j.b_chan = channels_.data();
        if (!masks_.empty() && out_.shape.masked(p.r)) j.mask = masks_.data() + p.r * out_.shape.lanes;
        k_.elementwise(j);
        if (out_.shape.bordered()) finish_rows(k_, out_.shape, j.out, p.g, p.r, p.c0, p.c1, 0, out_.shape.width);
    }
    size_t held_bytes() const override { return (channels_.size() + shift_.size()) * 4; }

private:
    Form out_, a_, b_;
    EltJob job_;
    std::vector<float> channels_, shift_;
    std::vector<int32_t> masks_;
};

class Pooling final : public Rowwise {
public:
    Pooling(const Form& in, const Form& out, const PoolJob& job, const Machine& m)
        : Rowwise(out.shape, out.shape.chans, m, 2.0 * static_cast<double>(job.kernel_h * job.kernel_w)), in_(in),
          out_(out), job_(job), masks_(row_masks(out.shape)) {
        path = "lanes";
    }
    void run(const Arena& arena, int64_t tile, int) const override {
        const Place p = place(tile);
        PoolJob j = job_;
        j.in = in_.shape.at(arena.at(in_.ref)), j.out = out_.shape.at(arena.at(out_.ref));
        j.g = p.g, j.r = p.r, j.c0 = p.c0, j.c1 = p.c1;
        j.width_in = in_.shape.width, j.width_out = out_.shape.width;
        j.rows_in = in_.shape.rows, j.strips = in_.shape.strips, j.height_in = in_.shape.height;
        if (!masks_.empty() && out_.shape.masked(p.r)) j.mask = masks_.data() + p.r * out_.shape.lanes;
        k_.pool(j);
        if (out_.shape.bordered()) finish_rows(k_, out_.shape, j.out, p.g, p.r, p.c0, p.c1, 0, out_.shape.width);
    }

private:
    Form in_, out_;
    PoolJob job_;
    std::vector<int32_t> masks_;
};

class Norm final : public Step {
public:
    Norm(const Form& in, const Form& out, std::vector<float> weight, std::vector<float> bias, double eps, bool rms,
         const Machine& m)
        : k_(*m.kernels), in_(in), out_(out), weight_(std::move(weight)), bias_(std::move(bias)),
          eps_(static_cast<float>(eps)), rms_(rms) {
        path = "lanes";
        work = 6.0 * static_cast<double>(in.shape.rows * in.shape.width * in.shape.chans);
        alone = work < 30000;
        parts_ = ceil_div(in.shape.width, kTogether);   // never two threads in one cache line
        tiles = in.shape.rows * parts_;
    }
    void run(const Arena& arena, int64_t tile, int) const override {
        const int64_t x = tile % parts_ * kTogether;
        NormJob j{};
        j.in = in_.shape.at(arena.at(in_.ref) + x * in_.shape.lanes);
        j.out = out_.shape.at(arena.at(out_.ref) + x * in_.shape.lanes);
        j.r = tile / parts_, j.channels = in_.shape.chans, j.width = std::min(kTogether, in_.shape.width - x);
        j.weight = weight_.empty() ? nullptr : weight_.data();
        j.bias = bias_.empty() ? nullptr : bias_.data();
        j.eps = eps_, j.rms = rms_;
        k_.norm(j);
    }
    size_t held_bytes() const override { return (weight_.size() + bias_.size()) * 4; }

private:
    const Kernels& k_;
    Form in_, out_;
    std::vector<float> weight_, bias_;
    float eps_;
    bool rms_;
    static constexpr int64_t kTogether = 4;
    int64_t parts_;
};

class Softmax final : public Step {
public:
    Softmax(const Form& in, const Form& out, const Machine& m) : k_(*m.kernels), in_(in), out_(out) {
        path = "lanes";
        work = 20.0 * static_cast<double>(in.shape.rows * in.shape.width * in.shape.chans);
        alone = work < 30000;
        tiles = in.shape.rows;
    }
    void run(const Arena& arena, int64_t tile, int) const override {
        SoftmaxJob j{in_.shape.at(arena.at(in_.ref)), out_.shape.at(arena.at(out_.ref)), tile, in_.shape.chans,
                     in_.shape.width};
        k_.softmax(j);
    }

private:
    const Kernels& k_;
    Form in_, out_;
};

class Attention final : public Step {
public:
    Attention(const Form& q, const Form& k, const Form& v, const Form& out, const Attrs& attrs, const MaskSpec& mask,
              const Machine& m)
        : k_(*m.kernels), q_(q), key_(k), v_(v), out_(out), attrs_(attrs), mask_(mask) {
        path = "lanes";
        vectors_ = q.shape.padded / q.shape.lanes;
        const int64_t pairs = q.shape.sequences * attrs.heads;
        work = 2.0 * static_cast<double>(pairs * vectors_ * k.shape.length) *
               (static_cast<double>(q.shape.chans) / static_cast<double>(attrs.heads) + 10);
        alone = work < 30000;
        constexpr int64_t kBlock = 4;
        // Queries before heads: a thread then keeps to the rows of tokens that it has written.
        blocks_ = q.shape.sequences < 4 * m.threads ? ceil_div(vectors_, kBlock) : 1;
        tiles = pairs * blocks_;
    }
    void run(const Arena& arena, int64_t tile, int thread) const override {
        const int64_t head = tile % attrs_.heads, block = tile / attrs_.heads % blocks_, seq = tile / attrs_.heads / blocks_;
        AttentionJob j{};
        j.q = q_.shape.at(arena.at(q_.ref)), j.k = key_.shape.at(arena.at(key_.ref));
        j.v = v_.shape.at(arena.at(v_.ref)), j.out = out_.shape.at(arena.at(out_.ref));
        j.x_per_row_q = q_.shape.width, j.x_per_row_k = key_.shape.width;
        j.q0 = seq * vectors_, j.k0 = seq * key_.shape.padded / key_.shape.lanes;
        j.v0 = vectors_ * block / blocks_, j.v1 = vectors_ * (block + 1) / blocks_;
        j.queries = q_.shape.length, j.keys = key_.shape.length;
        j.dim = q_.shape.chans / attrs_.heads, j.dim_v = v_.shape.chans / attrs_.heads;
        j.head_q = head * j.dim, j.head_v = head * j.dim_v;
        j.scale = static_cast<float>(attrs_.scale), j.causal = attrs_.causal;
        if (mask_.ref.buffer >= 0) {
            j.mask = arena.at(mask_.ref) + seq * mask_.image + head * mask_.head;
            j.mask_row = mask_.row, j.mask_col = mask_.col;
        }
        j.scratch = reinterpret_cast<float*>(arena.scratch[static_cast<size_t>(thread)]);
        k_.attention(j);
    }
    size_t scratch_bytes() const override {
        return static_cast<size_t>((key_.shape.length + 4) * 4 * key_.shape.lanes) * 4;
    }

private:
    const Kernels& k_;
    Form q_, key_, v_, out_;
    Attrs attrs_;
    MaskSpec mask_;
    int64_t vectors_, blocks_;
};

class Mean final : public Step {
public:
    Mean(const Form& in, const Form& out, const Machine& m) : k_(*m.kernels), in_(in), out_(out) {
        path = "lanes";
        work = static_cast<double>(in.shape.groups * in.shape.rows * in.shape.width * in.shape.chans);
        alone = work < 30000;
        parts_ = alone || in.shape.groups >= 4 * m.threads ? 1 : std::min<int64_t>(in.shape.chans, 4 * m.threads);
        tiles = in.shape.groups * parts_;
    }
    void run(const Arena& arena, int64_t tile, int) const override {
        const LaneShape& s = in_.shape;
        PackJob j{};
        j.t = s.at(arena.at(in_.ref)), j.g = tile / parts_;
        j.plain_out = arena.at(out_.ref) + j.g * out_.shape.group_stride;
        const int64_t part = tile % parts_;
        j.c0 = s.chans * part / parts_, j.c1 = s.chans * (part + 1) / parts_;
        j.rows = s.rows, j.width = s.width, j.height = s.height, j.image_width = s.image_width, j.strips = s.strips;
        k_.mean(j);
    }

private:
    const Kernels& k_;
    Form in_, out_;
    int64_t parts_;
};

class Pack final : public Step {
public:
    Pack(const Ref& plain, const Form& lanes, bool unpack, const Machine& m)
        : k_(*m.kernels), plain_(plain), lanes_(lanes), unpack_(unpack) {
        path = unpack ? "unpack" : "pack";
        const LaneShape& s = lanes.shape;
        work = 4.0 * static_cast<double>(s.groups * s.rows * s.width * s.chans);
        alone = work < 60000;
        if (!alone && s.groups * s.rows < 4 * m.threads)
            parts_ = std::min<int64_t>(s.chans, ceil_div(4 * m.threads, s.groups * s.rows));
        tiles = s.groups * s.rows * parts_;
    }
    void run(const Arena& arena, int64_t tile, int) const override {
        const LaneShape& s = lanes_.shape;
        PackJob j{};
        const int64_t part = tile % parts_;
        tile /= parts_;
        j.t = s.at(arena.at(lanes_.ref));
        j.plain = j.plain_out = arena.at(plain_);
        j.g = tile / s.rows, j.r = tile % s.rows;
        j.c0 = s.chans * part / parts_, j.c1 = s.chans * (part + 1) / parts_;
        j.width = s.width, j.channels = s.chans, j.height = s.height, j.image_width = s.image_width;
        j.images = s.images, j.per_group = s.per_group, j.strips = s.strips, j.rows = s.rows;
        j.replicated = s.replicated;
        j.sequences = s.sequences, j.tokens = s.length, j.padded = s.padded, j.x_per_row = s.width;
        if (s.kind == Kind::tokens) (unpack_ ? k_.unpack_tokens : k_.pack_tokens)(j);
        else (unpack_ ? k_.unpack_image : k_.pack_image)(j);
        if (!unpack_ && s.bordered()) finish_rows(k_, s, j.t, j.g, j.r, j.c0, j.c1, 0, s.width);
    }

private:
    const Kernels& k_;
    Ref plain_;
    Form lanes_;
    bool unpack_;
    int64_t parts_ = 1;
};

}  // namespace

std::unique_ptr<Step> make_elementwise(const Form& out, const Form& a, const Form& b, const EltJob& job,
                                       std::vector<float> channels, std::vector<float> shift, const Machine& m) {
    return std::make_unique<Elementwise>(out, a, b, job, std::move(channels), std::move(shift), m);
}
std::unique_ptr<Step> make_pool(const Form& in, const Form& out, const PoolJob& job, const Machine& m) {
    return std::make_unique<Pooling>(in, out, job, m);
}
std::unique_ptr<Step> make_norm(const Form& in, const Form& out, std::vector<float> weight, std::vector<float> bias,
                                double eps, bool rms, const Machine& m) {
    return std::make_unique<Norm>(in, out, std::move(weight), std::move(bias), eps, rms, m);
}
std::unique_ptr<Step> make_softmax(const Form& in, const Form& out, const Machine& m) {
    return std::make_unique<Softmax>(in, out, m);
}
std::unique_ptr<Step> make_attention(const Form& q, const Form& k, const Form& v, const Form& out, const Attrs& attrs,
                                     const MaskSpec& mask, const Machine& m) {
    return std::make_unique<Attention>(q, k, v, out, attrs, mask, m);
}
std::unique_ptr<Step> make_mean(const Form& in, const Form& out, const Machine& m) {
    return std::make_unique<Mean>(in, out, m);
}
std::unique_ptr<Step> make_pack(const Ref& plain, const Form& lanes, bool unpack, const Machine& m) {
    return std::make_unique<Pack>(plain, lanes, unpack, m);
}

}  // namespace sec
