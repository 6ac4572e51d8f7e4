// The weights of one product as records: what the kernel reads, in its order, with byte offsets into one input layout.
#pragma once
#include "step.hpp"

namespace sec {

struct Span {
    int64_t start, count;
};

class Packed {
public:
    // `block`: output channels of a unit. `x`, `rows`: the largest tile. `chunk`: bytes, 0 for the rule.
    Packed(const ProductSpec& spec, int64_t block, int64_t x, int64_t rows, int64_t chunk);
    int64_t length(int64_t unit) const;             // records of a unit, over all chunks
    // Within each part, units of equal length follow each other, so that the end of the kernel's loop can be foreseen.
    void build(const std::vector<int64_t>& splits);
    size_t bytes() const { return records_.size() + (begin_.size() + order_.size()) * 4; }

    int64_t chunks() const { return chunks_; }
    int64_t nonzeros() const { return nonzeros_; }
    int64_t weights() const { return static_cast<int64_t>(values_count_); }
    int64_t records() const { return records_count_; }
    void point(ListJob& job, int64_t chunk) const {
        job.records = records_.data();
        job.begin = begin_.data() + chunk * (units_ + 1);
        job.order = order_.data() + chunk * units_;
    }

private:
    void choose_chunks(int64_t x, int64_t rows, int64_t chunk);
    bool record(int64_t unit, int64_t ci, int64_t tap, uint8_t* out) const;
    int64_t offset(int64_t ci, int64_t tap) const;

    ProductSpec s_;
    int64_t mr_, outs_, per_group_in_, per_group_out_, taps_, units_;
    int64_t chunks_ = 1, chunk_channels_ = 0, nonzeros_ = 0, records_count_ = 0;
    size_t values_count_ = 0;
    std::vector<float> values_;                     // until build()
    std::vector<int32_t> counts_;                   // [chunk][units], until build()
    std::vector<uint8_t> records_;
    std::vector<int32_t> begin_;                    // [chunk][units + 1]
    std::vector<int32_t> order_;                    // [chunk][units]
};

}  // namespace sec
