#include "layout.hpp"

namespace sec {
namespace {

void set_strides(LaneShape& s) {
    s.chan_stride = (s.halo.left + s.width + s.halo.right) * s.lanes;
    // Channels a multiple of 512 bytes apart would share a few cache sets.
    if (s.width > 1 && s.chan_stride * 4 % 512 == 0) s.chan_stride += s.lanes;
    s.row_stride = s.chans * s.chan_stride;
    s.group_stride = (s.halo.top + s.rows + s.halo.bottom) * s.row_stride;
}

}  // namespace

bool LaneShape::same_place(const LaneShape& o) const {
    if (kind != o.kind || groups != o.groups || rows != o.rows || width != o.width || lanes != o.lanes) return false;
    if (kind == Kind::tokens) return sequences == o.sequences && length == o.length && padded == o.padded;
    return replicated == o.replicated && strips == o.strips && height == o.height && images == o.images;
}

LaneShape image_shape(const Shape& shape, int64_t rows, const Spread& spread, const Reach& reach, int lanes) {
    LaneShape s;
    s.kind = Kind::image, s.lanes = lanes;
    s.images = shape[0], s.chans = shape[1], s.height = shape[2], s.image_width = s.width = shape[3];
    s.per_group = spread.images, s.strips = spread.strips;
    s.groups = ceil_div(s.images, s.per_group), s.rows = rows, s.halo = reach;
    set_strides(s);
    return s;
}

LaneShape replicated_shape(const Shape& shape, const Spread& spread, int lanes) {
    LaneShape s = image_shape(shape, 1, spread, Reach{}, lanes);
    s.replicated = true;
    return s;
}

LaneShape token_shape(const Shape& shape, int lanes, int64_t most_per_row) {
    LaneShape s;
    s.kind = Kind::tokens, s.lanes = lanes, s.chans = shape.back();
    const int64_t all = count(shape) / std::max<int64_t>(1, s.chans);
    if (shape.size() == 3 && shape[1] >= 8) s.sequences = shape[0], s.length = shape[1];
    else s.sequences = 1, s.length = all;
    s.padded = round_up(s.length, lanes);
    const int64_t vectors = s.sequences * s.padded / lanes;
    s.rows = std::max<int64_t>(1, ceil_div(vectors, most_per_row));
    s.width = std::max<int64_t>(1, ceil_div(vectors, s.rows));
    set_strides(s);
    return s;
}

}  // namespace sec
