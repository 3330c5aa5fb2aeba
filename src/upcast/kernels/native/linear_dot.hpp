// Few rows of x: each output is a dot product along a row of weights, widened in registers.
//
// A tile is R rows of weights times COLS rows of x, with its sums in registers. One row of x takes one
// row of weights at a time, because a single sequential stream is what the hardware prefetcher follows
// best; more rows of x share each widened weight, and the next tile's weights are fetched meanwhile.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int DOT_COLS = REGISTERS == 32 ? 8 : 4;

// Rows of weights per tile for each number of rows of x: as many as the registers hold.
constexpr int dot_rows(int cols) {
    if (cols == 1) return 1;
    return REGISTERS == 32 ? (cols <= 5 ? 4 : cols == 6 ? 4 : 3) : (cols <= 3 ? 4 : 3);
}

// Sums needed in flight to hide the latency of a fused multiply-add; small tiles unroll along K.
constexpr int dot_unroll(int rows, int cols) { return rows * cols >= 8 ? 1 : rows * cols >= 4 ? 2 : 8 / (rows * cols); }

constexpr int64_t STREAM_AHEAD = 1024; // halves: half a page beyond the point in use

template <int R, int COLS> static void dot_tile(const Linear &a, int64_t n, int64_t m, int64_t ahead) {
    constexpr int UNROLL = dot_unroll(R, COLS);
    constexpr int STEP = UNROLL * LANES;
    const uint16_t *w = a.w + n * a.ldw;
    const float *x = a.x + m * a.ldx;
    vf sums[UNROLL][COLS * R] = {};
    int64_t k = 0;
    for (; k + STEP <= a.K; k += STEP) {
        for (int u = 0; u < UNROLL; ++u) {
            vf wide[R];
            for (int r = 0; r < R; ++r) {
                const uint16_t *p = w + r * a.ldw + k + u * LANES;
                if ((u * LANES) % 32 == 0) prefetch(p + ahead);
                wide[r] = load_half(p);
            }
            for (int c = 0; c < COLS; ++c) {
                const vf xs = load(x + c * a.ldx + k + u * LANES);
                for (int r = 0; r < R; ++r) sums[u][c * R + r] += wide[r] * xs;
            }
        }
    }
    for (; k < a.K; k += LANES) {
        const int count = static_cast<int>(least<int64_t>(LANES, a.K - k));
        for (int c = 0; c < COLS; ++c) {
            const vf xs = load_part(x + c * a.ldx + k, count);
            for (int r = 0; r < R; ++r) sums[0][c * R + r] += load_part(w + r * a.ldw + k, count) * xs;
        }
    }
    for (int u = 1; u < UNROLL; ++u)
        for (int i = 0; i < COLS * R; ++i) sums[0][i] += sums[u][i];

    constexpr int PADDED = (COLS * R + LANES - 1) / LANES * LANES;
    vf parts[PADDED] = {};
    float dots[PADDED];
    for (int i = 0; i < COLS * R; ++i) parts[i] = sums[0][i];
    for (int i = 0; i < PADDED; i += LANES) store(dots + i, sum_each(parts + i));
    for (int c = 0; c < COLS; ++c) {
        float *y = a.y + (m + c) * a.ldy + n;
        const float *residual = a.residual ? a.residual + (m + c) * a.ldr + n : nullptr;
        for (int r = 0; r < R; ++r) {
            const float biased = a.bias ? dots[c * R + r] + a.bias[n + r] : dots[c * R + r];
            y[r] = residual ? biased + residual[r] : biased;
        }
    }
}

typedef void (*DotTile)(const Linear &, int64_t n, int64_t m, int64_t ahead);

template <int COLS> struct DotTiles {
    static DotTile full(int cols) {
        return cols == COLS ? dot_tile<dot_rows(COLS), COLS> : DotTiles<COLS - 1>::full(cols);
    }
    static DotTile single(int cols) { return cols == COLS ? dot_tile<1, COLS> : DotTiles<COLS - 1>::single(cols); }
};
template <> struct DotTiles<0> {
    static DotTile full(int) { return nullptr; }
    static DotTile single(int) { return nullptr; }
};

// All rows of x against weights [begin, end).
static void dot_range(const Linear &a, int64_t begin, int64_t end) {
    const int64_t blocks = (a.M + DOT_COLS - 1) / DOT_COLS;
    const int widest = static_cast<int>((a.M + blocks - 1) / blocks);
    const int rows = dot_rows(widest);
    for (int64_t n = begin; n < end;) {
        const bool full = n + rows <= end;
        const int taken = full ? rows : 1;
        int64_t ahead = a.M == 1 ? STREAM_AHEAD : rows * a.ldw;
        if (n + taken + ahead / most<int64_t>(a.ldw, 1) + rows > end) ahead = 0;
        for (int64_t block = 0, m = 0; block < blocks; ++block) {
            const int64_t next = a.M * (block + 1) / blocks;
            const int cols = static_cast<int>(next - m);
            // Tiles of a narrower block may be taller than `rows`; only equal heights are used together.
            const DotTile tile = full && dot_rows(cols) == rows ? DotTiles<DOT_COLS>::full(cols) : nullptr;
            if (tile) tile(a, n, m, ahead);
            else for (int r = 0; r < taken; ++r) DotTiles<DOT_COLS>::single(cols)(a, n + r, m, 0);
            m = next;
        }
        n += taken;
    }
}

} // namespace UPCAST_NS
} // namespace upcast
