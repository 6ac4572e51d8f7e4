#include "pool.hpp"

#include <chrono>
#include <string>
#include <system_error>

#include "graph.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sec {
namespace {

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}
constexpr int kSpins = 64;                        // pauses between looks at the clock
constexpr auto kIdle = std::chrono::microseconds(50);
constexpr auto kActive = std::chrono::milliseconds(2);

}  // namespace

Pool::Pool(int threads) {
    workers_.reserve(static_cast<size_t>(threads > 1 ? threads - 1 : 0));
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error& e) {
        stop();                                       // those that did start
        throw Error(SEC_ERROR_MEMORY, "cannot start " + std::to_string(threads) + " threads (" + e.what() +
                                          "); use fewer threads");
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : workers_) t.join();
}

void Pool::publish(Run run, void* job, int64_t tiles) {
    // Closes the old epoch first: a late worker must not claim a tile of the new job under the old number. Release and
    // acquire on the fields make that hold on every machine: who sees a new field fails to claim under the old number.
    next_.store(static_cast<uint64_t>(epoch_) << 32 | 0xffffffffu);
    run_.store(run, std::memory_order_release);
    job_.store(job, std::memory_order_release);
    tiles_.store(tiles, std::memory_order_release);
    left_.store(tiles, std::memory_order_relaxed);
    ++epoch_;
    next_.store(static_cast<uint64_t>(epoch_) << 32);
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
}

// Takes one tile of this epoch and runs it. A claim succeeds only while the epoch is the one whose fields were read:
// publish() writes the fields before it changes the epoch, and no epoch ends before its last tile is done.
bool Pool::claim(uint32_t epoch, int thread) {
    uint64_t next = next_.load(std::memory_order_acquire);
    for (;;) {
        if (static_cast<uint32_t>(next >> 32) != epoch) return false;
        const Run run = run_.load(std::memory_order_acquire);
        void* job = job_.load(std::memory_order_acquire);
        const int64_t tile = static_cast<int64_t>(next & 0xffffffffu);
        if (tile == 0xffffffff || tile >= tiles_.load(std::memory_order_acquire)) return false;
        if (next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) {
            try {
                run(job, tile, thread);
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex_);
                if (!thrown_) thrown_ = std::current_exception();
                failed_ = true;
            }
            left_.fetch_sub(1, std::memory_order_acq_rel);
            return true;
        }
    }
}

void Pool::run(Run run, void* job, int64_t tiles) {
    if (tiles <= 1 || workers_.empty()) {
        for (int64_t i = 0; i < tiles; ++i) run(job, i, 0);
        return;
    }
    publish(run, job, tiles);
    while (claim(epoch_, 0)) {
    }
    for (int spins = 0; left_.load(std::memory_order_acquire) > 0; ++spins) {
        if (spins < 2000) pause();
        else std::this_thread::yield();
    }
    if (failed_.exchange(false)) {
        std::lock_guard<std::mutex> lock(mutex_);
        std::exception_ptr thrown;
        std::swap(thrown, thrown_);
        std::rethrow_exception(thrown);
    }
}

void Pool::begin() {
    if (workers_.empty()) return;
    active_ = true;
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
}
void Pool::end() { active_ = false; }

void Pool::work(int thread) {
    uint32_t seen = 0;
    for (;;) {
        const auto start = std::chrono::steady_clock::now();
        uint32_t epoch = seen;
        bool awake = true;
        while (awake && epoch == seen && !stop_.load(std::memory_order_relaxed)) {
            for (int i = 0; i < kSpins && epoch == seen; ++i) {
                pause();
                epoch = static_cast<uint32_t>(next_.load(std::memory_order_acquire) >> 32);
            }
            if (epoch != seen) break;
            const auto waited = std::chrono::steady_clock::now() - start;
            if (waited > kIdle) std::this_thread::yield();
            awake = waited < (active_.load() ? kActive : kIdle);
        }
        if (stop_) return;
        if (epoch == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleepers_.fetch_add(1);
            wake_.wait(lock, [&] {
                return stop_.load() || active_.load() || static_cast<uint32_t>(next_.load() >> 32) != seen;
            });
            sleepers_.fetch_sub(1);
            if (stop_) return;
            continue;
        }
        while (claim(epoch, thread)) {
        }
        seen = epoch;
    }
}

}  // namespace sec
