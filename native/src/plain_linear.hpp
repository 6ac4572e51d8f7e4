// A weight matrix that multiplies rows, sparse or dense, whichever is faster.
#pragma once
#include <vector>

#include "lanes.hpp"

namespace sec {
namespace plain {

// Rows of x or y (or of a residual), `step` floats apart.
struct Rows {
    float* base;
    int64_t step;
};
struct ConstRows {
    const float* base;
    int64_t step;
};

class Projection {
public:
    Projection(std::vector<float> dense, int64_t rows, int64_t cols, const Kernels& kernels);

    // y[m][r] = act(bias[r] + w[r] . x[m] + res[m][r]) for r in first .. last and m in 0 .. count.
    void apply(int64_t first, int64_t last, int64_t count, ConstRows x, const float* bias, ConstRows res, Rows y,
               Act act) const;
    int64_t rows() const { return rows_; }
    int64_t stored() const { return stored_; }       // multiply-adds for one row of x
    // The first row whose predecessors hold at least part / parts of the work.
    int64_t boundary(int64_t part, int64_t parts) const;

private:
    void compress(const std::vector<float>& dense);
    int64_t before(int64_t row) const;               // work of all rows before this one

    int64_t rows_, cols_, stored_;
    bool sparse_;
    const Kernels& kernels_;
    std::vector<float> values_;
    std::vector<int32_t> ptr_;
    std::vector<uint16_t> index_;
};

}  // namespace plain
}  // namespace sec
