#include "builder.hpp"

#include <cstring>
#include <numeric>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace sec {

namespace {

// Under the address sanitizer no two buffers share memory, guarded floats lie behind each, and all begin as NaN:
// what reads outside of its buffer, or what nothing has written, is seen.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kChecked = true;
constexpr int64_t kGuard = 64;
void guard(float* p) { ASAN_POISON_MEMORY_REGION(p, kGuard * 4); }
#else
constexpr bool kChecked = false;
constexpr int64_t kGuard = 0;
void guard(float*) {}
#endif

constexpr int64_t kLarge = 1 << 18;                 // weights

// A node on plain arrays.
class Plain final : public Step {
public:
    Plain(std::unique_ptr<PlainOp> op, std::vector<Ref> in, std::vector<Ref> out)
        : op_(std::move(op)), in_(std::move(in)), out_(std::move(out)) {
        path = "plain";
        tiles = op_->parts();
        work = op_->work();
        alone = tiles == 1 || work < 20000;
    }
    void run(const Arena& arena, int64_t tile, int thread) const override {
        constexpr size_t kMost = 64;
        const void* in[kMost];
        void* out[8];
        for (size_t i = 0; i < in_.size(); ++i) in[i] = arena.at(in_[i]);
        for (size_t i = 0; i < out_.size(); ++i) out[i] = arena.at(out_[i]);
        op_->run(in, out, arena.scratch[static_cast<size_t>(thread)], tile);
    }
    size_t scratch_bytes() const override { return op_->scratch_bytes(); }

private:
    std::unique_ptr<PlainOp> op_;
    std::vector<Ref> in_, out_;
};

class Copy final : public Step {
public:
    Copy(const Ref& from, const Ref& to, int64_t bytes) : from_(from), to_(to), bytes_(bytes) {
        path = "copy";
        alone = true;
    }
    void run(const Arena& arena, int64_t, int) const override {
        std::memcpy(arena.at(to_), arena.at(from_), static_cast<size_t>(bytes_));
    }

private:
    Ref from_, to_;
    int64_t bytes_;
};

}  // namespace

Builder::Builder(const Graph& graph, int64_t batch, const Machine& machine, const Tuning& tuning, int64_t limit,
                 int arenas, const Mapping* file)
    : g_(graph), machine_(machine), tuning_(tuning), limit_(limit), arenas_(arenas), file_(file), out_(std::make_unique<Prepared>()) {
    out_->batch = batch;
    out_->shapes = infer(graph, batch, limit / 4);
    lay_ = choose_layouts(graph, out_->shapes, machine.kernels->lanes, tuning.strips);
    out_->spread = lay_.spread;
    const size_t n = graph.values.size();
    plain_.assign(n, Ref{}), forms_.assign(n, {}), output_buffer_.assign(n, -1);
}

std::string Builder::here() const {
    if (current_ < 0) return "the network";
    const Node& n = g_.nodes[at(current_)];
    return std::string(op_name(n.op)) + " '" + n.name + "'";
}

int Builder::new_buffer(int64_t floats, bool owned) {
    if (floats > limit_ / 4)
        throw Error(SEC_ERROR_MEMORY, here() + " needs " + std::to_string(floats * 4) + " bytes for one value, more than the "
                                          "limit of " + std::to_string(limit_) + "; use a smaller batch");
    Buffer b;
    b.floats = round_up(std::max<int64_t>(floats, 1), 16);
    b.owned = owned;
    buffers_.push_back(b);
    return static_cast<int>(buffers_.size()) - 1;
}

Ref Builder::new_plain(int value) {
    Ref& r = plain_[at(value)];
    const int64_t floats = count(shape(value)) * (g_.values[at(value)].dtype == Dtype::i64 ? 2 : 1);
    r.buffer = output_buffer_[at(value)] >= 0 ? output_buffer_[at(value)] : new_buffer(floats, true);
    r.offset = 0;
    return r;
}

