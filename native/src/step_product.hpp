// Products over lanes.
#pragma once
#include "packed.hpp"

namespace sec {

class Product final : public Step {
public:
    // One product, or two of the same output that are summed.
    Product(std::vector<ProductSpec> specs, const ProductChoice& choice, const Machine& machine);
    ~Product() override;
    void run(const Arena& arena, int64_t tile, int thread) const override;
    size_t held_bytes() const override;

private:
    struct Site;
    void describe();
    void choose_tiles(const ProductChoice& choice);
    void split_units();
    int64_t spans() const;                          // groups times spans of rows
    void point(ListJob& job, const Site& at, size_t source, int64_t x) const;
    void run_lists(ListJob job, const Span& x_range, const Site& at) const;
    void run_blocks(ListJob job, const Span& x_range, const Site& at) const;
    void run_part(const Arena& arena, int64_t span, const Span& xr, int64_t part0, int64_t part1) const;

    std::vector<ProductSpec> specs_;
    std::vector<Packed> packed_;
    const Kernels& k_;
    int threads_;
    bool blocks_ = false;
    int64_t outs_ = 0, mr_ = 1, units_ = 0, x_parts_ = 1;
    std::vector<Span> rows_, xs_;
    std::vector<int64_t> splits_;
    std::vector<float> bias_;
    std::vector<int32_t> masks_;
};

}  // namespace sec
