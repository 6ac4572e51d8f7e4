// Hammers the thread pool, and sessions from several threads; made to be run under the thread sanitizer.
//   test_pool ROUNDS PLAN    exit status 0: every tile ran once, and every caller got the answer to its own input.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "pool.hpp"
#include "secateur.h"

namespace {

std::atomic<int> failures{0};

void check(bool holds, const char* what) {
    if (holds) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what);
}

// ---- the pool -----------------------------------------------------------------------------------------------------

struct Job {
    std::vector<int> ran;              // plain numbers: a tile that two threads run is a race
    std::vector<int64_t> by_thread;
    int64_t bad = -1;                  // the tile that throws
};
void tile(void* job, int64_t i, int thread) {
    Job& j = *static_cast<Job*>(job);
    ++j.ran[static_cast<size_t>(i)];
    ++j.by_thread[static_cast<size_t>(thread)];
    if (i == j.bad) throw std::runtime_error("tile " + std::to_string(i));
}

void one_job(sec::Pool& pool, int64_t tiles, bool throws) {
    Job job;
    job.ran.assign(static_cast<size_t>(tiles), 0);
    job.by_thread.assign(static_cast<size_t>(pool.threads()), 0);
    if (throws) job.bad = tiles / 2;
    bool caught = false;
    try {
        pool.run(tile, &job, tiles);
    } catch (const std::runtime_error& e) {
        caught = e.what() == "tile " + std::to_string(job.bad);
    }
    check(caught == throws, "what a tile throws is thrown by run");
    int64_t total = 0;
    for (int64_t n : job.by_thread) total += n;
    // With a single thread the first error ends the job.
    if (pool.threads() > 1 || !throws) {
        check(total == tiles, "all tiles ran");
        for (int n : job.ran) check(n == 1, "a tile ran once");
    }
}

void hammer_pool(int threads, int rounds) {
    std::mt19937 random(static_cast<unsigned>(threads));
    sec::Pool pool(threads);
    check(pool.threads() == threads, "the pool has the threads asked for");
    for (int r = 0; r < rounds; ++r) {
        const bool active = random() % 2;
        if (active) pool.begin();
        for (unsigned n = random() % 20; n > 0; --n)
            one_job(pool, static_cast<int64_t>(2 + random() % 40), random() % 16 == 0);
        if (active) pool.end();
        if (random() % 8 == 0) std::this_thread::yield();
    }
}

// The pool's owner may change from run to run, as long as callers take turns.
void hand_over(int rounds) {
    sec::Pool pool(3);
    for (int r = 0; r < rounds; ++r) std::thread([&] { one_job(pool, 17, false); }).join();
}

// ---- sessions -----------------------------------------------------------------------------------------------------

struct Arrays {
    std::vector<sec_tensor> tensors;
    std::vector<std::vector<char>> memory;
    void add(sec_tensor t) {
        size_t bytes = t.dtype == SEC_F32 ? 4 : 8;
        for (int i = 0; i < t.ndim; ++i) bytes *= static_cast<size_t>(t.shape[i]);
        memory.emplace_back(bytes, 0);
        t.data = memory.back().data();
        tensors.push_back(t);
    }
    int count() const { return static_cast<int>(tensors.size()); }
};

Arrays inputs(sec_plan* plan, int64_t batch, unsigned seed) {
    std::mt19937 random(seed);
    Arrays a;
    for (int i = 0; i < sec_plan_inputs(plan); ++i) {
        sec_tensor t;
        sec_plan_input(plan, i, nullptr, &t);
        if (t.ndim && t.shape[0] == 0) t.shape[0] = batch;
        a.add(t);
        if (t.dtype != SEC_F32) continue;
        float* p = reinterpret_cast<float*>(a.memory.back().data());
        for (size_t k = 0; k < a.memory.back().size() / 4; ++k) p[k] = static_cast<float>(random() % 2001) / 1000.0f - 1.0f;
    }
    return a;
}

Arrays run(sec_session* s, Arrays& in, int outputs, int64_t batch) {
    char error[512];
    Arrays out;
    for (int i = 0; i < outputs; ++i) {
        sec_tensor t;
        check(sec_session_output(s, batch, i, &t, error, sizeof error) == SEC_OK, "an output has a shape");
        out.add(t);
    }
    const int code = sec_session_run(s, in.tensors.data(), in.count(), out.tensors.data(), out.count(), error, sizeof error);
    if (code != SEC_OK) std::fprintf(stderr, "%s\n", error);
    check(code == SEC_OK, "a session runs");
    return out;
}

sec_session* session(sec_plan* plan, int threads) {
    sec_options options{};
    options.threads = threads;
    sec_session* s = nullptr;
    check(sec_session_create(plan, &options, &s, nullptr, 0) == SEC_OK, "a session is made");
    return s;
}

void hammer_session(sec_plan* plan, int rounds) {
    constexpr int kCallers = 4;
    const int outputs = sec_plan_outputs(plan);
    sec_session* shared = session(plan, 3);
    std::vector<Arrays> want;
    for (int64_t batch = 1; batch <= 6; ++batch) {
        Arrays in = inputs(plan, batch, static_cast<unsigned>(batch));
        want.push_back(run(shared, in, outputs, batch));
    }
    auto caller = [&](int number) {
        for (int r = 0; r < rounds; ++r) {
            const int64_t batch = 1 + (number + r) % 6;
            Arrays in = inputs(plan, batch, static_cast<unsigned>(batch));
            const Arrays out = run(shared, in, outputs, batch);
            check(out.memory == want[static_cast<size_t>(batch - 1)].memory, "the answer to the caller's own input");
            if (r % 4 == number) {
                sec_session_profile(shared, r % 8 == number);
                char text[4096];
                check(sec_session_explain(shared, batch, text, sizeof text) > 0, "a session explains");
                sec_session* own = session(plan, 2);
                run(own, in, outputs, batch);
                sec_session_free(own);
            }
        }
    };
    std::vector<std::thread> callers;
    for (int i = 0; i < kCallers; ++i) callers.emplace_back(caller, i);
    for (std::thread& t : callers) t.join();
    sec_session_free(shared);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) return std::fprintf(stderr, "usage: %s ROUNDS PLAN\n", argv[0]), 2;
    const int rounds = std::atoi(argv[1]);
    for (int threads : {1, 2, 3, 5}) hammer_pool(threads, rounds);
    hand_over(rounds / 4 + 1);
    char error[512];
    sec_plan* plan = nullptr;
    if (sec_plan_open(argv[2], &plan, error, sizeof error)) return std::fprintf(stderr, "%s\n", error), 2;
    hammer_session(plan, rounds / 4 + 1);
    sec_plan_free(plan);
    std::printf("%d failures\n", failures.load());
    return failures ? 1 : 0;
}
