#include "plain_math.hpp"

#include <algorithm>

namespace sec {
namespace plain {
namespace {

constexpr int64_t kBlock = 4096;

float total(F4 a) { return (a[0] + a[1]) + (a[2] + a[3]); }

// The sum of term(x[i]); `term` takes one float or four.
template <class F> double blocks(const float* x, int64_t n, F term) {
    double all = 0;
    for (int64_t b = 0; b < n; b += kBlock) {
        const int64_t e = std::min(n, b + kBlock);
        F4 s0{}, s1{}, s2{}, s3{};
        int64_t i = b;
        for (; i + 16 <= e; i += 16) {
            s0 += term(load4(x + i));
            s1 += term(load4(x + i + 4));
            s2 += term(load4(x + i + 8));
            s3 += term(load4(x + i + 12));
        }
        float rest = 0;
        for (; i < e; ++i) rest += term(x[i]);
        all += total((s0 + s1) + (s2 + s3)) + rest;
    }
    return all;
}

// M rows of c, `n` <= 8 columns, over `depth` rows of the panel.
template <int M> void tile(Matrix a, const float* panel, int64_t depth, float* c, int64_t ldc, int64_t n, bool add) {
    F4 acc[M][2] = {};
    for (int64_t k = 0; k < depth; ++k) {
        const F4 b0 = load4(panel + k * kPanelWidth), b1 = load4(panel + k * kPanelWidth + 4);
        SEC_PLAIN_UNROLL for (int i = 0; i < M; ++i) {
            const float w = a.data[i * a.row + k];
            acc[i][0] += w * b0;
            acc[i][1] += w * b1;
        }
    }
    SEC_PLAIN_UNROLL for (int i = 0; i < M; ++i) {
        float row[kPanelWidth];
        store4(row, acc[i][0]);
        store4(row + 4, acc[i][1]);
        for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = add ? c[i * ldc + j] + row[j] : row[j];
    }
}

// Columns j .. j + n and rows k .. k + depth of b, zeros to the right.
void fill_panel(Matrix b, bool transposed, int64_t j, int64_t n, int64_t k, int64_t depth, float* panel) {
    if (n < kPanelWidth) std::fill(panel, panel + depth * kPanelWidth, 0.0f);
    if (transposed) {
        for (int64_t col = 0; col < n; ++col) {
            const float* from = b.data + (j + col) * b.row + k;
            for (int64_t i = 0; i < depth; ++i) panel[i * kPanelWidth + col] = from[i];
        }
        return;
    }
    for (int64_t i = 0; i < depth; ++i) {
        const float* from = b.data + (k + i) * b.row + j;
        float* to = panel + i * kPanelWidth;
        if (n == kPanelWidth) std::memcpy(to, from, sizeof(float) * kPanelWidth);
        else std::copy(from, from + n, to);
    }
}

float dot(const float* a, const float* b, int64_t n) {
    F4 s0{}, s1{};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        s0 += load4(a + i) * load4(b + i);
        s1 += load4(a + i + 4) * load4(b + i + 4);
    }
    float rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return total(s0 + s1) + rest;
}

// One row: a panel would be copied to be read once.
void multiply_row(const float* a, Matrix b, bool transposed, float* c, int64_t n, int64_t k) {
    if (transposed) {
        for (int64_t j = 0; j < n; ++j) c[j] = dot(a, b.data + j * b.row, k);
        return;
    }
    std::fill(c, c + n, 0.0f);
    for (int64_t i = 0; i < k; ++i) {
        const float* row = b.data + i * b.row;
        const float w = a[i];
        int64_t j = 0;
        for (; j + 4 <= n; j += 4) store4(c + j, load4(c + j) + w * load4(row + j));
        for (; j < n; ++j) c[j] += w * row[j];
    }
}

}  // namespace

double sum(const float* x, int64_t n) {
    return blocks(x, n, [](auto v) { return v; });
}
double sum_of_squares(const float* x, int64_t n, float minus) {
    return blocks(x, n, [minus](auto v) { return (v - minus) * (v - minus); });
}

float maximum(const float* x, int64_t n) {
    F4 top = F4{} + x[0];
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) top = max_nan(load4(x + i), top);
    float out = max_nan(max_nan(top[0], top[1]), max_nan(top[2], top[3]));
    for (; i < n; ++i) out = max_nan(out, x[i]);
    return out;
}

void multiply(Matrix a, Matrix b, bool transposed, float* c, int64_t ldc, int64_t m, int64_t n, int64_t k,
              float* panel) {
    if (m == 1) return multiply_row(a.data, b, transposed, c, n, k);
    for (int64_t j = 0; j < n; j += kPanelWidth) {
        const int64_t width = std::min(kPanelWidth, n - j);
        for (int64_t k0 = 0; k0 < k; k0 += kPanelDepth) {
            const int64_t depth = std::min(kPanelDepth, k - k0);
            fill_panel(b, transposed, j, width, k0, depth, panel);
            int64_t i = 0;
            for (; i + 4 <= m; i += 4)
                tile<4>({a.data + i * a.row + k0, a.row}, panel, depth, c + i * ldc + j, ldc, width, k0 > 0);
            for (; i < m; ++i)
                tile<1>({a.data + i * a.row + k0, a.row}, panel, depth, c + i * ldc + j, ldc, width, k0 > 0);
        }
    }
}

}  // namespace plain
}  // namespace sec
