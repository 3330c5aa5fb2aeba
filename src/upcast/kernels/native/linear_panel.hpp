// Many rows of x: weights are widened into panels of PANEL columns by a block of K, which stay in the
// nearest caches while every row of x passes over them in tiles held in registers.
//
// x is copied once, block by block with a padded stride: rows whose stride is a multiple of 4 KiB would
// otherwise evict each other. While a tile computes, it fetches the float16 weights of the next panel.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int PANEL = 2 * LANES;
constexpr int TILE_ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int64_t BLOCK_K = 256;
constexpr int64_t X_PAD = 16;
// Row-major [K, N] weights are read PANELS_AT_ONCE panels wide, so that each row gives whole cache lines.
constexpr int64_t PANELS_AT_ONCE = 4;
constexpr int64_t LINE_HALVES = 32;

// Where the next weights lie: `width` halves in each row, visited one cache line per step.
struct Ahead {
    const uint16_t *row;
    int64_t ld, width, column;
};

UPCAST_INLINE void fetch_line(Ahead &at) {
    prefetch(at.row + at.column);
    at.column += LINE_HALVES;
    if (at.column >= at.width) {
        at.column = 0;
        at.row += at.ld;
    }
}

struct Tile {
    const float *x; // TILE_ROWS rows of a block of x, row stride ldx
    int64_t ldx;
    const float *panel;
    int64_t depth;
    int64_t m, n;
    int columns; // of PANEL that exist
    bool first, last;
};

template <int ROWS> UPCAST_INLINE void finish_tile(const Linear &a, const Tile &t, vf (&sums)[ROWS][2]) {
    for (int half = 0; half < 2; ++half) {
        const int count = least(LANES, t.columns - half * LANES);
        if (count <= 0) return;
        const int64_t n = t.n + half * LANES;
        const vf bias = t.last && a.bias ? load_part(a.bias + n, count) : vf{};
        for (int r = 0; r < ROWS; ++r) {
            float *y = a.y + (t.m + r) * a.ldy + n;
            vf value = sums[r][half];
            if (count == LANES) {
                if (!t.first) value += load(y);
                if (t.last && a.bias) value += bias;
                if (t.last && a.residual) value += load(a.residual + (t.m + r) * a.ldr + n);
                store(y, value);
            } else {
                if (!t.first) value += load_part(y, count);
                if (t.last && a.bias) value += bias;
                if (t.last && a.residual) value += load_part(a.residual + (t.m + r) * a.ldr + n, count);
                store_part(y, value, count);
            }
        }
    }
}

template <int ROWS> static void panel_tile(const Linear &a, const Tile &t, Ahead &ahead) {
    vf sums[ROWS][2] = {};
    Ahead at = ahead;
    for (int64_t k = 0; k < t.depth; ++k) {
        fetch_line(at);
        const vf left = load(t.panel + k * PANEL), right = load(t.panel + k * PANEL + LANES);
        for (int r = 0; r < ROWS; ++r) {
            const vf x = splat(t.x[r * t.ldx + k]);
            sums[r][0] += x * left;
            sums[r][1] += x * right;
        }
    }
    ahead = at;
    finish_tile<ROWS>(a, t, sums);
}

typedef void (*PanelTile)(const Linear &, const Tile &, Ahead &);
template <int ROWS> static PanelTile panel_tile_for(int rows) {
    if constexpr (ROWS == 0) return nullptr;
    else return rows == ROWS ? panel_tile<ROWS> : panel_tile_for<ROWS - 1>(rows);
}

// panel[k][j] = w(n + j, k0 + k) for weights stored [N, K]: widened, then transposed in registers.
static void widen_rows(const Linear &a, int64_t n, int64_t k0, int64_t depth, float *panel) {
    for (int64_t k = 0; k < depth; k += LANES) {
        const int count = static_cast<int>(least<int64_t>(LANES, depth - k));
        for (int half = 0; half < 2; ++half) {
            const int64_t row = n + half * LANES;
            const uint16_t *w = a.w + row * a.ldw + k0 + k;
            vf tile[LANES];
            if (count == LANES && row + LANES <= a.N) {
                for (int i = 0; i < LANES; ++i) tile[i] = load_half(w + i * a.ldw);
            } else {
                for (int i = 0; i < LANES; ++i) tile[i] = row + i < a.N ? load_part(w + i * a.ldw, count) : vf{};
            }
            transpose(tile);
            float *out = panel + k * PANEL + half * LANES;
            for (int i = 0; i < count; ++i) store(out + i * PANEL, tile[i]);
        }
    }
}

// The same for weights stored [K, N]: already in the panel's order.
static void widen_columns(const Linear &a, int64_t n, int64_t k0, int64_t depth, int64_t panels, int64_t size, float *out) {
    for (int64_t k = 0; k < depth; ++k) {
        const uint16_t *w = a.w + (k0 + k) * a.ldw + n;
        for (int64_t p = 0; p < panels; ++p) {
            for (int half = 0; half < 2; ++half) {
                const int64_t column = p * PANEL + half * LANES;
                const int64_t left = a.N - n - column;
                vf v = {};
                if (left >= LANES) v = load_half(w + column);
                else if (left > 0) v = load_part(w + column, static_cast<int>(left));
                store(out + p * size + k * PANEL + half * LANES, v);
            }
        }
    }
}

