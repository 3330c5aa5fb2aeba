// y = x W for W stored [K, N]: panels of PANEL columns by a block of K are widened into scratch, where
// they stay in the nearest caches while every row of x passes over them in tiles held in registers.
//
// Each task copies its rows of a block of x with a padded stride: rows whose stride is a multiple of 4 KiB
// would otherwise evict each other. While a tile computes, it fetches the float16 weights of the next panel.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/packed.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int PANEL = 2 * LANES;
constexpr int TILE_ROWS = REGISTERS == 32 ? 12 : 6;
constexpr int64_t BLOCK_K = 256;
constexpr int64_t X_PAD = 16;
// Panels widened together, so that each row of W is read in stretches of several cache lines.
constexpr int64_t GROUP = 8 * 16 / PANEL;

struct PanelTile {
    const float *x; // rows of a block of x, `ldx` apart
    int64_t ldx;
    const float *panel;
    int64_t depth, depth_stored; // of this block, and the distance between panels in rows
    int64_t m, n;
    int columns; // of PANEL that exist
    bool first, last;
    // One row of the next panel's weights per step of K; a stride of zero stays on the spot.
    const uint16_t *ahead;
    int64_t ahead_ld;
};

// y[m][n .. n + count) from the sums over a block of K: the first block's start y, the last one's bring bias
// and residual along.
UPCAST_INLINE void finish_vector(const Linear &a, int64_t m, int64_t n, int count, vf value, bool first, bool last) {
    float *y = a.y + m * a.ldy + n;
    const float *residual = last && a.residual ? a.residual + m * a.ldr + n : nullptr;
    if (count == LANES) {
        if (!first) value += load(y);
        if (last && a.bias) value += load(a.bias + n);
        if (residual) value += load(residual);
        store(y, value);
    } else {
        if (!first) value += load_part(y, count);
        if (last && a.bias) value += load_part(a.bias + n, count);
        if (residual) value += load_part(residual, count);
        store_part(y, value, count);
    }
}

template <int ROWS> UPCAST_INLINE void finish_panel(const Linear &a, const PanelTile &t, vf (&sums)[ROWS][2]) {
    for (int half = 0; half < 2; ++half) {
        const int count = least(LANES, t.columns - half * LANES);
        if (count <= 0) return;
        for (int r = 0; r < ROWS; ++r) finish_vector(a, t.m + r, t.n + half * LANES, count, sums[r][half], t.first, t.last);
    }
}

template <int ROWS> static void panel_tile(const Linear &a, const PanelTile &t) {
    vf sums[ROWS][2];
    for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = vf{};
    const uint16_t *ahead = t.ahead;
    // Half a block at a time, then added: chains of additions half as long round that much less.
    for (int64_t begin = 0; begin < t.depth; begin += BLOCK_K / 2) {
        vf part[ROWS][2];
        for (int r = 0; r < ROWS; ++r) part[r][0] = part[r][1] = vf{};
        const int64_t end = least(t.depth, begin + BLOCK_K / 2);
        for (int64_t k = begin; k < end; ++k) {
            prefetch(ahead);
            ahead += t.ahead_ld;
            const vf left = load(t.panel + k * PANEL), right = load(t.panel + k * PANEL + LANES);
            for (int r = 0; r < ROWS; ++r) {
                const vf x = splat(t.x[r * t.ldx + k]);
                part[r][0] += x * left;
                part[r][1] += x * right;
            }
        }
        for (int r = 0; r < ROWS; ++r) sums[r][0] += part[r][0], sums[r][1] += part[r][1];
    }
    finish_panel<ROWS>(a, t, sums);
}

typedef void (*PanelTiles)(const Linear &, const PanelTile &);
template <int ROWS> static PanelTiles panel_tile_for(int rows) {
    if constexpr (ROWS == 0) return nullptr;
    else return rows == ROWS ? panel_tile<ROWS> : panel_tile_for<ROWS - 1>(rows);
}

