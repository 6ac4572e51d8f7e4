// The kernels of one instruction set. The including unit defines SEC_ISA, SEC_LANES and SEC_REGISTERS.
#include "lanes.hpp"
#include "simd.hpp"

namespace sec {
namespace SEC_ISA {
namespace {

constexpr int kBytes = 4 * L;
constexpr int kMaxP = SEC_REGISTERS >= 32 ? 16 : 14;
constexpr int kMaxP2 = SEC_REGISTERS >= 32 ? 14 : 7;       // two rows at once
constexpr int kBlockM = 4;
constexpr int kBlockP = SEC_REGISTERS >= 32 ? 6 : 3;

struct One {
    int32_t offset;
    float weight;
};
template <int M> struct Record {
    int32_t offset;
    float weight[M];
};

// ---- one output channel, P vectors: the sparse kernel -------------------------------------------------------------

// How many independent sums hide the multiply-add's latency when there are few vectors.
constexpr int chains(int n) { return n >= 5 ? 1 : n >= 3 ? 2 : 4; }

template <int R, int P, int X> SEC_INLINE void add_list(V (&acc)[R * P], const One* rec, int64_t n, const char* in,
                                                        int64_t in_row, int64_t step) {
    constexpr int U = chains(R * P);
    const int64_t dx = X ? X * kBytes : step * kBytes;
    if constexpr (U == 1) {
        int64_t off = rec->offset;
        for (int64_t i = 0; i < n; ++i) {
            const V w = spread(rec[i].weight);
            const char* p = in + off;
            off = rec[i + 1].offset;
            SEC_UNROLL for (int k = 0; k < P; ++k) acc[k] += w * load(p + k * dx);
            if constexpr (R == 2) {
                const char* q = p + in_row;
                SEC_UNROLL for (int k = 0; k < P; ++k) acc[P + k] += w * load(q + k * dx);
            }
        }
    } else {
        V more[U - 1][R * P] = {};
        int64_t i = 0;
        for (; i + U <= n; i += U) {
            SEC_UNROLL for (int u = 0; u < U; ++u) {
                const V w = spread(rec[i + u].weight);
                const char* p = in + rec[i + u].offset;
                SEC_UNROLL for (int k = 0; k < P; ++k) {
                    V& a = u ? more[u - (u > 0)][k] : acc[k];
                    a += w * load(p + k * dx);
                    if constexpr (R == 2) {
                        V& b = u ? more[u - (u > 0)][P + k] : acc[P + k];
                        b += w * load(p + in_row + k * dx);
                    }
                }
            }
        }
        for (; i < n; ++i) {
            const V w = spread(rec[i].weight);
            const char* p = in + rec[i].offset;
            SEC_UNROLL for (int k = 0; k < P; ++k) {
                acc[k] += w * load(p + k * dx);
                if constexpr (R == 2) acc[P + k] += w * load(p + in_row + k * dx);
            }
        }
        SEC_UNROLL for (int u = 1; u < U; ++u) {
            SEC_UNROLL for (int k = 0; k < R * P; ++k) acc[k] += more[u - 1][k];
        }
    }
}

template <int R, int P> SEC_INLINE void finish_and_store(V (&acc)[R * P], const ListJob& j, int64_t c) {
    char* out = j.out + c * j.out_chan;
    if (j.last) {
        if (j.act == Act::relu) {
            SEC_UNROLL for (int k = 0; k < R * P; ++k) acc[k] = relu_of(acc[k]);
        } else if (j.act != Act::none) {
            V copy[R * P];                                   // the sums themselves must stay in registers
            SEC_UNROLL for (int k = 0; k < R * P; ++k) copy[k] = acc[k];
            activate_slow(copy, R * P, j.act);
            SEC_UNROLL for (int k = 0; k < R * P; ++k) acc[k] = copy[k];
        }
        if (j.mask) {
            VI m[R];
            SEC_UNROLL for (int r = 0; r < R; ++r) std::memcpy(&m[r], j.mask + r * L, sizeof m[r]);
            SEC_UNROLL for (int k = 0; k < R * P; ++k) acc[k] = bits_and(acc[k], m[k / P]);
        }
    }
    SEC_UNROLL for (int k = 0; k < P; ++k) store(out + k * kBytes, acc[k]);
    if constexpr (R == 2) {
        SEC_UNROLL for (int k = 0; k < P; ++k) store(out + j.out_row + k * kBytes, acc[P + k]);
    }
}

template <int R, int P> SEC_INLINE void start(V (&acc)[R * P], const ListJob& j, int64_t c) {
    if (!j.first) {
        const char* out = j.out + c * j.out_chan;
        SEC_UNROLL for (int k = 0; k < P; ++k) acc[k] = load(out + k * kBytes);
        if constexpr (R == 2) {
            SEC_UNROLL for (int k = 0; k < P; ++k) acc[P + k] = load(out + j.out_row + k * kBytes);
        }
        return;
    }
    const V b = spread(j.bias ? j.bias[c] : 0.0f);
    SEC_UNROLL for (int k = 0; k < R * P; ++k) acc[k] = b;
    if (j.res) {
        const char* res = j.res + c * j.res_chan;
        SEC_UNROLL for (int k = 0; k < P; ++k) acc[k] += load(res + k * kBytes);
        if constexpr (R == 2) {
            SEC_UNROLL for (int k = 0; k < P; ++k) acc[P + k] += load(res + j.res_row + k * kBytes);
        }
    }
}

// Rows of the output and the residual come from far away, in an order that no prefetcher foresees.
template <int R, int P> SEC_INLINE void fetch(const ListJob& j, int64_t c) {
    constexpr int lines = (P * kBytes + 63) / 64;
    SEC_UNROLL for (int r = 0; r < R; ++r) {
        const char* out = j.out + c * j.out_chan + r * j.out_row;
        SEC_UNROLL for (int k = 0; k < lines; ++k) __builtin_prefetch(out + k * 64, 1);
        if (!j.res) continue;
        const char* res = j.res + c * j.res_chan + r * j.res_row;
        SEC_UNROLL for (int k = 0; k < lines; ++k) __builtin_prefetch(res + k * 64, 0);
    }
}

template <int R, int P, int X> void list_tile(const ListJob& job) {
    const ListJob j = job;                                   // a copy that no store can change: kept in registers
    constexpr int64_t kAhead = 6;
    const One* records = reinterpret_cast<const One*>(j.records);
    for (int64_t u = j.first_unit; u < j.last_unit; ++u) {
        const int64_t b = j.begin[u], n = j.begin[u + 1] - b;
        if (n == 0 && !j.first && !j.last) continue;
        if (j.first && u + kAhead < j.last_unit) fetch<R, P>(j, j.order[u + kAhead]);
        const int64_t c = j.order[u];
        V acc[R * P];
        start<R, P>(acc, j, c);
        if (n) add_list<R, P, X>(acc, records + b, n, j.in, j.in_row, j.step);
        finish_and_store<R, P>(acc, j, c);
    }
}

// ---- M output channels that share their inputs: dense layers and M x 1 blocks --------------------------------------

template <int M, int P, int X> void block_tile(const ListJob& job) {
    const ListJob j = job;
    const Record<M>* records = reinterpret_cast<const Record<M>*>(j.records);
    const int64_t dx = X ? X * kBytes : j.step * kBytes;
    for (int64_t u = j.first_unit; u < j.last_unit; ++u) {
        const Record<M>* rec = records + j.begin[u];
        const int64_t n = j.begin[u + 1] - j.begin[u];
        V acc[M][P];
        const int64_t left = j.channels - u * M;
        SEC_UNROLL for (int m = 0; m < M; ++m) {
            if (m < left) start<1, P>(acc[m], j, u * M + m);
            else SEC_UNROLL for (int k = 0; k < P; ++k) acc[m][k] = V{};
        }
        for (int64_t i = 0; i < n; ++i) {
            const char* p = j.in + rec[i].offset;
            V b[P];
            SEC_UNROLL for (int k = 0; k < P; ++k) b[k] = load(p + k * dx);
            SEC_UNROLL for (int m = 0; m < M; ++m) {
                const V w = spread(rec[i].weight[m]);
                SEC_UNROLL for (int k = 0; k < P; ++k) acc[m][k] += w * b[k];
            }
        }
        SEC_UNROLL for (int m = 0; m < M; ++m)
            if (m < left) finish_and_store<1, P>(acc[m], j, u * M + m);
    }
}

template <int R, int X, int P> void pick_list(const ListJob& j) {
    constexpr int top = R == 2 ? kMaxP2 : kMaxP;
    if constexpr (P <= top) {
        if (j.p == P) return list_tile<R, P, X>(j);
        return pick_list<R, X, P + 1>(j);
    }
}
template <int X, int P> void pick_block(const ListJob& j) {
    if constexpr (P <= kBlockP) {
        if (j.p == P) return block_tile<kBlockM, P, X>(j);
        return pick_block<X, P + 1>(j);
    }
}

void list(const ListJob& j) {
    if (j.mr == 1 && j.rows == 1) {
        if (j.step == 1) pick_list<1, 1, 1>(j);
        else if (j.step == 2) pick_list<1, 2, 1>(j);
        else pick_list<1, 0, 1>(j);
    } else if (j.mr == 1) {
        if (j.step == 1) pick_list<2, 1, 1>(j);
        else if (j.step == 2) pick_list<2, 2, 1>(j);
        else pick_list<2, 0, 1>(j);
    } else {
        if (j.step == 1) pick_block<1, 1>(j);
        else if (j.step == 2) pick_block<2, 1>(j);
        else pick_block<0, 1>(j);
    }
}

// ---- halos --------------------------------------------------------------------------------------------------------

// Strip s of an image needs rows of its neighbours: row `to` (outside 0..rows) is row `r` of strip s + shift.
void copy_halo(const FinishJob& j, int64_t to, int64_t shift) {
    VI index, mask;
    for (int l = 0; l < L; ++l) {
        const int64_t s = l % j.strips, from = s + shift;
        const bool real = from >= 0 && from < j.strips && from * j.rows + j.r < j.height;
        index[l] = real ? static_cast<int32_t>(l + shift) : 0;
        mask[l] = real ? -1 : 0;
    }
    for (int64_t c = j.c0; c < j.c1; ++c) {
        const float* src = j.t.at(j.g, j.r, c, 0, L);
        float* dst = j.t.at(j.g, to, c, 0, L);
        for (int64_t x = j.x0; x < j.x1; ++x) store(dst + x * L, bits_and(permute(load(src + x * L), index), mask));
        if (j.x0 == 0)
            for (int64_t x = -j.left; x < 0; ++x) store(dst + x * L, V{});
        if (j.x1 == j.width)
            for (int64_t x = j.width; x < j.width + j.right; ++x) store(dst + x * L, V{});
    }
}
void finish(const FinishJob& j) {
    for (int64_t c = j.c0; c < j.c1; ++c) {
        float* row = j.t.at(j.g, j.r, c, 0, L);
        if (j.x0 == 0)
            for (int64_t x = -j.left; x < 0; ++x) store(row + x * L, V{});
        if (j.x1 == j.width)
            for (int64_t x = j.width; x < j.width + j.right; ++x) store(row + x * L, V{});
    }
    for (int64_t h = 1; h <= j.halo_top; ++h) {               // row -h of strip s: global row s*rows - h
        const int64_t up = (h + j.rows - 1) / j.rows, row = up * j.rows - h;
        if (row == j.r) copy_halo(j, -h, -up);
    }
    for (int64_t h = 0; h < j.halo_bottom; ++h) {             // row rows + h of strip s
        const int64_t down = (j.rows + h) / j.rows, row = (j.rows + h) % j.rows;
        if (row == j.r) copy_halo(j, j.rows + h, down);
    }
}

// ---- pooling ------------------------------------------------------------------------------------------------------

VI rows_that_exist(const PoolJob& j, int64_t row) {           // lanes whose image has this (possibly halo) row
    VI m;
    for (int l = 0; l < L; ++l) {
        const int64_t s = l % j.strips, y = s * j.rows_in + row;
        m[l] = y >= 0 && y < j.height_in ? -1 : 0;
    }
    return m;
}
VI rows_in_padding(const PoolJob& j, int64_t row) {           // lanes where the row counts for count_pad
    VI m;
    for (int l = 0; l < L; ++l) {
        const int64_t s = l % j.strips, y = s * j.rows_in + row;
        m[l] = y >= -j.pad_top && y < j.height_in + j.pad_bottom ? -1 : 0;
    }
    return m;
}
// Columns whose whole window lies in rows and columns that exist.
SEC_INLINE V inside_max(const PoolJob& j, int64_t c, int64_t x) {
    const float* p = j.in.at(j.g, j.r * j.stride_h - j.pad_top, c, x * j.stride_w - j.pad_left, L);
    V acc = load(p);
    for (int64_t ky = 0; ky < j.kernel_h; ++ky) {
        const float* q = p + ky * j.dil_h * j.in.row_stride;
        for (int64_t kx = 0; kx < j.kernel_w; ++kx) acc = max_nan(acc, load(q + kx * j.dil_w * L));
    }
    return acc;
}
void pool(const PoolJob& j) {
    constexpr int kMost = 64;
    VI exists[kMost], counted[kMost];
    for (int64_t ky = 0; ky < j.kernel_h; ++ky) {
        const int64_t row = j.r * j.stride_h - j.pad_top + ky * j.dil_h;
        exists[ky] = rows_that_exist(j, row);
        counted[ky] = rows_in_padding(j, row);
    }
    VI mask = splat_i(-1);
    if (j.mask) std::memcpy(&mask, j.mask, sizeof mask);
    const V low = spread(-__builtin_inff());
    bool whole = j.maximum;
    for (int64_t ky = 0; ky < j.kernel_h; ++ky)
        for (int l = 0; l < L; ++l) whole = whole && (exists[ky][l] || !mask[l]);
    const int64_t span = (j.kernel_w - 1) * j.dil_w;
    for (int64_t c = j.c0; c < j.c1; ++c) {
        for (int64_t x = 0; x < j.width_out; ++x) {
            const int64_t left = x * j.stride_w - j.pad_left;
            if (whole && left >= 0 && left + span < j.width_in) {
                store(j.out.at(j.g, j.r, c, x, L), bits_and(inside_max(j, c, x), mask));
                continue;
            }
            V acc = j.maximum ? low : V{}, n = V{};
            for (int64_t ky = 0; ky < j.kernel_h; ++ky) {
                const int64_t row = j.r * j.stride_h - j.pad_top + ky * j.dil_h;
                for (int64_t kx = 0; kx < j.kernel_w; ++kx) {
                    const int64_t xi = x * j.stride_w - j.pad_left + kx * j.dil_w;
                    const bool inside = xi >= 0 && xi < j.width_in;
                    if (j.maximum) {
                        if (!inside) continue;
                        const V v = load(j.in.at(j.g, row, c, xi, L));
                        acc = max_nan(acc, choose(exists[ky], v, low));
                    } else {
                        if (inside) acc += bits_and(load(j.in.at(j.g, row, c, xi, L)), exists[ky]);
                        const V one = spread(1.0f);
                        if (j.count_pad) {
                            if (xi < j.width_in + j.pad_right) n += bits_and(one, counted[ky]);
                        } else if (inside) {
                            n += bits_and(one, exists[ky]);
                        }
                    }
                }
            }
            if (!j.maximum) acc = acc / n;
            store(j.out.at(j.g, j.r, c, x, L), bits_and(acc, mask));
        }
    }
}

// ---- element by element -------------------------------------------------------------------------------------------

SEC_INLINE V apply_fn(Fn fn, V a, V b) {
    switch (fn) {
        case Fn::add: return a + b;
        case Fn::sub: return a - b;
        case Fn::mul: return a * b;
        case Fn::div: return a / b;
        case Fn::max: return max_nan(a, b);
        case Fn::min: return min_nan(a, b);
        case Fn::neg: return (V)((VI)a ^ splat_i(INT32_MIN));
        case Fn::abs: return vabs(a);
        case Fn::square: return a * a;
        case Fn::exp: return vexp(a);
        case Fn::sqrt: return vsqrt(a);
        case Fn::rsqrt: return 1.0f / vsqrt(a);
        case Fn::reciprocal: return 1.0f / a;
        default: return a;
    }
}
template <class F> SEC_INLINE void sweep(const float* a, float* out, int64_t n, Act act, VI mask, F f) {
    constexpr int kRun = 8;
    for (int64_t x = 0; x < n; x += kRun) {
        V v[kRun];
        const int m = static_cast<int>(n - x < kRun ? n - x : kRun);
        for (int i = 0; i < m; ++i) v[i] = f(load(a + (x + i) * L), x + i);
        if (act == Act::relu) for (int i = 0; i < m; ++i) v[i] = relu_of(v[i]);
        else if (act != Act::none) activate_slow(v, m, act);
        for (int i = 0; i < m; ++i) store(out + (x + i) * L, bits_and(v[i], mask));
    }
}
void elementwise(const EltJob& j) {
    VI mask = splat_i(-1);
    if (j.mask) std::memcpy(&mask, j.mask, sizeof mask);
    for (int64_t c = j.c0; c < j.c1; ++c) {
        const float* a = j.a.at(j.g, j.r, c, 0, L);
        float* out = j.out.at(j.g, j.r, c, 0, L);
        if (j.scale) {
            const V s = spread(j.scale[c]), t = spread(j.shift[c]);
            sweep(a, out, j.width, j.act, mask, [&](V v, int64_t) { return v * s + t; });
            continue;
        }
        if (j.b_kind == 1) {
            const float* b = j.b.at(j.g, j.r, c, 0, L);
            if (j.fn == Fn::add && !j.swapped)
                sweep(a, out, j.width, j.act, mask, [&](V v, int64_t x) { return v + load(b + x * L); });
            else
                sweep(a, out, j.width, j.act, mask, [&](V v, int64_t x) {
                    const V w = load(b + x * L);
                    return j.swapped ? apply_fn(j.fn, w, v) : apply_fn(j.fn, v, w);
                });
            continue;
        }
        V b = V{};
        if (j.b_kind == 2) b = spread(j.b_chan[c]);
        else if (j.b_kind == 3) b = spread(j.b_chan[0]);
        else if (j.b_kind == 4) b = load(j.b.at(j.g, 0, c, 0, L));
        if (j.fn == Fn::mul) sweep(a, out, j.width, j.act, mask, [&](V v, int64_t) { return v * b; });
        else
            sweep(a, out, j.width, j.act, mask,
                  [&](V v, int64_t) { return j.swapped ? apply_fn(j.fn, b, v) : apply_fn(j.fn, v, b); });
    }
}

// ---- norms and softmax over channels ------------------------------------------------------------------------------

template <int P> void norm_at(const NormJob& j, int64_t x) {
    const float inv = 1.0f / static_cast<float>(j.channels);
    const float* in = j.in.at(0, j.r, 0, x, L);
    float* out = j.out.at(0, j.r, 0, x, L);
    V mean[P] = {}, square[P] = {}, more[P] = {};
    int64_t c = 0;
    if (!j.rms) {
        for (; c + 2 <= j.channels; c += 2) {
            SEC_UNROLL for (int k = 0; k < P; ++k) {
                mean[k] += load(in + c * j.in.chan_stride + k * L);
                more[k] += load(in + (c + 1) * j.in.chan_stride + k * L);
            }
        }
        for (; c < j.channels; ++c)
            SEC_UNROLL for (int k = 0; k < P; ++k) mean[k] += load(in + c * j.in.chan_stride + k * L);
        SEC_UNROLL for (int k = 0; k < P; ++k) mean[k] = (mean[k] + more[k]) * inv;
    }
    for (c = 0; c < j.channels; ++c)
        SEC_UNROLL for (int k = 0; k < P; ++k) {
            const V d = load(in + c * j.in.chan_stride + k * L) - mean[k];
            square[k] += d * d;
        }
    SEC_UNROLL for (int k = 0; k < P; ++k) square[k] = 1.0f / vsqrt(square[k] * inv + j.eps);
    for (c = 0; c < j.channels; ++c) {
        const V w = spread(j.weight ? j.weight[c] : 1.0f), b = spread(j.bias ? j.bias[c] : 0.0f);
        SEC_UNROLL for (int k = 0; k < P; ++k) {
            const V y = (load(in + c * j.in.chan_stride + k * L) - mean[k]) * square[k];
            store(out + c * j.out.chan_stride + k * L, y * w + b);
        }
    }
}
void norm(const NormJob& j) {
    int64_t x = 0;
    for (; x + 4 <= j.width; x += 4) norm_at<4>(j, x);
    for (; x + 2 <= j.width; x += 2) norm_at<2>(j, x);
    for (; x < j.width; ++x) norm_at<1>(j, x);
}
void softmax(const SoftmaxJob& j) {
    for (int64_t x = 0; x < j.width; ++x) {
        const float* in = j.in.at(0, j.r, 0, x, L);
        float* out = j.out.at(0, j.r, 0, x, L);
        V top = spread(-__builtin_inff()), total = V{};
        for (int64_t c = 0; c < j.channels; ++c) top = max_nan(top, load(in + c * j.in.chan_stride));
        for (int64_t c = 0; c < j.channels; ++c) {
            const V e = vexp(load(in + c * j.in.chan_stride) - top);
            total += e;
            store(out + c * j.out.chan_stride, e);
        }
        const V r = 1.0f / total;
        for (int64_t c = 0; c < j.channels; ++c) {
            float* p = out + c * j.out.chan_stride;
            store(p, load(p) * r);
        }
    }
}

// ---- attention ----------------------------------------------------------------------------------------------------

// Where vector n of a token tensor begins, column c.
SEC_INLINE const float* token(const Lanes& t, int64_t n, int64_t per_row, int64_t c) {
    return t.base + (n / per_row) * t.row_stride + c * t.chan_stride + (n % per_row) * L;
}
template <int P, int K> void attend(const AttentionJob& j, int64_t v0) {      // P vectors of queries, K keys at once
    float* scores = j.scratch;                               // [key][P][L]
    const float* q[P];
    SEC_UNROLL for (int k = 0; k < P; ++k) q[k] = token(j.q, j.q0 + v0 + k, j.x_per_row_q, j.head_q);
    V top[P], total[P];
    SEC_UNROLL for (int k = 0; k < P; ++k) top[k] = spread(-__builtin_inff()), total[k] = V{};
    for (int64_t key = 0; key < j.keys; key += K) {          // K divides L: the keys lie in one vector
        const float* kp = token(j.k, j.k0 + key / L, j.x_per_row_k, j.head_q) + key % L;
        V acc[K][P] = {};
        for (int64_t d = 0; d < j.dim; ++d) {
            V a[P];
            SEC_UNROLL for (int k = 0; k < P; ++k) a[k] = load(q[k] + d * j.q.chan_stride);
            SEC_UNROLL for (int m = 0; m < K; ++m) {
                const V b = spread(kp[d * j.k.chan_stride + m]);
                SEC_UNROLL for (int k = 0; k < P; ++k) acc[m][k] += b * a[k];
            }
        }
        const int64_t n = j.keys - key < K ? j.keys - key : K;
        for (int64_t m = 0; m < n; ++m) {
            for (int k = 0; k < P; ++k) {
                V s = acc[m][k] * j.scale;
                const int64_t first = (v0 + k) * L;
                if (j.mask || j.causal) {
                    for (int l = 0; l < L; ++l) {
                        const int64_t query = first + l;
                        if (query >= j.queries) continue;
                        if (j.mask) s[l] += j.mask[query * j.mask_row + (key + m) * j.mask_col];
                        if (j.causal && key + m > query) s[l] = -__builtin_inff();
                    }
                }
                top[k] = max_nan(top[k], s);
                store(scores + ((key + m) * P + k) * L, s);
            }
        }
    }
    // Where no key is open every weight is zero: e^(-inf - 0), and a sum that divides nothing.
    SEC_UNROLL for (int k = 0; k < P; ++k) top[k] = choose(top[k] == spread(-__builtin_inff()), V{}, top[k]);
    for (int64_t key = 0; key < j.keys; ++key)
        SEC_UNROLL for (int k = 0; k < P; ++k) {
            float* p = scores + (key * P + k) * L;
            const V e = vexp(load(p) - top[k]);
            total[k] += e;
            store(p, e);
        }
    SEC_UNROLL for (int k = 0; k < P; ++k) total[k] = 1.0f / choose(total[k] == V{}, spread(1.0f), total[k]);
    constexpr int D = K;
    for (int64_t d = 0; d < j.dim_v; d += D) {
        const int n = static_cast<int>(j.dim_v - d < D ? j.dim_v - d : D);
        V acc[D][P] = {};
        for (int64_t key = 0; key < j.keys; ++key) {
            const float* vp = token(j.v, j.k0 + key / L, j.x_per_row_k, j.head_v + d) + key % L;
            V a[P];
            SEC_UNROLL for (int k = 0; k < P; ++k) a[k] = load(scores + (key * P + k) * L);
            if (n == D) {
                SEC_UNROLL for (int m = 0; m < D; ++m) {
                    const V b = spread(vp[m * j.v.chan_stride]);
                    SEC_UNROLL for (int k = 0; k < P; ++k) acc[m][k] += b * a[k];
                }
            } else {
                for (int m = 0; m < n; ++m) {
                    const V b = spread(vp[m * j.v.chan_stride]);
                    for (int k = 0; k < P; ++k) acc[m][k] += b * a[k];
                }
            }
        }
        for (int m = 0; m < n; ++m)
            for (int k = 0; k < P; ++k) {
                float* o = const_cast<float*>(token(j.out, j.q0 + v0 + k, j.x_per_row_q, j.head_v + d + m));
                store(o, acc[m][k] * total[k]);
            }
    }
}
void attention(const AttentionJob& j) {
    int64_t v = j.v0;
    constexpr int K = SEC_REGISTERS >= 32 ? 4 : 2;
    for (; v + 4 <= j.v1; v += 4) attend<4, K>(j, v);
    for (; v < j.v1; ++v) attend<1, 4>(j, v);
}

// ---- to and from plain arrays -------------------------------------------------------------------------------------

void pack_image(const PackJob& j) {
    const int64_t plane = j.height * j.image_width;
    for (int64_t c = j.c0; c < j.c1; ++c) {
        float* out = j.t.at(j.g, j.r, c, 0, L);
        for (int l = 0; l < L; ++l) {
            const int64_t image = j.g * j.per_group + l / j.strips;
            const int64_t y = j.replicated ? j.r : (l % j.strips) * j.rows + j.r;
            if (image < j.images && y < j.height) {
                const float* src = j.plain + (image * j.channels + c) * plane + y * j.image_width;
                for (int64_t x = 0; x < j.width; ++x) out[x * L + l] = src[x];
            } else {
                for (int64_t x = 0; x < j.width; ++x) out[x * L + l] = 0.0f;
            }
        }
    }
}
void unpack_image(const PackJob& j) {
    const int64_t plane = j.height * j.image_width;
    for (int64_t c = j.c0; c < j.c1; ++c) {
        const float* in = j.t.at(j.g, j.r, c, 0, L);
        for (int l = 0; l < L; ++l) {
            const int64_t image = j.g * j.per_group + l / j.strips;
            const int64_t y = j.replicated ? j.r : (l % j.strips) * j.rows + j.r;
            if (image >= j.images || y >= j.height || (j.replicated && l % j.strips)) continue;
            float* dst = j.plain_out + (image * j.channels + c) * plane + y * j.image_width;
            for (int64_t x = 0; x < j.width; ++x) dst[x] = in[x * L + l];
        }
    }
}
// Row r of a token tensor: vectors r * x_per_row ...
void pack_tokens(const PackJob& j) {
    for (int64_t x = 0; x < j.width; ++x)
        for (int l = 0; l < L; ++l) {
            const int64_t n = (j.r * j.x_per_row + x) * L + l, b = n / j.padded, t = n % j.padded;
            float* out = j.t.at(0, j.r, 0, x, L) + l;
            if (b < j.sequences && t < j.tokens) {
                const float* src = j.plain + (b * j.tokens + t) * j.channels;
                for (int64_t c = j.c0; c < j.c1; ++c) out[c * j.t.chan_stride] = src[c];
            } else {
                for (int64_t c = j.c0; c < j.c1; ++c) out[c * j.t.chan_stride] = 0.0f;
            }
        }
}
void unpack_tokens(const PackJob& j) {
    for (int64_t x = 0; x < j.width; ++x)
        for (int l = 0; l < L; ++l) {
            const int64_t n = (j.r * j.x_per_row + x) * L + l, b = n / j.padded, t = n % j.padded;
            if (b >= j.sequences || t >= j.tokens) continue;
            const float* in = j.t.at(0, j.r, 0, x, L) + l;
            float* dst = j.plain_out + (b * j.tokens + t) * j.channels;
            for (int64_t c = j.c0; c < j.c1; ++c) dst[c] = in[c * j.t.chan_stride];
        }
}
// t: the map; plain_out: reused as the destination lane vector [channel][L] of this group.
void mean(const PackJob& j) {
    const float inv = 1.0f / static_cast<float>(j.height * j.image_width);
    for (int64_t c = j.c0; c < j.c1; ++c) {
        V s = V{};
        for (int64_t r = 0; r < j.rows; ++r) {
            const float* in = j.t.at(j.g, r, c, 0, L);
            V a = V{};
            for (int64_t x = 0; x < j.width; ++x) a += load(in + x * L);
            s += a;
        }
        V out;
        for (int l = 0; l < L; ++l) {
            float total = 0;
            const int base = l - l % static_cast<int>(j.strips);
            for (int k = 0; k < j.strips; ++k) total += s[base + k];
            out[l] = total * inv;
        }
        store(j.plain_out + c * L, out);
    }
}

// ---- one token ----------------------------------------------------------------------------------------------------

SEC_INLINE float act_one(float x, Act act) {
    if (act == Act::none) return x;
    V v = spread(x);
    activate_slow(&v, 1, act);
    return v[0];
}
void csr(const int32_t* ptr, const uint16_t* index, const float* values, const float* x, const float* bias,
         const float* res, float* y, int64_t r0, int64_t r1, Act act) {
    typedef float Q __attribute__((vector_size(16)));
    typedef float Qany __attribute__((vector_size(16), aligned(4)));
    for (int64_t r = r0; r < r1; ++r) {
        const int32_t b = ptr[r], e = ptr[r + 1];
        Q s0 = {}, s1 = {};
        int32_t i = b;
        for (; i + 8 <= e; i += 8) {        // one load brings four indices: loads are what bounds this loop
            uint64_t p, q;
            std::memcpy(&p, index + i, 8);
            std::memcpy(&q, index + i + 4, 8);
            const Q u = {x[p & 0xffff], x[p >> 16 & 0xffff], x[p >> 32 & 0xffff], x[p >> 48]};
            const Q w = {x[q & 0xffff], x[q >> 16 & 0xffff], x[q >> 32 & 0xffff], x[q >> 48]};
            s0 += *reinterpret_cast<const Qany*>(values + i) * u;
            s1 += *reinterpret_cast<const Qany*>(values + i + 4) * w;
        }
        float tail = 0;
        for (; i < e; ++i) tail += values[i] * x[index[i]];
        s0 += s1;
        const float v = tail + ((s0[0] + s0[1]) + (s0[2] + s0[3])) + (bias ? bias[r] : 0.0f) + (res ? res[r] : 0.0f);
        y[r] = act == Act::relu ? (v < 0 ? 0.0f : v) : act_one(v, act);
    }
}
void gemv(const float* w, int64_t k, const float* x, const float* bias, const float* res, float* y, int64_t r0,
          int64_t r1, Act act) {
    for (int64_t r = r0; r < r1; ++r) {
        const float* row = w + r * k;
        V s0 = V{}, s1 = V{}, s2 = V{}, s3 = V{};
        int64_t i = 0;
        for (; i + 4 * L <= k; i += 4 * L) {
            s0 += load_any(row + i) * load_any(x + i);
            s1 += load_any(row + i + L) * load_any(x + i + L);
            s2 += load_any(row + i + 2 * L) * load_any(x + i + 2 * L);
            s3 += load_any(row + i + 3 * L) * load_any(x + i + 3 * L);
        }
        for (; i + L <= k; i += L) s0 += load_any(row + i) * load_any(x + i);
        float v = sum_lanes((s0 + s1) + (s2 + s3));
        for (; i < k; ++i) v += row[i] * x[i];
        v += (bias ? bias[r] : 0.0f) + (res ? res[r] : 0.0f);
        y[r] = act_one(v, act);
    }
}
void activate(float* x, int64_t n, Fn fn) {
    V v;
    int64_t i = 0;
    const bool act = fn <= Fn::tanh;
    for (; i < n; i += L) {
        const int64_t m = n - i < L ? n - i : L;
        v = V{};
        std::memcpy(&v, x + i, static_cast<size_t>(m) * 4);
        if (act) activate_slow(&v, 1, static_cast<Act>(fn));
        else v = apply_fn(fn, v, v);
        std::memcpy(x + i, &v, static_cast<size_t>(m) * 4);
    }
}

const Kernels kTable = {SEC_NAME, L, kMaxP, kBlockM, kBlockP, list, finish, pool, elementwise, norm, softmax, attention,
                        pack_image, unpack_image, pack_tokens, unpack_tokens, mean, csr, gemv, activate};

}  // namespace
}  // namespace SEC_ISA
}  // namespace sec
