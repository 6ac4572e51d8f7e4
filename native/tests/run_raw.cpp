// Runs plans on raw arrays, for tests that compare the results elsewhere:  run_raw LIST
// Each line of LIST: plan, batch, threads, instruction set, tuning, file of inputs, file for outputs; tabs between.
// A file holds all arrays of one side, one after the other, row-major, in the plan's order.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <vector>

#include "secateur.h"

namespace {

char error[1024];

void need(int code, const std::string& where) {
    if (code == SEC_OK) return;
    std::fprintf(stderr, "%s: %s\n", where.c_str(), error);
    std::exit(1);
}

size_t bytes_of(const sec_tensor& t) {
    size_t n = t.dtype == SEC_F32 ? 4 : 8;
    for (int i = 0; i < t.ndim; ++i) n *= static_cast<size_t>(t.shape[i]);
    return n;
}

void run(const std::vector<std::string>& field) {
    const std::string& path = field[0];
    const int64_t batch = std::atoll(field[1].c_str());
    sec_plan* plan = nullptr;
    sec_session* session = nullptr;
    need(sec_plan_open(path.c_str(), &plan, error, sizeof error), path);
    sec_options options{std::atoi(field[2].c_str()), 0, 0, field[3].c_str(), field[4].c_str()};
    need(sec_session_create(plan, &options, &session, error, sizeof error), path);
    std::ifstream file(field[5], std::ios::binary);
    std::string given(std::istreambuf_iterator<char>(file), {}), made;
    std::vector<sec_tensor> in(static_cast<size_t>(sec_plan_inputs(plan))), out(static_cast<size_t>(sec_plan_outputs(plan)));
    size_t at = 0, total = 0;
    for (size_t i = 0; i < in.size(); ++i) {
        need(sec_plan_input(plan, static_cast<int>(i), nullptr, &in[i]), path);
        if (in[i].ndim && in[i].shape[0] == 0) in[i].shape[0] = batch;
        in[i].data = &given[at];
        at += bytes_of(in[i]);
    }
    if (at != given.size()) std::fprintf(stderr, "%s: %zu bytes given, %zu read\n", path.c_str(), given.size(), at), std::exit(1);
    for (size_t i = 0; i < out.size(); ++i) {
        need(sec_session_output(session, batch, static_cast<int>(i), &out[i], error, sizeof error), path);
        total += bytes_of(out[i]);
    }
    made.resize(total);
    total = 0;
    for (sec_tensor& t : out) {
        t.data = &made[total];
        total += bytes_of(t);
    }
    need(sec_session_run(session, in.data(), static_cast<int>(in.size()), out.data(), static_cast<int>(out.size()), error,
                         sizeof error), path);
    sec_session_free(session);
    sec_plan_free(plan);
    std::ofstream(field[6], std::ios::binary).write(made.data(), static_cast<std::streamsize>(made.size()));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 2) return std::fprintf(stderr, "usage: %s LIST\n", argv[0]), 2;
    std::printf("%s\n", sec_isas());
    std::ifstream list(argv[1]);
    for (std::string line; std::getline(list, line);) {
        std::vector<std::string> field(1);
        for (char c : line) {
            if (c == '\t') field.emplace_back();
            else field.back().push_back(c);
        }
        if (field.size() != 7) return std::fprintf(stderr, "not seven fields: %s\n", line.c_str()), 2;
        run(field);
    }
    return 0;
}
