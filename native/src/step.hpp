// One unit of work in a planned run, and the memory that steps share.
#pragma once
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "graph.hpp"
#include "lanes.hpp"
#include "layout.hpp"

namespace sec {

struct FreeDeleter {
    void operator()(void* p) const { std::free(p); }
};
using Block = std::unique_ptr<char, FreeDeleter>;
Block allocate(size_t bytes);                       // 64-byte aligned, throws Error(SEC_ERROR_MEMORY)

struct Ref {
    int buffer = -1;
    int64_t offset = 0;                             // floats
};

// Addresses of all buffers of one planned batch size. Inputs and outputs are the caller's and change with each run.
struct Arena {
    std::vector<float*> base;
    std::vector<char*> scratch;                     // one for each thread
    float* at(const Ref& r) const { return base[static_cast<size_t>(r.buffer)] + r.offset; }
};

struct Form {                                       // a value in one layout
    Ref ref;
    LaneShape shape;
    bool exists() const { return ref.buffer >= 0; }
};

class Step {
public:
    virtual ~Step() = default;
    virtual void run(const Arena& arena, int64_t tile, int thread) const = 0;
    virtual size_t scratch_bytes() const { return 0; }
    virtual size_t held_bytes() const { return 0; } // weights packed for this step
    int64_t tiles = 1;
    double work = 0;                                // vector multiply-adds, roughly
    bool alone = false;                             // too small to share
    int node = -1;
    int absorbed = -1;                              // a node whose work this step does too
    std::string path, reason;
    int64_t nonzeros = 0, weights = 0;
    std::vector<int> reads, writes;                 // buffers
    double last_ms = 0;
};

struct Machine {
    const Kernels* kernels;
    int threads;
};

// Convolution, or linear over tokens, as lists or dense blocks.
struct ProductSpec {
    const Weight* weight;
    const Weight* bias;
    Form in, out, res;
    int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_top = 0, pad_left = 0, dil_h = 1, dil_w = 1;
    int64_t groups = 1;
    Act act = Act::none;
};
struct ProductChoice {                              // what tuning may fix; 0: decide by rule
    int path = 0;                                   // 1 lists, 2 blocks
    int64_t p = 0, chunk = 0, split = 0;
};
// Several specs: their sum, of one output; the activation and the residual are the first's.
std::unique_ptr<Step> make_product(std::vector<ProductSpec> specs, const ProductChoice& choice, const Machine& machine);
bool pays_as_blocks(const Weight& weight, int64_t block_rows);

std::unique_ptr<Step> make_elementwise(const Form& out, const Form& a, const Form& b, const EltJob& job,
                                       std::vector<float> channels, std::vector<float> shift, const Machine& machine);
std::unique_ptr<Step> make_pool(const Form& in, const Form& out, const PoolJob& job, const Machine& machine);
std::unique_ptr<Step> make_norm(const Form& in, const Form& out, std::vector<float> weight, std::vector<float> bias,
                                double eps, bool rms, const Machine& machine);
std::unique_ptr<Step> make_softmax(const Form& in, const Form& out, const Machine& machine);
struct MaskSpec {
    Ref ref;
    int64_t image = 0, head = 0, row = 0, col = 0;  // strides in floats, 0 where broadcast
};
std::unique_ptr<Step> make_attention(const Form& q, const Form& k, const Form& v, const Form& out, const Attrs& attrs,
                                     const MaskSpec& mask, const Machine& machine);
std::unique_ptr<Step> make_mean(const Form& in, const Form& out, const Machine& machine);
std::unique_ptr<Step> make_pack(const Ref& plain, const Form& lanes, bool unpack, const Machine& machine);

// Zero columns and halo rows around values just written.
void finish_rows(const Kernels& k, const LaneShape& s, const Lanes& t, int64_t g, int64_t r, int64_t c0, int64_t c1,
                 int64_t x0, int64_t x1);
// Lane masks of all rows of a map; empty when no row needs one.
std::vector<int32_t> row_masks(const LaneShape& s);

}  // namespace sec
