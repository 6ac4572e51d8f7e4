// What the planner and the kernels of one instruction set say to each other: lane tensors, jobs, the kernel table.
// Only plain data here: this header is read by units compiled with different instruction-set flags.
//
// Lane layout. L lanes = (image, row strip) pairs of a feature map, or 8 tokens of a sequence. A tensor is
// [group][row][channel][x][L]: each step of a kernel is one aligned load of L values that share channel, row and x.
#pragma once
#include <cstddef>
#include <cstdint>

#include "graph.hpp"

namespace sec {

// Strides in floats. `base` points to (group 0, row 0, channel 0, x 0); halo rows and columns lie before and after.
struct Lanes {
    float* base;
    int64_t group_stride, row_stride, chan_stride;
    float* at(int64_t g, int64_t r, int64_t c, int64_t x, int lanes) const {
        return base + g * group_stride + r * row_stride + c * chan_stride + x * lanes;
    }
};

// One record of a list: where the input lies (bytes from the tile's base), and MR weights for MR output channels.
// In memory: int32 offset, then MR floats. A list ends with one spare record (the kernel reads one offset ahead).

struct ListJob {
    const char* in;            // input at (row, x0) of this tile
    const uint8_t* records;    // of this chunk
    const int32_t* begin;      // record index for each unit (MR channels) of this chunk; units + 1 entries
    const int32_t* order;      // lists: output channel of each unit of this chunk, longest lists first
    int64_t first_unit, last_unit;
    int64_t channels;          // output channels in all, for the last unit's tail
    char* out;                 // output at (row, channel 0, x0)
    int64_t out_chan;          // bytes between output channels
    const char* res;           // residual at (row, channel 0, x0), or null
    int64_t res_chan;
    const float* bias;         // by channel, or null
    const int32_t* mask;       // L lane masks for the row, or null; row 2 follows when rows = 2
    int64_t in_row, out_row, res_row;   // bytes to the second row (rows = 2)
    int64_t step;              // vectors between neighbouring outputs in the input (stride along x)
    int32_t mr, p, rows;
    bool first, last;          // first chunk starts from bias and residual; last applies the activation
    Act act;
};

// Writes what surrounds freshly written values of one row: zero columns left and right, halo rows of other strips.
struct Halo {
    int32_t row;               // destination row (negative: above; >= rows: below), or the row itself when only masked
    int32_t shift;             // source strip = strip + shift
};
struct FinishJob {
    Lanes t;
    int64_t g, r, c0, c1, x0, x1, width, left, right;
    int64_t rows, halo_top, halo_bottom, strips, height;   // rows per strip, image rows
    bool mask_row;
};

struct PoolJob {
    Lanes in, out;
    int64_t g, r, c0, c1, width_out, width_in;
    int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dil_h, dil_w;
    int64_t rows_in, strips, height_in;      // to know which input rows exist
    bool maximum, count_pad;
    int64_t pad_bottom, pad_right;
    const int32_t* mask;
};

struct EltJob {                // out = act(f(a, b)) over channels c0..c1 of one row
    Lanes out, a, b;
    int64_t g, r, c0, c1, width;
    Fn fn;                     // add sub mul div max min, or none: unary on a
    Act act;
    int32_t b_kind;            // 0 none, 1 same layout, 2 one value a channel (b_chan), 3 scalar, 4 one vector a channel (map of 1x1)
    const float* scale;        // affine: by channel, or null
    const float* shift;
    const float* b_chan;
    bool swapped;              // b op a
    const int32_t* mask;
};

struct NormJob {               // over channels (tokens), one row
    Lanes in, out;
    int64_t r, channels, width;
    const float* weight;
    const float* bias;
    float eps;
    bool rms;
};

struct SoftmaxJob {
    Lanes in, out;
    int64_t r, channels, width;
};

struct AttentionJob {          // one head, one sequence, queries of vectors v0..v1
    Lanes q, k, v, out;        // token layout; `x_per_row` vectors to a row
    int64_t x_per_row_q, x_per_row_k;
    int64_t q0;                // first vector of the sequence (queries), same for keys
    int64_t k0;
    int64_t v0, v1;            // which query vectors, relative to q0
    int64_t queries, keys;     // tokens
    int64_t dim, dim_v, head_q, head_v;      // columns of this head start at head_q (q, k) and head_v (v, out)
    float scale;
    bool causal;
    const float* mask;         // [queries, keys] for this head, or null
    int64_t mask_row;          // floats between query rows (0: broadcast)
    int64_t mask_col;          // 0 or 1
    float* scratch;            // keys * P vectors + P
};

struct PackJob {               // plain <-> lanes for image rows or tokens
    const float* plain;
    float* plain_out;
    Lanes t;
    int64_t g, r, c0, c1, width, channels, height, image_width, images, per_group, strips, rows;
    bool replicated;
    // tokens: plain is [sequences, tokens, channels]; vectors in order
    int64_t sequences, tokens, padded, x_per_row;
};

struct Kernels {
    const char* name;
    int lanes;
    int max_p;                 // vectors that the one-channel kernel holds in registers
    int block_mr, block_p;     // shape of the dense and block kernel
    void (*list)(const ListJob&);
    void (*finish)(const FinishJob&);
    void (*pool)(const PoolJob&);
    void (*elementwise)(const EltJob&);
    void (*norm)(const NormJob&);
    void (*softmax)(const SoftmaxJob&);
    void (*attention)(const AttentionJob&);
    void (*pack_image)(const PackJob&);
    void (*unpack_image)(const PackJob&);
    void (*pack_tokens)(const PackJob&);
    void (*unpack_tokens)(const PackJob&);
    void (*mean)(const PackJob&);            // over the map: one value an image and channel, in every strip's lane
    // y[i] = act(bias + sum of values * x[index] + res) for rows r0..r1 of a CSR matrix
    void (*csr)(const int32_t* ptr, const uint16_t* index, const float* values, const float* x, const float* bias,
                const float* res, float* y, int64_t r0, int64_t r1, Act act);
    // dense rows: y[i] = act(bias + w[i,:] . x + res)
    void (*gemv)(const float* w, int64_t k, const float* x, const float* bias, const float* res, float* y,
                 int64_t r0, int64_t r1, Act act);
    void (*activate)(float* x, int64_t n, Fn fn);      // plain arrays, any length
};

const Kernels* kernels_base();
const Kernels* kernels_avx2();       // null when not built or not supported here
const Kernels* kernels_avx512();
const Kernels* kernels_avx512w();    // 16 lanes

}  // namespace sec