// out[p][k][j] = w[k0 + k][n + p * PANEL + j], panels `size` floats apart; zero beyond the last column.
static void widen_panels(const Linear &a, int64_t n, int64_t k0, int64_t depth, int64_t panels, int64_t size, float *out) {
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

// The same of packed rows; n begins a record.
static void widen_packed_panels(const Linear &a, int64_t n, int64_t k0, int64_t depth, int64_t panels, int64_t size, float *out) {
    constexpr int64_t AHEAD = 8; // rows: each lies where no hardware looks for it
    const int64_t count = least(panels * PANEL, a.N - n);
    float row[GROUP * PANEL] = {};
    for (int64_t k = 0; k < depth; ++k) {
        if (k0 + k + AHEAD < a.K)
            for (int64_t line = 0; line < count * RECORD_BYTES / RECORD; line += 64)
                prefetch(record_of(a.packed, k0 + k + AHEAD, n) + line);
        widen_packed(a.packed, k0 + k, n, count, row);
        for (int64_t p = 0; p < panels; ++p) memcpy(out + p * size + k * PANEL, row + p * PANEL, sizeof(float) * PANEL);
    }
}

static int64_t panel_blocks(const Linear &a, const LinearPlan &plan) { return (a.K + plan.block - 1) / plan.block; }
static int64_t panel_count(const Linear &a) { return (a.N + PANEL - 1) / PANEL; }
// Panels are divided between tasks where a record begins.
static int64_t panel_unit(const Linear &a) { return a.packed.records ? RECORD / PANEL : 1; }
static int64_t panel_units(const Linear &a) { return (panel_count(a) + panel_unit(a) - 1) / panel_unit(a); }

// Floats of scratch per task: a group of panels, and a block of its rows of x.
static int64_t panel_scratch(const Linear &a, const LinearPlan &plan) {
    const int64_t rows = (a.M + plan.grid_m - 1) / plan.grid_m;
    return plan.block * PANEL * GROUP + rows * (plan.block + X_PAD);
}

static LinearPlan plan_panel(const Linear &a, int threads) {
    LinearPlan plan = {};
    plan.strategy = Strategy::panel;
    const int64_t wanted = most<int64_t>(1, (a.K + BLOCK_K - 1) / BLOCK_K);
    plan.block = most<int64_t>(16, ((a.K + wanted - 1) / wanted + 15) / 16 * 16);
    plan.grid_n = static_cast<int>(least<int64_t>(threads, panel_units(a)));
    plan.grid_m = static_cast<int>(least<int64_t>(threads / plan.grid_n, (a.M + TILE_ROWS - 1) / TILE_ROWS));
    plan.tasks[0] = plan.grid_n * plan.grid_m;
    plan.scratch = sizeof(float) * static_cast<size_t>(plan.tasks[0] * panel_scratch(a, plan));
    return plan;
}

// Rows [begin, end) of x, columns k0 to k0 + depth.
static void copy_x(const Linear &a, int64_t begin, int64_t end, int64_t k0, int64_t depth, float *copy, int64_t ld) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(depth);
    for (int64_t m = begin; m < end && bytes; ++m) memcpy(copy + (m - begin) * ld, a.x + m * a.ldx + k0, bytes);
}

// One panel against rows [begin, end) of a block of x, in tiles of nearly equal height.
static void panel_rows(const Linear &a, PanelTile t, const float *x, int64_t begin, int64_t end) {
    const int64_t tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t i = 0; i < tiles; ++i) {
        t.m = begin + (end - begin) * i / tiles;
        const int64_t next = begin + (end - begin) * (i + 1) / tiles;
        t.x = x + (t.m - begin) * t.ldx;
        panel_tile_for<TILE_ROWS>(static_cast<int>(next - t.m))(a, t);
        t.ahead_ld = 0; // everything was fetched during the first tile
    }
}

// A group of panels, already widened, against rows [begin, end) of the copied block of x.
static void panel_group(const Linear &a, PanelTile t, int64_t panels, const uint16_t *ahead, const float *x, int64_t begin,
                        int64_t end) {
    const int64_t size = t.depth_stored * PANEL, first = t.n;
    for (int64_t p = 0; p < panels; ++p) {
        t.n = first + p * PANEL;
        t.columns = static_cast<int>(least<int64_t>(PANEL, a.N - t.n));
        t.ahead = ahead + (t.ahead_ld ? p * PANEL : 0);
        panel_rows(a, t, x, begin, end);
        t.panel += size;
    }
}

static void panel_task(const Linear &a, const LinearPlan &plan, float *scratch, int task) {
    const int64_t blocks = panel_blocks(a, plan), ld = plan.block + X_PAD, units = panel_units(a), unit = panel_unit(a);
    const int tn = task % plan.grid_n, tm = task / plan.grid_n;
    const int64_t first_panel = units * tn / plan.grid_n * unit;
    const int64_t last_panel = least(panel_count(a), units * (tn + 1) / plan.grid_n * unit);
    const int64_t begin = a.M * tm / plan.grid_m, end = a.M * (tm + 1) / plan.grid_m;
    float *panels = scratch + task * panel_scratch(a, plan), *x = panels + plan.block * PANEL * GROUP;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t k0 = b * plan.block, depth = least(plan.block, a.K - k0);
        copy_x(a, begin, end, k0, depth, x, ld);
        for (int64_t p = first_panel; p < last_panel; p += GROUP) {
            const int64_t n0 = p * PANEL, count = least(GROUP, last_panel - p);
            const auto widen = a.packed.records ? widen_packed_panels : widen_panels;
            widen(a, n0, k0, depth, count, plan.block * PANEL, panels);
            const bool last = p + GROUP >= last_panel;
            const int64_t next_n = last ? first_panel * PANEL : n0 + PANEL * GROUP;
            const int64_t next_k = last ? k0 + plan.block : k0;
            // Only where a whole next block exists: prefetch addresses stay inside the weights.
            const bool fetch = !a.packed.records && next_n + PANEL * GROUP <= a.N && next_k + plan.block <= a.K;
            PanelTile t = {};
            t.ldx = ld, t.panel = panels, t.depth = depth, t.depth_stored = plan.block, t.n = n0;
            t.first = b == 0, t.last = b + 1 == blocks, t.ahead_ld = fetch ? a.ldw : 0;
            panel_group(a, t, count, fetch ? a.w + next_k * a.ldw + next_n : a.w, x, begin, end);
        }
    }
}

} // namespace UPCAST_NS
} // namespace upcast
