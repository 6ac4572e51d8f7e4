#include "round_trip.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <thread>

namespace sec {
namespace {

struct alignas(64) Word {
    std::atomic<int> value{0};
};

void wait_for(const Word& word, int wanted) {
    for (int spins = 0; word.value.load(std::memory_order_acquire) != wanted; ++spins)
        if (spins > 10000) std::this_thread::yield();  // one processor for both
}

}  // namespace

double round_trip() {
    constexpr int kTries = 5, kTrips = 4000;
    std::array<double, kTries> each{};
    Word there, back;
    std::thread other([&] {
        for (int i = 1; i <= kTries * kTrips; ++i) {
            wait_for(there, i);
            back.value.store(i, std::memory_order_release);
        }
    });
    for (int t = 0; t < kTries; ++t) {
        const auto start = std::chrono::steady_clock::now();
        for (int i = t * kTrips + 1; i <= (t + 1) * kTrips; ++i) {
            there.value.store(i, std::memory_order_release);
            wait_for(back, i);
        }
        each[static_cast<size_t>(t)] = std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / kTrips;
    }
    other.join();
    std::sort(each.begin(), each.end());
    return each[kTries / 2];
}

}  // namespace sec
