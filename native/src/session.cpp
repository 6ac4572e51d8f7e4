#include "session.hpp"

#include <chrono>
#include <cstdio>
#include <set>
#include <limits>

#if defined(_WIN32)
#include <process.h>
#else
#include <unistd.h>
#endif

#include "json.hpp"

namespace sec {
namespace {

constexpr size_t kKept = 4;                          // planned batch sizes
constexpr int64_t kDefaultLimit = int64_t{16} << 30;
constexpr int kMostThreads = 256;

long process_id() {
#if defined(_WIN32)
    return _getpid();
#else
    return getpid();
#endif
}

std::string text(const Shape& s) {
    std::string out = "[";
    for (size_t i = 0; i < s.size(); ++i) out += (i ? ", " : "") + std::to_string(s[i]);
    return out + "]";
}

std::string quoted(const std::string& s) {
    std::string out = "\"";
    for (char c : s) {
        if (c == '"' || c == '\\') out += '\\', out += c;
        else if (static_cast<unsigned char>(c) < 0x20) {
            char b[8];
            std::snprintf(b, sizeof b, "\\u%04x", c);
            out += b;
        } else out += c;
    }
    return out + "\"";
}

int64_t whole(const json::Value& v, const std::string& name) {
    if (!v.is(json::Kind::number) || !v.exact || v.integer < 0 || v.integer > (int64_t{1} << 30))
        throw Error(SEC_ERROR_ARGUMENT, "tuning: " + name + " must be a whole number that is not negative");
    return v.integer;
}

ProductChoice layer_choice(const json::Value& v, const std::string& layer) {
    ProductChoice c;
    if (!v.is(json::Kind::object)) throw Error(SEC_ERROR_ARGUMENT, "tuning: layer '" + layer + "' must be an object");
    for (size_t i = 0; i < v.keys.size(); ++i) {
        const std::string& k = v.keys[i];
        if (k == "path") {
            const std::string& p = v.items[i].text;
            if (p != "lists" && p != "blocks")
                throw Error(SEC_ERROR_ARGUMENT, "tuning: path of '" + layer + "' is '" + p + "', not lists or blocks");
            c.path = p == "lists" ? 1 : 2;
        } else if (k == "p") c.p = whole(v.items[i], "p");
        else if (k == "chunk") c.chunk = whole(v.items[i], "chunk");
        else throw Error(SEC_ERROR_ARGUMENT, "tuning: '" + k + "' is not one of path, p, chunk");
    }
    return c;
}

Tuning read_tuning(const char* source) {
    Tuning t;
    if (!source || !*source) return t;
    const std::string all = source;
    json::Value v;
    try {
        v = json::parse(all.data(), all.size(), "tuning");
    } catch (const Error& e) {
        throw Error(SEC_ERROR_ARGUMENT, e.what());
    }
    if (!v.is(json::Kind::object)) throw Error(SEC_ERROR_ARGUMENT, "tuning must be a JSON object");
    for (size_t i = 0; i < v.keys.size(); ++i) {
        const std::string& k = v.keys[i];
        if (k == "strips") t.strips = whole(v.items[i], k);
        else if (k == "vectors") t.vectors_per_row = whole(v.items[i], k);
        else if (k == "piece") t.piece = whole(v.items[i], k);
        else if (k == "layers" && v.items[i].is(json::Kind::object))
            for (size_t j = 0; j < v.items[i].keys.size(); ++j)
                t.layers[v.items[i].keys[j]] = layer_choice(v.items[i].items[j], v.items[i].keys[j]);
        else throw Error(SEC_ERROR_ARGUMENT, "tuning: '" + k + "' is not one of strips, vectors, piece, layers");
    }
    return t;
}

struct Task {
    const Step* step;
    const Arena* arena;
};
void run_tile(void* job, int64_t tile, int thread) {
    const Task* t = static_cast<const Task*>(job);
    t->step->run(*t->arena, tile, thread);
}

}  // namespace

struct Session::Guard {
    explicit Guard(Session& s) : lock((s.survive_fork(), *s.mutex_)) {}
    std::lock_guard<std::mutex> lock;
};

Session::Session(std::shared_ptr<const PlanData> plan, const sec_options& o)
    : plan_(std::move(plan)), mutex_(std::make_unique<std::mutex>()), process_(process_id()) {
    if (o.threads < 0 || o.threads > kMostThreads)
        throw Error(SEC_ERROR_ARGUMENT, "threads is " + std::to_string(o.threads) + ", not 0 (all cores) to " +
                                            std::to_string(kMostThreads));
    if (o.memory_limit < 0) throw Error(SEC_ERROR_ARGUMENT, "memory_limit is negative");
    machine_.kernels = &pick_kernels(o.isa);
    machine_.threads = o.threads ? o.threads : usable_cores();
    tuning_ = read_tuning(o.tuning);
    limit_ = o.memory_limit ? o.memory_limit : kDefaultLimit;
    const int64_t s = tuning_.strips;
    if (s && (s > machine_.kernels->lanes || (s & (s - 1))))
        throw Error(SEC_ERROR_ARGUMENT, "tuning: strips is " + std::to_string(s) + ", not a power of two up to " +
                                            std::to_string(machine_.kernels->lanes));
    pool_ = std::make_unique<Pool>(machine_.threads);
}

Session::~Session() {
    if (process_.load() != process_id()) {           // the threads stayed in the parent process
        (void)pool_.release();
        (void)mutex_.release();
    }
}

// A fork copies no threads and may copy a held lock: the child starts with new ones and leaves the old ones alone.
void Session::survive_fork() {
    const long now = process_id();
    long known = process_.load();
    if (known == now) return;
    if (known != -1 && process_.compare_exchange_strong(known, -1)) {
        try {
            auto mutex = std::make_unique<std::mutex>();
            auto pool = std::make_unique<Pool>(machine_.threads);
            (void)pool_.release();
            (void)mutex_.release();
            mutex_ = std::move(mutex);
            pool_ = std::move(pool);
        } catch (...) {
            process_ = known;                        // the next call tries again
            throw;
        }
        process_ = now;
    }
    while (process_.load() != now) std::this_thread::yield();
}

std::shared_ptr<Prepared> Session::piece(int64_t size) {
    for (const Planned& p : planned_) {
        if (p.main && p.main->batch == size) return p.main;
        if (p.rest && p.rest->batch == size) return p.rest;
    }
    return prepare(plan_->graph, size, machine_, tuning_, limit_, 1, plan_->file.get());
}

// Bytes of everything planned; several batches may share a piece.
size_t Session::held() const {
    std::set<const Prepared*> seen;
    size_t bytes = 0;
    for (const Planned& p : planned_)
        for (const Prepared* one : {p.apart.get(), p.main.get(), p.rest.get()})
            if (one && seen.insert(one).second) bytes += one->bytes;
    return bytes;
}

// Where there are pieces for every thread, each runs its own: nothing to wait for, and no core reads what another wrote.
void Session::plan_apart(Planned& p) const {
    const int64_t pieces = p.batch / p.piece, count = pieces - pieces % machine_.threads;
    if (machine_.threads == 1 || count == 0) return;
    for (const Planned& other : planned_)
        if (other.apart && other.piece == p.piece) p.apart = other.apart;
    Machine one = machine_;
    one.threads = 1;
    try {
        if (!p.apart) p.apart = prepare(plan_->graph, p.piece, one, tuning_, limit_, machine_.threads, plan_->file.get());
        p.apart_count = count;
    } catch (const Error& e) {
        if (e.status != SEC_ERROR_MEMORY) throw;        // there may be room for one
    }
}

Session::Planned& Session::find(int64_t batch) {
    for (auto it = planned_.begin(); it != planned_.end(); ++it)
        if (it->batch == batch) {
            planned_.splice(planned_.begin(), planned_, it);
            return planned_.front();
        }
    const Graph& g = plan_->graph;
    Planned p;
    p.batch = batch;
    const std::vector<Shape> shapes = infer(g, batch, limit_ / 4);
    for (int v : g.outputs) p.outputs.push_back(shapes[static_cast<size_t>(v)]);
    p.piece = tuning_.piece ? std::min(tuning_.piece, batch) : piece_of(g, batch);
    if (p.piece < batch && piece_of(g, std::numeric_limits<int32_t>::max()) == std::numeric_limits<int32_t>::max())
        p.piece = batch;                             // the examples cannot be kept apart
    plan_apart(p);
    if (batch / p.piece > p.apart_count) p.main = piece(p.piece);
    if (batch % p.piece) p.rest = piece(batch % p.piece);
    planned_.push_front(std::move(p));
    while (planned_.size() > 1 && (planned_.size() > kKept || held() > static_cast<size_t>(limit_))) planned_.pop_back();
    return planned_.front();
}

void Session::prepare_batch(int64_t batch) {
    if (batch < 1) throw Error(SEC_ERROR_ARGUMENT, "batch is " + std::to_string(batch) + ", not at least 1");
    Guard guard(*this);
    find(plan_->graph.batched ? batch : 1);
}

void Session::output(int64_t batch, int index, sec_tensor& spec) {
    if (batch < 1) throw Error(SEC_ERROR_ARGUMENT, "batch is " + std::to_string(batch) + ", not at least 1");
    if (index < 0 || static_cast<size_t>(index) >= plan_->graph.outputs.size())
        throw Error(SEC_ERROR_ARGUMENT, "there is no output " + std::to_string(index));
    Guard guard(*this);
    const Planned& p = find(plan_->graph.batched ? batch : 1);
    const size_t v = static_cast<size_t>(plan_->graph.outputs[static_cast<size_t>(index)]);
    const Shape& s = p.outputs[static_cast<size_t>(index)];
    if (s.size() > SEC_MAX_DIMS) throw Error(SEC_ERROR_UNSUPPORTED, "an output has more than 8 dimensions");
    spec.dtype = plan_->graph.values[v].dtype == Dtype::f32 ? SEC_F32 : SEC_I64;
    spec.ndim = static_cast<int32_t>(s.size());
    for (size_t i = 0; i < s.size(); ++i) spec.shape[i] = s[i];
}

int64_t Session::check_inputs(const sec_tensor* in, int n) const {
    const Graph& g = plan_->graph;
    if (n < 0 || static_cast<size_t>(n) != g.inputs.size() || (n && !in))
        throw Error(SEC_ERROR_ARGUMENT, std::to_string(n) + " inputs given, the network has " + std::to_string(g.inputs.size()));
    int64_t batch = -1;
    for (size_t i = 0; i < g.inputs.size(); ++i) {
        const Input& want = g.inputs[i];
        const sec_tensor& t = in[i];
        const std::string who = "input '" + want.name + "'";
        if (t.dtype != (want.dtype == Dtype::f32 ? SEC_F32 : SEC_I64))
            throw Error(SEC_ERROR_ARGUMENT, who + " must be " + (want.dtype == Dtype::f32 ? "float32" : "int64"));
        bool same = t.ndim >= 0 && static_cast<size_t>(t.ndim) == want.shape.size();
        for (size_t d = 0; same && d < want.shape.size(); ++d) {
            if (d == 0 && want.shape[0] == 0) {
                if (batch < 0) batch = t.shape[0];
                same = t.shape[0] == batch && batch >= 1;
            } else {
                same = t.shape[d] == want.shape[d];
            }
        }
        if (!same) {
            Shape got;
            for (int d = 0; d < t.ndim && d < SEC_MAX_DIMS; ++d) got.push_back(t.shape[d]);
            throw Error(SEC_ERROR_ARGUMENT, who + " has shape " + text(got) + ", the network takes " + text(want.shape) +
                                                (want.shape.empty() || want.shape[0] ? "" : " (0 = the batch, at least 1)"));
        }
        if (!t.data) throw Error(SEC_ERROR_ARGUMENT, who + " has no data");
    }
    return batch < 0 ? 1 : batch;
}

void Session::check_outputs(const Planned& p, const sec_tensor* out, int n) const {
    const Graph& g = plan_->graph;
    if (n < 0 || static_cast<size_t>(n) != g.outputs.size() || (n && !out))
        throw Error(SEC_ERROR_ARGUMENT, std::to_string(n) + " outputs given, the network has " + std::to_string(g.outputs.size()));
    for (size_t i = 0; i < g.outputs.size(); ++i) {
        const size_t v = static_cast<size_t>(g.outputs[i]);
        const Shape& want = p.outputs[i];
        const int32_t type = g.values[v].dtype == Dtype::f32 ? SEC_F32 : SEC_I64;
        bool same = out[i].dtype == type && out[i].ndim >= 0 && static_cast<size_t>(out[i].ndim) == want.size() && out[i].data;
        for (size_t d = 0; same && d < want.size(); ++d) same = out[i].shape[d] == want[d];
        if (!same) throw Error(SEC_ERROR_ARGUMENT, "output " + std::to_string(i) + " must have shape " + text(want));
    }
}

void Session::run_together(Prepared& p, int64_t first, const Call& call) {
    using clock = std::chrono::steady_clock;
    const bool timed = profile_.load();
    Arena& arena = p.arenas[0];
    set_places(p, arena, first, call);
    pool_->begin();
    try {
        for (auto& step : p.steps) {
            const auto start = timed ? clock::now() : clock::time_point{};
            if (step->alone || machine_.threads == 1) {
                for (int64_t i = 0; i < step->tiles; ++i) step->run(arena, i, 0);
            } else {
                Task t{step.get(), &arena};
                pool_->run(run_tile, &t, step->tiles);
            }
            if (timed) step->last_ms = std::chrono::duration<double, std::milli>(clock::now() - start).count();
        }
    } catch (...) {
        pool_->end();
        throw;
    }
    pool_->end();
}

// One piece on one thread. The first thread's steps are the ones that are timed.
void Session::run_alone(Prepared& p, int64_t first, const Call& call, int thread) const {
    using clock = std::chrono::steady_clock;
    const bool timed = thread == 0 && profile_.load();
    Arena& arena = p.arenas[static_cast<size_t>(thread)];
    set_places(p, arena, first, call);
    for (auto& step : p.steps) {
        const auto start = timed ? clock::now() : clock::time_point{};
        for (int64_t i = 0; i < step->tiles; ++i) step->run(arena, i, thread);
        if (timed) step->last_ms = std::chrono::duration<double, std::milli>(clock::now() - start).count();
    }
}

void Session::run_apart(const Planned& p, const Call& call) {
    struct Job {
        const Session* session;
        const Planned* planned;
        const Call* call;
    } job{this, &p, &call};
    pool_->run(
        [](void* j, int64_t piece, int thread) {
            const Job& job = *static_cast<const Job*>(j);
            job.session->run_alone(*job.planned->apart, piece * job.planned->piece, *job.call, thread);
        },
        &job, p.apart_count);
}

void Session::set_places(const Prepared& p, Arena& arena, int64_t first, const Call& call) const {
    auto place = [&](const sec_tensor& t, int buffer) {
        int64_t bytes = t.dtype == SEC_F32 ? 4 : 8;
        for (int i = 0; i < t.ndim; ++i) bytes *= t.shape[i];
        // Pieces are cut only where every input and output either has the batch in front or is the same for all.
        const int64_t skip = first ? bytes / call.batch * first : 0;
        arena.base[static_cast<size_t>(buffer)] = reinterpret_cast<float*>(static_cast<char*>(t.data) + skip);
    };
    const Graph& g = plan_->graph;
    for (size_t i = 0; i < g.inputs.size(); ++i) {
        if (g.inputs[i].shape.empty() || g.inputs[i].shape[0] != 0)
            arena.base[static_cast<size_t>(p.input_buffers[i])] = static_cast<float*>(call.in[i].data);
        else place(call.in[i], p.input_buffers[i]);
    }
    for (size_t i = 0; i < g.outputs.size(); ++i) place(call.out[i], p.output_buffers[i]);
}

void Session::run(const sec_tensor* in, int in_count, const sec_tensor* out, int out_count) {
    const int64_t batch = check_inputs(in, in_count);
    Guard guard(*this);
    Planned& p = find(batch);
    check_outputs(p, out, out_count);
    const Call call{batch, in, out};
    int64_t at = p.apart_count * p.piece;
    if (at) run_apart(p, call);
    for (; at + p.piece <= batch; at += p.piece) run_together(*p.main, at, call);
    if (p.rest) run_together(*p.rest, at, call);
}

std::string Session::explain(int64_t batch) {
    Guard guard(*this);
    const Planned& planned = find(plan_->graph.batched ? batch : 1);
    const Prepared& p = planned.first();
    std::string s = "{\"isa\": " + quoted(machine_.kernels->name) + ", \"threads\": " + std::to_string(machine_.threads) +
                    ", \"lanes\": " + std::to_string(machine_.kernels->lanes) + ", \"strips\": " +
                    std::to_string(p.spread.strips) + ", \"batch\": " + std::to_string(planned.batch) + ", \"piece\": " + std::to_string(planned.piece) + ", \"bytes\": " +
                    std::to_string(p.bytes) + ", \"steps\": [";
    bool comma = false;
    auto row = [&](const Step& step, int node, const std::string& reason, int64_t nonzeros, int64_t weights, double ms) {
        const Node* n = node >= 0 ? &plan_->graph.nodes[static_cast<size_t>(node)] : nullptr;
        char number[64];
        std::snprintf(number, sizeof number, "%.6f", ms);
        s += std::string(comma ? ", " : "") + "{\"node\": " + quoted(n ? n->name : "output") + ", \"op\": " +
             quoted(n ? op_name(n->op) : "output") + ", \"path\": " + quoted(step.path) + ", \"reason\": " + quoted(reason) +
             ", \"nonzeros\": " + std::to_string(nonzeros) + ", \"weights\": " + std::to_string(weights) +
             ", \"tiles\": " + std::to_string(step.tiles) + ", \"ms\": " + number;
        if (n) s += ", \"shape\": " + text(p.shapes[static_cast<size_t>(n->out[0])]);
        s += "}";
        comma = true;
    };
    for (const auto& step : p.steps) {
        row(*step, step->node, step->reason, step->nonzeros, step->weights, step->last_ms);
        if (step->absorbed < 0) continue;
        const Node &by = plan_->graph.nodes[static_cast<size_t>(step->node)],
                   &one = plan_->graph.nodes[static_cast<size_t>(step->absorbed)];
        const Weight* w = one.weight("weight", plan_->graph);
        row(*step, step->absorbed, "summed within '" + by.name + "'", w->nnz, w->numel, 0.0);
    }
    return s + "]}";
}

}  // namespace sec
