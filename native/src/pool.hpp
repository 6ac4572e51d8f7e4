// Threads of one session. Each owns a run of a step's tiles, so that from step to step the same rows stay in the same
// core's cache; who is done takes from the others' ends. Workers spin for a moment, then sleep.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace sec {

class Pool {
public:
    using Run = void (*)(void* job, int64_t tile, int thread);
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    int threads() const { return static_cast<int>(workers_.size()) + 1; }
    // Calls run(job, i, thread) for every i below `tiles`, on all threads and the caller's; returns when all are done.
    // What a tile throws is thrown here, after the other tiles.
    void run(Run run, void* job, int64_t tiles);
    // Between these the workers spin longer: a run has many short steps.
    void begin();
    void end();

private:
    void work(int thread);
    void stop();
    struct alignas(64) Slot {
        std::atomic<uint64_t> range{0};       // epoch << 32 | first share << 16 | end
    };
    bool claim(uint32_t epoch, int thread);
    bool take(Slot& slot, uint32_t epoch, bool own, int thread);
    uint32_t epoch_of(int thread) const { return static_cast<uint32_t>(slots_[thread].range.load() >> 32); }
    void publish(Run run, void* job, int64_t tiles);

    std::vector<std::thread> workers_;
    std::unique_ptr<Slot[]> slots_;          // one for each thread
    int count_ = 1;
    std::atomic<Run> run_{nullptr};
    std::atomic<void*> job_{nullptr};
    std::atomic<int64_t> tiles_{0};
    std::atomic<int64_t> grain_{1};           // tiles of a share
    std::atomic<int64_t> left_{0};            // shares
    std::atomic<bool> active_{false}, stop_{false};
    std::atomic<int> sleepers_{0};
    uint32_t epoch_ = 0;
    std::exception_ptr thrown_;               // under mutex_
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace sec
