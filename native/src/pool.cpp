#include "pool.hpp"

#include <algorithm>
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
constexpr int64_t kMostShares = 0xfff0;
constexpr auto kActive = std::chrono::milliseconds(2);

}  // namespace

Pool::Pool(int threads) : slots_(new Slot[static_cast<size_t>(threads > 1 ? threads : 1)]), count_(threads > 1 ? threads : 1) {
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

// No epoch ends before its last share is taken, so a slot under an old number is empty; the fields are written before any
// slot carries the new number, so who takes a share under it has read the fields that belong to it.
void Pool::publish(Run run, void* job, int64_t tiles) {
    const int64_t grain = (tiles + kMostShares - 1) / kMostShares, shares = (tiles + grain - 1) / grain;
    run_.store(run, std::memory_order_relaxed);
    job_.store(job, std::memory_order_relaxed);
    tiles_.store(tiles, std::memory_order_relaxed);
    grain_.store(grain, std::memory_order_relaxed);
    left_.store(shares, std::memory_order_relaxed);
    ++epoch_;
    for (int t = 0; t < count_; ++t) {
        const uint64_t first = static_cast<uint64_t>(shares * t / count_), end = static_cast<uint64_t>(shares * (t + 1) / count_);
        slots_[t].range.store(static_cast<uint64_t>(epoch_) << 32 | first << 16 | end);
    }
    if (sleepers_.load() > 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
}

// Takes one share of this epoch from a slot and runs it: the owner the first, others the last.
bool Pool::take(Slot& slot, uint32_t epoch, bool own, int thread) {
    uint64_t range = slot.range.load(std::memory_order_acquire);
    for (;;) {
        const uint64_t first = range >> 16 & 0xffff, end = range & 0xffff;
        if (static_cast<uint32_t>(range >> 32) != epoch || first >= end) return false;
        const uint64_t rest = own ? range + (uint64_t{1} << 16) : range - 1;
        if (!slot.range.compare_exchange_weak(range, rest, std::memory_order_acq_rel)) continue;
        const Run run = run_.load(std::memory_order_relaxed);
        void* job = job_.load(std::memory_order_relaxed);
        const int64_t share = static_cast<int64_t>(own ? first : end - 1), grain = grain_.load(std::memory_order_relaxed);
        const int64_t stop = std::min((share + 1) * grain, tiles_.load(std::memory_order_relaxed));
        try {
            for (int64_t tile = share * grain; tile < stop; ++tile) run(job, tile, thread);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!thrown_) thrown_ = std::current_exception();
            failed_ = true;
        }
        left_.fetch_sub(1, std::memory_order_acq_rel);
        return true;
    }
}

bool Pool::claim(uint32_t epoch, int thread) {
    if (take(slots_[thread], epoch, true, thread)) return true;
    for (int i = 1; i < count_; ++i)
        if (take(slots_[(thread + i) % count_], epoch, false, thread)) return true;
    return false;
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
                epoch = epoch_of(thread);
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
                return stop_.load() || active_.load() || epoch_of(thread) != seen;
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