static int64_t panel_blocks(const Linear &a, const LinearPlan &plan) { return (a.K + plan.block - 1) / plan.block; }
static int64_t panel_floats(const LinearPlan &plan) { return plan.block * PANEL; }

static LinearPlan plan_panel(const Linear &a, int threads) {
    LinearPlan plan = {};
    plan.strategy = Strategy::panel;
    const int64_t wanted = most<int64_t>(1, (a.K + BLOCK_K - 1) / BLOCK_K);
    plan.block = most<int64_t>(LANES, ((a.K + wanted - 1) / wanted + 15) / 16 * 16);
    const int64_t group = a.transposed ? PANELS_AT_ONCE : 1;
    const int64_t groups = (a.N + PANEL * group - 1) / (PANEL * group);
    plan.grid_n = static_cast<int>(least<int64_t>(threads, groups));
    plan.grid_m = static_cast<int>(least<int64_t>(threads / plan.grid_n, (a.M + TILE_ROWS - 1) / TILE_ROWS));
    plan.tasks[0] = static_cast<int>(least<int64_t>(threads, a.M));
    plan.tasks[1] = plan.grid_n * plan.grid_m;
    const int64_t x_floats = a.M * panel_blocks(a, plan) * (plan.block + X_PAD);
    plan.scratch = sizeof(float) * static_cast<size_t>(x_floats + plan.tasks[1] * group * panel_floats(plan));
    return plan;
}

static void copy_x(const Linear &a, const LinearPlan &plan, float *copy, int64_t begin, int64_t end) {
    const int64_t ld = plan.block + X_PAD;
    for (int64_t k = 0, b = 0; k < a.K; k += plan.block, ++b) {
        const size_t bytes = sizeof(float) * static_cast<size_t>(least(plan.block, a.K - k));
        for (int64_t m = begin; m < end; ++m) memcpy(copy + (b * a.M + m) * ld, a.x + m * a.ldx + k, bytes);
    }
}

// One panel against rows [begin, end) of x, in tiles of nearly equal height.
static void panel_rows(const Linear &a, Tile t, const float *x, int64_t begin, int64_t end, Ahead &ahead) {
    const int64_t tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t i = 0; i < tiles; ++i) {
        t.m = begin + (end - begin) * i / tiles;
        const int64_t next = begin + (end - begin) * (i + 1) / tiles;
        t.x = x + t.m * t.ldx;
        panel_tile_for<TILE_ROWS>(static_cast<int>(next - t.m))(a, t, ahead);
        // Everything was fetched during the first tile: later ones walk on the spot.
        if (i == 0) ahead = {reinterpret_cast<const uint16_t *>(t.panel), 0, 1, 0};
    }
}

static void panel_task(const Linear &a, const LinearPlan &plan, float *scratch, int task) {
    const int64_t blocks = panel_blocks(a, plan), ld = plan.block + X_PAD, size = panel_floats(plan);
    const int64_t group = a.transposed ? PANELS_AT_ONCE : 1;
    const int64_t groups = (a.N + PANEL * group - 1) / (PANEL * group);
    const int tn = task % plan.grid_n, tm = task / plan.grid_n;
    const int64_t last_group = groups * (tn + 1) / plan.grid_n;
    const int64_t begin = a.M * tm / plan.grid_m, end = a.M * (tm + 1) / plan.grid_m;
    float *panels = scratch + a.M * blocks * ld + task * group * size;
    for (int64_t g = groups * tn / plan.grid_n; g < last_group; ++g) {
        const int64_t n0 = g * PANEL * group;
        const int64_t count = least(group, (a.N - n0 + PANEL - 1) / PANEL);
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t k0 = b * plan.block, depth = least(plan.block, a.K - k0);
            if (a.transposed) widen_columns(a, n0, k0, depth, count, size, panels);
            else widen_rows(a, n0, k0, depth, panels);
            const bool same = b + 1 < blocks;
            const int64_t next_n = same ? n0 : n0 + PANEL * group, next_k = same ? k0 + plan.block : 0;
            for (int64_t p = 0; p < count; ++p) {
                const int64_t n = n0 + p * PANEL;
                const int columns = static_cast<int>(least<int64_t>(PANEL, a.N - n));
                const Tile t = {nullptr, ld, panels + p * size, depth, 0, n, columns, b == 0, !same};
                Ahead ahead = {reinterpret_cast<const uint16_t *>(t.panel), 0, 1, 0};
                // Whole panels only: prefetch addresses stay inside the weight.
                if (next_n + PANEL * group <= a.N && next_k + plan.block <= a.K) {
                    if (a.transposed) ahead = {a.w + next_k * a.ldw + next_n + p * PANEL, a.ldw, 1, 0};
                    else ahead = {a.w + next_n * a.ldw + next_k, a.ldw, plan.block, 0};
                }
                panel_rows(a, t, scratch + b * a.M * ld, begin, end, ahead);
            }
        }
    }
}

} // namespace UPCAST_NS
} // namespace upcast
