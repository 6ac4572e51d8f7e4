// A plan with threads and buffers.
#pragma once
#include <atomic>
#include <list>
#include <mutex>

#include "isa.hpp"
#include "pool.hpp"
#include "prepared.hpp"

namespace sec {

struct PlanData {
    std::unique_ptr<Mapping> file;
    Graph graph;
};

class Session {
public:
    Session(std::shared_ptr<const PlanData> plan, const sec_options& options);
    ~Session();
    void prepare_batch(int64_t batch);
    void output(int64_t batch, int index, sec_tensor& spec);
    void run(const sec_tensor* in, int in_count, const sec_tensor* out, int out_count);
    std::string explain(int64_t batch);
    void profile(bool on) { profile_ = on; }

private:
    struct Guard;
    // A batch as it is run: pieces that threads run each on its own, pieces that they share, and what is left over.
    struct Planned {
        int64_t batch = 0, piece = 0, apart_count = 0;
        std::shared_ptr<Prepared> apart, main, rest;
        std::vector<Shape> outputs;
        const Prepared& first() const { return apart ? *apart : *main; }
    };
    struct Call {                                       // the caller's arrays
        int64_t batch;
        const sec_tensor *in, *out;
    };
    Planned& find(int64_t batch);
    std::shared_ptr<Prepared> piece(int64_t size);
    void plan_apart(Planned& p) const;
    size_t held() const;
    int64_t check_inputs(const sec_tensor* in, int count) const;
    void check_outputs(const Planned& p, const sec_tensor* out, int count) const;
    void set_places(const Prepared& p, Arena& arena, int64_t first, const Call& call) const;
    void run_apart(const Planned& p, const Call& call);
    void run_alone(Prepared& p, int64_t first, const Call& call, int thread) const;
    void run_together(Prepared& p, int64_t first, const Call& call);
    void survive_fork();

    std::shared_ptr<const PlanData> plan_;
    Machine machine_;
    Tuning tuning_;
    int64_t limit_;
    std::unique_ptr<std::mutex> mutex_;
    std::unique_ptr<Pool> pool_;
    std::list<Planned> planned_;                        // latest used first
    std::atomic<bool> profile_{false};
    std::atomic<long> process_;
};

}  // namespace sec
