// Many rows of x on AMX, whose tiles multiply bfloat16 and add in float32, without losing float32's accuracy.
//
// A half is the exact sum of two bfloat16 numbers and a float of three, by truncation: 11 = 8 + 3 and
// 24 = 8 + 8 + 8 significant bits. Five of the six products of these pieces are added up; the sixth, of both
// last pieces, is below the last bit of a float. Weights that were bfloat16, or are packed, have no second piece: three are
// left. (The idea of splitting is Dekker's, 1971; for bfloat16 units see Henry, Tang and Heinecke, 2019, arXiv:1904.06376.)
//
// Rows of weights or of x go into tiles of 16 by 32 pieces, the second operand with pairs of k side by side.
// Any pairing of k will do if both operands use the same: here k with k + 16. Pieces of numbers that are
// not finite, or so small that their last pieces would be subnormal (AMX reads these as zero), would not
// add up: a task that meets such numbers leaves its part of y to the other strategies.
//
// Where AMX multiplies float16 as well (level 6), float16 weights are tiles as they are: see simd/amx_half.hpp. Packed ones
// are bfloat16 numbers there too.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/linear_dot.hpp"
#include "simd/linear_packed_many.hpp"
#include "simd/linear_panel.hpp"
#include "simd/simd.hpp"
#include "simd/amx_half.hpp"
#include "simd/amx_pack.hpp"
#include "simd/amx_packed.hpp"
#include "simd/amx_products.hpp"

#if UPCAST_AMX

namespace upcast {
namespace UPCAST_NS {

// Fewest rows of x for which tiles are the fastest.
constexpr int64_t LEAST_FORWARD = 20, LEAST_BACKWARD = 10;

// y[m .. m + TILE)[n .. n + TILE) from rows[m][n], as far as y goes.
static void finish_tile(const Linear &a, const TileBlock &block, const vf *rows, int64_t m, int64_t n) {
    if (n >= a.N) return;
    const int count = static_cast<int>(least<int64_t>(LANES, a.N - n));
    for (int64_t i = 0; i < least(TILE, a.M - m); ++i) {
        const vf sums = block.undo ? rows[i] * block.undo[(m + i) % TILES_M] : rows[i];
        finish_vector(a, m + i, n, count, sums, block.first, block.last);
    }
}

static void finish_square(const Linear &a, const TileBlock &block, const TileSums &sums, int64_t m, int64_t n) {
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            vf rows[TILE];
            for (int64_t r = 0; r < TILE; ++r) rows[r] = load(sums[i][j][r]);
            if (!a.transposed) transpose(rows);
            const int tile_m = a.transposed ? i : j, tile_n = a.transposed ? j : i;
            finish_tile(a, block, rows, m + tile_m * TILE, n + tile_n * TILE);
        }
    }
}

static void finish_thin(const Linear &a, const TileBlock &block, const TileSums &sums, int64_t m, int64_t n) {
    for (int i = 0; i < 2; ++i) {
        vf rows[TILE];
        for (int64_t r = 0; r < TILE; ++r) rows[r] = load(sums[0][i][r]) + load(sums[1][i][r]);
        if (!a.transposed) transpose(rows);
        finish_tile(a, block, rows, m, n + i * TILE);
    }
}

// The part of the next group's rows of weights that is fetched beside the i-th of `count` squares of tiles. Rows
// that are not whole are left out: addresses stay inside the weights. Rows of n are fetched when they are packed.
static Ahead ahead_of(const Linear &a, const TileBlock &block, int64_t n, int64_t i, int64_t count) {
    const int64_t begin = n + TILES_N + TILES_N * i / count, end = n + TILES_N + TILES_N * (i + 1) / count;
    if (a.packed.records || a.transposed || end > a.N || block.k + block.steps() * STEP > a.K) return {};
    return {a.w + begin * a.ldw + block.k, a.ldw, end - begin};
}