const Form* Builder::any_lanes(int value) const {
    return forms_[at(value)].empty() ? nullptr : &forms_[at(value)].front();
}

Ref Builder::plain(int value) {
    if (plain_[at(value)].buffer >= 0) return plain_[at(value)];
    const Form* f = any_lanes(value);
    if (!f) throw Error(SEC_ERROR_INTERNAL, here() + " reads a value that nothing has written");
    const Form from = *f;
    const Ref r = new_plain(value);
    add(make_pack(r, from, true, machine_), {from.ref}, {r});
    return r;
}

void Builder::pack(int value, const Form& form) {
    const Ref from = plain(value);
    add(make_pack(from, form, false, machine_), {from}, {form.ref});
    forms_[at(value)].push_back(form);
}

Form Builder::lanes(int value, Slot slot, int64_t rows) {
    const int w = machine_.kernels->lanes;
    Form f;
    if (slot == Slot::image) {
        Reach reach = lay_.reach[at(value)];
        f.shape = image_shape(shape(value), rows, lay_.spread, reach, w);
    } else if (slot == Slot::single) {
        f.shape = replicated_shape(shape(value), lay_.spread, w);
    } else {
        f.shape = token_shape(shape(value), w, tuning_.vectors_per_row ? tuning_.vectors_per_row : 8);
    }
    return f;
}

Form Builder::image(int value, int64_t rows) {
    for (const Form& f : forms_[at(value)])
        if (f.shape.kind == Kind::image && !f.shape.replicated && f.shape.rows == rows) return f;
    Form f = lanes(value, Slot::image, rows);
    f.ref.buffer = new_buffer(f.shape.floats(), true), f.ref.offset = f.shape.origin();
    pack(value, f);
    return f;
}
Form Builder::tokens(int value) {
    for (const Form& f : forms_[at(value)])
        if (f.shape.kind == Kind::tokens) return f;
    Form f = lanes(value, Slot::tokens, 0);
    f.ref.buffer = new_buffer(f.shape.floats(), true), f.ref.offset = f.shape.origin();
    pack(value, f);
    return f;
}
Form Builder::single(int value) {
    for (const Form& f : forms_[at(value)])
        if (f.shape.kind == Kind::image && f.shape.replicated) return f;
    Form f = lanes(value, Slot::single, 0);
    f.ref.buffer = new_buffer(f.shape.floats(), true), f.ref.offset = f.shape.origin();
    pack(value, f);
    return f;
}

Form Builder::new_lanes(int value) {
    Form f = lanes(value, slot(value), lay_.rows[at(value)]);
    f.ref.buffer = new_buffer(f.shape.floats(), true), f.ref.offset = f.shape.origin();
    forms_[at(value)].push_back(f);
    return f;
}

void Builder::alias(int value, const Form& form) { forms_[at(value)].push_back(form); }

void Builder::add(std::unique_ptr<Step> step, const std::vector<Ref>& reads, const std::vector<Ref>& writes) {
    step->node = current_;
    for (const Ref& r : reads) step->reads.push_back(r.buffer);
    for (const Ref& r : writes) step->writes.push_back(r.buffer);
    out_->steps.push_back(std::move(step));
}

void Builder::lifetimes() {
    for (size_t i = 0; i < out_->steps.size(); ++i)
        for (const std::vector<int>* used : {&out_->steps[i]->reads, &out_->steps[i]->writes})
            for (int r : *used) {
                Buffer& b = buffers_[at(r)];
                if (b.first < 0) b.first = static_cast<int>(i);
                b.last = static_cast<int>(i);
            }
}

