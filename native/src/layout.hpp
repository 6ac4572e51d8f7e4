// Where the values of a network lie in memory for one batch size.
#pragma once
#include <algorithm>
#include <cstdint>

#include "graph.hpp"
#include "lanes.hpp"

namespace sec {

enum class Kind { plain, image, tokens };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What the readers of a feature map look at outside of it (rows and columns).
struct Reach {
    int64_t top = 0, bottom = 0, left = 0, right = 0;
    void cover(const Reach& other) {
        top = std::max(top, other.top), bottom = std::max(bottom, other.bottom);
        left = std::max(left, other.left), right = std::max(right, other.right);
    }
};

struct LaneShape {
    Kind kind = Kind::plain;
    int lanes = 8;
    int64_t groups = 1, rows = 1, chans = 1, width = 1;
    Reach halo;
    int64_t chan_stride = 0, row_stride = 0, group_stride = 0;            // floats
    // image: lane = image * strips + strip; row r of strip s is image row s * rows + r
    int64_t images = 1, per_group = 1, strips = 1, height = 1, image_width = 1;
    bool replicated = false;                                             // 1x1 map, the same in every strip's lane
    // tokens: vector n holds tokens n*lanes .. of the padded sequences, `width` vectors to a row
    int64_t sequences = 1, length = 1, padded = 1;

    int64_t floats() const { return groups * group_stride; }
    int64_t origin() const { return halo.top * row_stride + halo.left * lanes; }
    bool same_place(const LaneShape& o) const;                           // same geometry, any halo, any channels
    Lanes at(float* base) const { return {base, group_stride, row_stride, chan_stride}; }
    bool bordered() const { return halo.top || halo.bottom || halo.left || halo.right; }
    bool masked(int64_t row) const { return !replicated && kind == Kind::image && (strips - 1) * rows + row >= height; }
};

// How images are spread over lanes.
struct Spread {
    int64_t images = 1;       // in a group
    int64_t strips = 8;
};

LaneShape image_shape(const Shape& shape, int64_t rows, const Spread& spread, const Reach& reach, int lanes);
LaneShape replicated_shape(const Shape& shape, const Spread& spread, int lanes);
LaneShape token_shape(const Shape& shape, int lanes, int64_t most_per_row);

}  // namespace sec