// One group of columns of y, [n, n + TILES_N), whose weights are packed at w, against the rows of x packed at x.
template <class Products>
static void tile_group(const Linear &a, const TileBlock &block, const uint16_t *w, const uint16_t *x, int64_t begin,
                       int64_t end, int64_t n) {
    const int64_t steps = block.steps(), next_w = steps * Products::W_STEP, next_x = steps * Products::X_STEP;
    const int64_t squares = (end - begin + 2 * TILE - 1) / (2 * TILE);
    TileSums sums;
    for (int64_t i = 0; i < squares; ++i, x += 2 * next_x) {
        const int64_t m = begin + 2 * TILE * i;
        const Ahead ahead = ahead_of(a, block, n, i, squares);
        if (m + TILE >= end) {
            if (a.transposed) Products::template thin<false>(w, next_w, x, steps, ahead, sums);
            else Products::template thin<true>(w, next_w, x, steps, ahead, sums);
            finish_thin(a, block, sums, m, n);
        } else {
            if (a.transposed) Products::template square<false>(x, next_x, w, next_w, steps, ahead, sums);
            else Products::template square<true>(w, next_w, x, next_x, steps, ahead, sums);
            finish_square(a, block, sums, m, n);
        }
    }
}

static bool pack_x(const Linear &a, const TileBlock &block, int64_t begin, int64_t end, uint16_t *out) {
    const Source rows = {a.x + block.k, a.ldx, a.M};
    const int32_t tiny = a.packed.records ? TINY_X_PACKED : TINY_X;
    bool exact = true;
    for (int64_t m = begin; m < end; m += TILE, out += block.steps() * X_PIECES * PIECE) {
        exact &= a.transposed ? pack_rows_of_x(rows, m, block.depth, tiny, out) : pack_columns_of_x(rows, m, block.depth, tiny, out);
    }
    return exact;
}

static int64_t tile_depth(const Linear &a) { return (least(a.K, TILES_K) + STEP - 1) / STEP * STEP; }

// bfloat16 numbers of a block of x.
static int64_t tile_x(const Linear &a) { return (least(a.M, TILES_M) + TILE - 1) / TILE * TILE * tile_depth(a) * X_PIECES; }

// bfloat16 numbers of the weights of a group of columns.
static int64_t tile_w(const Linear &a) { return TILES_N * tile_depth(a) * W_PIECES; }

// Floats of packed rows while they go into tiles.
static int64_t tile_wide(const Linear &a) { return a.packed.records ? TILE * unpacked_row(tile_depth(a)) : 0; }

// Bytes of scratch per task: a block of x and a group's weights, or what others take instead.
static size_t tile_scratch(const Linear &a) {
    const size_t own = sizeof(uint16_t) * static_cast<size_t>(tile_x(a) + tile_w(a)) + sizeof(float) * static_cast<size_t>(tile_wide(a));
    const size_t instead = a.packed.records ? plan_packed(a, 1).scratch : a.transposed ? plan_panel(a, 1).scratch : 0;
    return (most(own, instead) + 63) / 64 * 64;
}

// Instructions do not count here, only what each thread would do twice: splitting x, or splitting the weights.
static LinearPlan plan_tiles(const Linear &a, int threads) {
    LinearPlan plan = {};
    plan.strategy = Strategy::tiles;
    const int64_t groups = (a.N + TILES_N - 1) / TILES_N, bands = (a.M + TILES_M - 1) / TILES_M;
    const bool by_rows = bands >= threads && a.M > a.N;
    plan.grid_m = by_rows ? threads : 1;
    plan.grid_n = by_rows ? 1 : static_cast<int>(least<int64_t>(threads, groups));
    plan.tasks[0] = plan.grid_n * plan.grid_m;
    plan.scratch = static_cast<size_t>(plan.tasks[0]) * tile_scratch(a);
    return plan;
}

// One block of x against all weights, packed ones; false if some pieces did not add up.
static bool multiply_packed(const Linear &a, const TileBlock &block, int64_t m, int64_t next, uint16_t *scratch) {
    if (!pack_x(a, block, m, next, scratch)) return false;
    uint16_t *const w = scratch + tile_x(a);
    float *const wide = reinterpret_cast<float *>(w + tile_w(a));
    for (int64_t n = 0; n < a.N; n += TILES_N) {
        if (!pack_packed(a, block, n, wide, w)) return false;
        if (!pack_packed(a, block, n + TILE, wide, w + block.steps() * W_PIECES * PIECE)) return false;
        tile_group<SplitProducts<false>>(a, block, w, scratch, m, next, n);
    }
    return true;
}

