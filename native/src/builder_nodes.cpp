// How each operator is built over lanes.
#include "builder.hpp"

namespace sec {

namespace {

std::vector<float> floats(const Weight* w) { return w ? dense_values(*w) : std::vector<float>{}; }

}  // namespace

// A convolution that only feeds another's sum becomes part of that one: its result is never written.
void Builder::find_absorbed() {
    const size_t n = g_.nodes.size();
    absorbs_.assign(n, -1), absorbed_.assign(n, false);
    std::vector<int> producer(g_.values.size(), -1), readers(g_.values.size(), 0);
    last_reader_.assign(g_.values.size(), -1);
    for (size_t i = 0; i < n; ++i) {
        for (int v : g_.nodes[i].out) producer[at(v)] = static_cast<int>(i);
        for (int v : g_.nodes[i].in) ++readers[at(v)], last_reader_[at(v)] = static_cast<int>(i);
    }
    for (int v : g_.outputs) ++readers[at(v)], last_reader_[at(v)] = static_cast<int>(n);
    auto listed = [&](const Node& node) {
        const auto found = tuning_.layers.find(node.name);
        return node.op == Op::conv && node.attrs.groups == 1 && slot(node.out[0]) == Slot::image &&
               (found == tuning_.layers.end() || found->second.path == 0) &&
               !pays_as_blocks(*node.weight("weight", g_), machine_.kernels->block_mr);
    };
    for (size_t i = 0; i < n; ++i) {
        const Node& node = g_.nodes[i];
        if (node.op != Op::conv || node.in.size() < 2) continue;
        const int res = node.in[1], from = producer[at(res)];
        if (from < 0 || readers[at(res)] != 1 || lay_.rows[at(res)] != lay_.rows[at(node.out[0])]) continue;
        const Node& other = g_.nodes[at(from)];
        if (other.in.size() != 1 || other.attrs.act != Act::none || !listed(node) || !listed(other)) continue;
        absorbs_[i] = from, absorbed_[at(from)] = true;
    }
}

ProductSpec Builder::spec_of(const Node& n) {
    const int x = n.in[0], y = n.out[0];
    ProductSpec spec;
    spec.weight = n.weight("weight", g_), spec.bias = n.weight("bias", g_);
    spec.act = n.attrs.act;
    if (n.op == Op::conv) {
        const Window w = window_of(n, g_, out_->shapes);
        spec.kernel_h = w.kernel[0], spec.kernel_w = w.kernel[1], spec.stride_h = w.stride[0], spec.stride_w = w.stride[1];
        spec.dil_h = w.dilation[0], spec.dil_w = w.dilation[1], spec.pad_top = w.pad[0], spec.pad_left = w.pad[1];
        spec.groups = n.attrs.groups;
        spec.in = slot(y) == Slot::single ? single(x) : image(x, lay_.rows[at(x)]);
    } else {
        spec.in = tokens(x);
    }
    const LaneShape& i = spec.in.shape;
    const int64_t reach = (spec.kernel_h * spec.dil_h * i.row_stride + i.chans * i.chan_stride +
                           spec.kernel_w * spec.dil_w * i.lanes) * 4;
    if (reach > INT32_MAX || spec.weight->numel > INT32_MAX / 2)
        throw Error(SEC_ERROR_UNSUPPORTED, here() + " is too large for 32-bit offsets; use a smaller batch or image");
    return spec;
}

// May the sum take the place of its residual? Each position is read before it is written, by the same tile.
bool Builder::in_place(const Form& res, int value, int residual) const {
    if (last_reader_[at(residual)] > current_ || !buffers_[at(res.ref.buffer)].owned) return false;
    for (size_t v = 0; v < forms_.size(); ++v) {    // another value, or a part of one, that is still needed
        if (static_cast<int>(v) == residual || last_reader_[v] < current_) continue;
        bool here = plain_[v].buffer == res.ref.buffer;
        for (const Form& f : forms_[v]) here = here || f.ref.buffer == res.ref.buffer;
        if (here) return false;
    }
    LaneShape want = slot(value) == Slot::tokens ? token_shape(shape(value), res.shape.lanes, res.shape.width)
                                                 : image_shape(shape(value), lay_.rows[at(value)], lay_.spread,
                                                               lay_.reach[at(value)], res.shape.lanes);
    return want.same_place(res.shape) && want.chans == res.shape.chans && want.group_stride == res.shape.group_stride &&
           want.row_stride == res.shape.row_stride && want.chan_stride == res.shape.chan_stride &&
           want.origin() == res.shape.origin() && res.ref.offset == want.origin();
}

void Builder::product(const Node& n) {
    const int y = n.out[0], other = absorbs_[at(current_)];
    std::vector<ProductSpec> specs{spec_of(n)};
    if (other >= 0) specs.push_back(spec_of(g_.nodes[at(other)]));
    else if (n.in.size() > 1)
        specs[0].res = n.op == Op::linear ? tokens(n.in[1])
                                          : (slot(y) == Slot::single ? single(n.in[1]) : image(n.in[1], lay_.rows[at(y)]));
    const Form& res = specs[0].res;
    Form out;
    if (res.exists() && slot(y) != Slot::single && res.ref.buffer != specs[0].in.ref.buffer && in_place(res, y, n.in[1]))
        alias(y, out = res);
    else out = new_lanes(y);
    std::vector<Ref> reads;
    for (ProductSpec& s : specs) s.out = out, reads.push_back(s.in.ref);
    if (specs[0].res.exists()) reads.push_back(specs[0].res.ref);
    ProductChoice choice;
    const auto found = tuning_.layers.find(n.name);
    if (found != tuning_.layers.end()) choice = found->second;
    auto step = make_product(std::move(specs), choice, machine_);
    step->absorbed = other;
    add(std::move(step), reads, {out.ref});
}

void Builder::pool(const Node& n) {
    const int x = n.in[0], y = n.out[0];
    const Form in = image(x, lay_.rows[at(x)]), out = new_lanes(y);
    const Window w = window_of(n, g_, out_->shapes);
    PoolJob j{};
    j.kernel_h = w.kernel[0], j.kernel_w = w.kernel[1], j.stride_h = w.stride[0], j.stride_w = w.stride[1];
    j.dil_h = w.dilation[0], j.dil_w = w.dilation[1];
    j.pad_top = w.pad[0], j.pad_left = w.pad[1], j.pad_bottom = w.pad[2], j.pad_right = w.pad[3];
    j.maximum = n.op == Op::max_pool, j.count_pad = n.op == Op::avg_pool && n.attrs.count_pad;
    add(make_pool(in, out, j, machine_), {in.ref}, {out.ref});
}

void Builder::mean(const Node& n) {
    const int x = n.in[0];
    const Form in = image(x, lay_.rows[at(x)]), out = new_lanes(n.out[0]);
    add(make_mean(in, out, machine_), {in.ref}, {out.ref});
}

// The mean over a map that the network reads as [N, C]: taken in lanes, then written out.
void Builder::plain_mean(const Node& n) {
    const int x = n.in[0], y = n.out[0];
    const Form in = image(x, lay_.rows[at(x)]);
    Form middle;
    middle.shape = replicated_shape({shape(x)[0], shape(x)[1], 1, 1}, lay_.spread, in.shape.lanes);
    middle.ref.buffer = new_buffer(middle.shape.floats(), true), middle.ref.offset = middle.shape.origin();
    add(make_mean(in, middle, machine_), {in.ref}, {middle.ref});
    const Ref out = new_plain(y);
    add(make_pack(out, middle, true, machine_), {middle.ref}, {out});
}

void Builder::binary(const Node& n) {
    const BinaryPlan p = plan_binary(g_, n, out_->shapes, lay_.slot);
    const int a = n.in[at(p.lane)], b = n.in[at(1 - p.lane)], y = n.out[0];
    auto form = [&](int v) {
        if (p.slot == Slot::image) return image(v, lay_.rows[at(y)]);
        return p.slot == Slot::tokens ? tokens(v) : single(v);
    };
    const Form fa = form(a);
    Form fb;
    std::vector<float> channels;
    EltJob j{};
    j.fn = n.attrs.fn, j.act = n.attrs.act, j.swapped = p.lane == 1;
    if (p.other == Operand::same) fb = form(b), j.b_kind = 1;
    else if (p.other == Operand::single) fb = single(b), j.b_kind = 4;
    else channels = dense_values(*constant_of(g_, b)), j.b_kind = p.other == Operand::channel ? 2 : 3;
    const Form out = new_lanes(y);
    std::vector<Ref> reads{fa.ref};
    if (fb.exists()) reads.push_back(fb.ref);
    add(make_elementwise(out, fa, fb, j, std::move(channels), {}, machine_), reads, {out.ref});
}

void Builder::unary(const Node& n) {
    const int x = n.in[0], y = n.out[0];
    const Form in = slot(y) == Slot::image ? image(x, lay_.rows[at(y)]) : slot(y) == Slot::tokens ? tokens(x) : single(x);
    const Form out = new_lanes(y);
    EltJob j{};
    if (n.attrs.fn <= Fn::tanh) j.act = static_cast<Act>(n.attrs.fn);
    else j.fn = n.attrs.fn;
    add(make_elementwise(out, in, Form{}, j, {}, {}, machine_), {in.ref}, {out.ref});
}

void Builder::affine(const Node& n) {
    const int x = n.in[0], y = n.out[0];
    const Form in = slot(y) == Slot::image ? image(x, lay_.rows[at(y)]) : single(x);
    const Form out = new_lanes(y);
    EltJob j{};
    j.act = n.attrs.act;
    add(make_elementwise(out, in, Form{}, j, floats(n.weight("scale", g_)), floats(n.weight("shift", g_)), machine_),
        {in.ref}, {out.ref});
}

void Builder::norm(const Node& n) {
    const Form in = tokens(n.in[0]), out = new_lanes(n.out[0]);
    add(make_norm(in, out, floats(n.weight("weight", g_)), floats(n.weight("bias", g_)), n.attrs.eps,
                  n.op == Op::rms_norm, machine_),
        {in.ref}, {out.ref});
}

void Builder::softmax(const Node& n) {
    const Form in = tokens(n.in[0]), out = new_lanes(n.out[0]);
    add(make_softmax(in, out, machine_), {in.ref}, {out.ref});
}

bool Builder::attention(const Node& n) {
    const Form q = tokens(n.in[0]), k = tokens(n.in[1]), v = tokens(n.in[2]);
    if (q.shape.sequences != k.shape.sequences || k.shape.length != v.shape.length) return false;
    // Vector n of keys and of values must be found by one rule.
    if (k.shape.width != v.shape.width) return false;
    MaskSpec mask;
    std::vector<Ref> reads{q.ref, k.ref, v.ref};
    if (n.in.size() > 3) {
        mask.ref = plain(n.in[3]);
        reads.push_back(mask.ref);
        Shape s = shape(n.in[3]);
        s.insert(s.begin(), 4 - s.size(), 1);
        const int64_t stride[4] = {s[1] * s[2] * s[3], s[2] * s[3], s[3], 1};
        mask.image = s[0] == 1 ? 0 : stride[0], mask.head = s[1] == 1 ? 0 : stride[1];
        mask.row = s[2] == 1 ? 0 : stride[2], mask.col = s[3] == 1 ? 0 : 1;
    }
    const Form out = new_lanes(n.out[0]);
    add(make_attention(q, k, v, out, n.attrs, mask, machine_), reads, {out.ref});
    return true;
}

void Builder::concat(const Node& n) {
    const int y = n.out[0];
    const Form out = new_lanes(y);
    int64_t c = 0;
    for (int v : n.in) {
        const Form in = image(v, lay_.rows[at(y)]);
        Form part = out;
        part.ref.offset += c * out.shape.chan_stride;
        c += in.shape.chans;
        EltJob j{};
        add(make_elementwise(part, in, Form{}, j, {}, {}, machine_), {in.ref}, {out.ref});
    }
}

void Builder::slice(const Node& n) {
    const int x = n.in[0], y = n.out[0];
    Form f = slot(y) == Slot::image ? image(x, lay_.rows[at(y)]) : tokens(x);
    f.ref.offset += n.attrs.start * f.shape.chan_stride;
    f.shape.chans = shape(y)[slot(y) == Slot::image ? 1 : shape(y).size() - 1];
    alias(y, f);
}

}  // namespace sec
