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
    Prepared& find(int64_t batch);
    int64_t check_inputs(const sec_tensor* in, int count) const;
    void check_outputs(const Prepared& p, const sec_tensor* out, int count) const;
    void execute(Prepared& p);
    void survive_fork();

    std::shared_ptr<const PlanData> plan_;
    Machine machine_;
    Tuning tuning_;
    int64_t limit_;
    std::unique_ptr<std::mutex> mutex_;
    std::unique_ptr<Pool> pool_;
    std::list<std::unique_ptr<Prepared>> prepared_;     // latest used first
    std::atomic<bool> profile_{false};
    std::atomic<long> process_;
};

}  // namespace sec