#if UPCAST_LEVEL == 6
// The same of float16 weights, which are multiplied as they are.
static bool multiply_block(const Linear &a, const TileBlock &part, int64_t m, int64_t next, uint16_t *scratch) {
    float undo[TILES_M];
    if (!pack_halves_of_x(a, part, m, next, undo, scratch)) return false;
    const TileBlock block = {part.k, part.depth, part.first, part.last, undo};
    uint16_t *const w = scratch + tile_x(a);
    const int64_t tile = block.steps() * PIECE;
    HalfRange range;
    for (int64_t n = 0; n < a.N; n += TILES_N) {
        if (a.transposed) {
            pack_half_stacked(a, block, n, w, tile, range);
        } else {
            pack_half_rows(a, block, n, w, range);
            pack_half_rows(a, block, n + TILE, w + tile, range);
        }
        tile_group<HalfProducts>(a, block, w, scratch, m, next, n);
    }
    return range.finite();
}
#else
// The same of float16 weights, which are split.
static bool multiply_block(const Linear &a, const TileBlock &block, int64_t m, int64_t next, uint16_t *scratch) {
    if (!pack_x(a, block, m, next, scratch)) return false;
    uint16_t *const w = scratch + tile_x(a);
    const int64_t tile = block.steps() * W_PIECES * PIECE;
    HalfRange range;
    for (int64_t n = 0; n < a.N; n += TILES_N) {
        if (a.transposed) {
            pack_stacked(a, block, n, w, tile, range);
        } else {
            pack_rows(a, block, n, w, range);
            pack_rows(a, block, n + TILE, w + tile, range);
        }
        if (range.needs_second()) tile_group<SplitProducts<true>>(a, block, w, scratch, m, next, n);
        else tile_group<SplitProducts<false>>(a, block, w, scratch, m, next, n);
        range.second = vi{};
    }
    return range.finite();
}
#endif

// All of a, on this thread; false if some pieces did not add up, and y is not to be used.
static bool multiply_tiles(const Linear &a, uint16_t *scratch) {
    const TilesInUse tiles;
    for (int64_t k = 0; k < a.K; k += TILES_K) {
        const TileBlock block = {k, least(TILES_K, a.K - k), k == 0, k + TILES_K >= a.K};
        for (int64_t m = 0; m < a.M; m += TILES_M) {
            const int64_t next = least(a.M, m + TILES_M);
            const auto multiply = a.packed.records ? multiply_packed : multiply_block;
            if (!multiply(a, block, m, next, scratch)) return false;
        }
    }
    return true;
}

// The part of y that belongs to one task, as a Linear of its own.
static Linear tile_part(const Linear &a, const LinearPlan &plan, int task) {
    const int tn = task % plan.grid_n, tm = task / plan.grid_n;
    const int64_t groups = (a.N + TILES_N - 1) / TILES_N;
    const int64_t n = groups * tn / plan.grid_n * TILES_N, end = least(a.N, groups * (tn + 1) / plan.grid_n * TILES_N);
    const int64_t m = a.M * tm / plan.grid_m;
    Linear part = a;
    part.M = a.M * (tm + 1) / plan.grid_m - m, part.N = end - n;
    part.x += m * a.ldx, part.y += m * a.ldy + n;
    if (a.packed.records) part.packed.first += n;
    else part.w += a.transposed ? n : n * a.ldw;
    if (a.bias) part.bias += n;
    if (a.residual) part.residual += m * a.ldr + n;
    return part;
}

static void tile_task(const Linear &a, const LinearPlan &plan, void *scratch, int task) {
    const Linear part = tile_part(a, plan, task);
    char *own = static_cast<char *>(scratch) + static_cast<size_t>(task) * tile_scratch(a);
    if (multiply_tiles(part, reinterpret_cast<uint16_t *>(own))) return;
    if (a.packed.records) packed_task(part, plan_packed(part, 1), reinterpret_cast<float *>(own), 0);
    else if (a.transposed) panel_task(part, plan_panel(part, 1), reinterpret_cast<float *>(own), 0);
    else dot_task(part, plan_dot(part, 1), nullptr, 0);
}

} // namespace UPCAST_NS
} // namespace upcast

#endif