std::unique_ptr<Prepared> Builder::build() {
    for (size_t i = 0; i < g_.inputs.size(); ++i) {
        const Input& in = g_.inputs[i];
        const int b = new_buffer(count(shape(in.value)) * (in.dtype == Dtype::i64 ? 2 : 1), false);
        out_->input_buffers.push_back(b);
        plain_[at(in.value)] = {b, 0};
    }
    for (int v : g_.outputs) {
        const int b = new_buffer(count(shape(v)) * (g_.values[at(v)].dtype == Dtype::i64 ? 2 : 1), false);
        out_->output_buffers.push_back(b);
        if (plain_[at(v)].buffer < 0 && output_buffer_[at(v)] < 0) output_buffer_[at(v)] = b;
    }
    find_absorbed();
    for (size_t i = 0; i < g_.nodes.size(); ++i) {
        current_ = static_cast<int>(i);
        if (absorbed_[i]) continue;
        node(current_);
        const Weight* w = g_.nodes[i].weight("weight", g_);
        if (file_ && w && w->numel > kLarge) file_->forget();    // packed by now, or read again when it runs
    }
    current_ = -1;
    outputs();
    lifetimes();
    place_buffers();
    return std::move(out_);
}

void Builder::outputs() {
    for (size_t i = 0; i < g_.outputs.size(); ++i) {
        const int v = g_.outputs[i], b = out_->output_buffers[i];
        const Ref r = plain(v);
        if (r.buffer == b && r.offset == 0) continue;
        const int64_t bytes = count(shape(v)) * (g_.values[at(v)].dtype == Dtype::i64 ? 8 : 4);
        add(std::make_unique<Copy>(r, Ref{b, 0}, bytes), {r}, {Ref{b, 0}});
    }
}

// Greedy by size: the largest buffers first, each at the lowest place that is free for all of its life.
void Builder::place_buffers() {
    std::vector<size_t> order;
    for (size_t i = 0; i < buffers_.size(); ++i)
        if (buffers_[i].owned && buffers_[i].first >= 0) order.push_back(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return buffers_[a].floats > buffers_[b].floats; });
    std::vector<size_t> placed;
    int64_t total = 0;
    for (size_t i : order) {
        Buffer& b = buffers_[i];
        std::vector<std::pair<int64_t, int64_t>> taken;
        for (size_t j : placed) {
            const Buffer& o = buffers_[j];
            if (kChecked || (o.first <= b.last && b.first <= o.last)) taken.push_back({o.place, o.place + o.floats + kGuard});
        }
        std::sort(taken.begin(), taken.end());
        int64_t place = 0;
        for (const auto& t : taken) {
            if (place + b.floats + kGuard <= t.first) break;
            place = std::max(place, t.second);
        }
        b.place = place;
        total = std::max(total, place + b.floats + kGuard);
        placed.push_back(i);
    }
    make_arenas(round_up(total, 16), placed);
}

void Builder::make_arenas(int64_t floats, const std::vector<size_t>& placed) {
    const size_t threads = static_cast<size_t>(std::max(machine_.threads, arenas_)), copies = static_cast<size_t>(arenas_);
    size_t scratch = 0, held = 0;
    for (const auto& s : out_->steps) scratch = std::max(scratch, s->scratch_bytes()), held += s->held_bytes();
    scratch = (scratch + 127) / 64 * 64;
    const size_t bytes = static_cast<size_t>(floats) * 4;
    out_->bytes = bytes * copies + scratch * threads + held;
    if (static_cast<int64_t>(out_->bytes) > limit_)
        throw Error(SEC_ERROR_MEMORY, "batch " + std::to_string(out_->batch) + " needs " + std::to_string(out_->bytes) +
                                          " bytes, more than the limit of " + std::to_string(limit_) +
                                          "; use a smaller batch or a larger memory_limit");
    out_->memory = allocate(bytes * copies + 64);
    std::memset(out_->memory.get(), kChecked ? 0xFF : 0, bytes * copies);
    out_->scratch = allocate(scratch * threads + 64);
    out_->arenas.resize(copies);
    for (size_t copy = 0; copy < copies; ++copy) {
        Arena& a = out_->arenas[copy];
        float* memory = reinterpret_cast<float*>(out_->memory.get() + bytes * copy);
        a.base.assign(buffers_.size(), nullptr);
        for (size_t i = 0; i < buffers_.size(); ++i)
            if (buffers_[i].owned) a.base[i] = memory + buffers_[i].place;
        for (size_t i : placed) guard(a.base[i] + buffers_[i].floats);
        for (size_t t = 0; t < threads; ++t) a.scratch.push_back(out_->scratch.get() + scratch * t);
        // Constants are numbered by the order of their buffers, kept in `place`.
        for (size_t i = 0; i < buffers_.size(); ++i)
            if (!buffers_[i].owned && buffers_[i].place < 0)
                a.base[i] = out_->constants[static_cast<size_t>(-buffers_[i].place - 1)].data();
    }
}

std::unique_ptr<Prepared> prepare(const Graph& graph, int64_t batch, const Machine& machine, const Tuning& tuning,
                                  int64_t limit, int arenas, const Mapping* file) {
    return Builder(graph, batch, machine, tuning, limit, arenas, file).build();
}

// ---- nodes --------------------------------------------------------------------------------------------------------

void Builder::plain_node(const Node& n) {
    std::vector<Ref> in, out;
    std::vector<Shape> in_shapes, out_shapes;
    for (int v : n.in) in.push_back(plain(v)), in_shapes.push_back(shape(v));
    for (int v : n.out) out.push_back(new_plain(v)), out_shapes.push_back(shape(v));
    if (in.size() > 64) throw Error(SEC_ERROR_UNSUPPORTED, here() + " has more than 64 inputs");
    auto op = make_plain(n, g_, in_shapes, out_shapes, *machine_.kernels);
    auto step = std::make_unique<Plain>(std::move(op), in, out);
    if (const Weight* w = n.weight("weight", g_)) step->weights = w->numel, step->nonzeros = w->nnz;
    step->reason = n.op == Op::linear ? "one token" : "no lane form";
    add(std::move(step), in, out);
}

void Builder::constant(const Node& n) {
    const int b = new_buffer(1, false);
    out_->constants.push_back(dense_values(*n.weight("value", g_)));
    if (out_->constants.back().empty()) out_->constants.back().push_back(0.0f);
    buffers_[at(b)].place = -static_cast<int64_t>(out_->constants.size());
    plain_[at(n.out[0])] = {b, 0};
}

void Builder::reshape(const Node& n) {
    const int x = n.in[0], y = n.out[0];
    if (slot(y) == Slot::tokens) {
        Form f = tokens(x);
        const LaneShape s = token_shape(shape(y), f.shape.lanes, f.shape.width);
        f.shape.sequences = s.sequences, f.shape.length = s.length, f.shape.padded = s.padded;
        alias(y, f);
        return;
    }
    if (output_buffer_[at(y)] >= 0) return plain_node(n);
    plain_[at(y)] = plain(x);
}

void Builder::node(int index) {
    const Node& n = g_.nodes[at(index)];
    const Slot s = slot(n.out[0]);
    switch (n.op) {
        case Op::constant: return constant(n);
        case Op::reshape: return reshape(n);
        default: break;
    }
    if (s == Slot::plain && n.op == Op::reduce && slot(n.in[0]) == Slot::image && n.attrs.fn == Fn::mean &&
        n.attrs.axes == std::vector<int64_t>{2, 3})
        return plain_mean(n);
    if (s == Slot::plain) return plain_node(n);
    switch (n.op) {
        case Op::conv:
        case Op::linear: return product(n);
        case Op::max_pool:
        case Op::avg_pool: return pool(n);
        case Op::adaptive_avg_pool: return s == Slot::single ? mean(n) : pool(n);
        case Op::reduce: return mean(n);
        case Op::binary: return binary(n);
        case Op::unary: return unary(n);
        case Op::affine: return affine(n);
        case Op::layer_norm:
        case Op::rms_norm: return norm(n);
        case Op::softmax: return softmax(n);
        case Op::attention:
            if (!attention(n)) plain_node(n);
            return;
        case Op::concat: return concat(n);
        case Op::slice: return slice(n);
        default: throw Error(SEC_ERROR_INTERNAL, here() + " has a lane layout but no lane form");
    }
}

}  // namespace sec
