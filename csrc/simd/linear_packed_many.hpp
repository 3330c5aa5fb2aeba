// y = x W^T for packed weights and many rows of x: a stretch of rows of weights is widened once, and all of x passes over
// it. As long a piece of K at a time as `DotTile` adds up to one sum, so that the stretch stays in the second-level cache
// and the order of the additions is the same; what the pieces give is kept beside it until the last one came. Chunks that
// stay in the nearest cache, with sums that wait for them lane by lane, were a quarter slower on Zen 3.
#pragma once

#include "simd/linear_packed.hpp"

namespace upcast {
namespace UPCAST_NS {

// Bytes of a stretch: half of a small second-level cache, which processors with AVX-512 do not have.
constexpr int64_t PACKED_WIDE = (LANES == 16 ? 416 : 256) * 1024;

// Floats between rows of a stretch: rows whose distance is a multiple of 4 KiB would evict each other.
static int64_t wide_row(const Linear &a) { return (least(a.K, PACKED_CHAIN) + RECORD - 1) / RECORD * RECORD * WIDE_BYTES / 4 + 16; }

// What one task keeps: the stretch and, where K has several pieces, the sums of its rows of x before and after a piece.
struct ManyRows {
    int64_t ld, wide, sums; // floats
    ManyRows(const Linear &a, const LinearPlan &plan)
        : ld(wide_row(a)), wide(plan.block * ld),
          sums(a.K > PACKED_CHAIN ? (a.M + plan.grid_m - 1) / plan.grid_m * plan.block : 0) {}
    int64_t floats() const { return wide + 2 * sums; }
};

static LinearPlan plan_packed(const Linear &a, int threads) {
    LinearPlan plan = plan_dot(a, threads);
    plan.strategy = Strategy::packed;
    plan.scratch = 0;
    if (RowBlocks(a, plan, 0).count <= PACKED_BLOCKS && plan.grid_m == 1) return plan;
    constexpr int64_t TALLEST_TILES = 12; // a multiple of every tile's height
    const int64_t rows = PACKED_WIDE / WIDE_BYTES / (least(a.K, PACKED_CHAIN) + 1);
    plan.block = least(STRETCH, most<int64_t>(1, rows / TALLEST_TILES) * TALLEST_TILES);
    plan.scratch = sizeof(float) * static_cast<size_t>(plan.tasks[0] * ManyRows(a, plan).floats());
    return plan;
}

// Numbers of `rows` rows from n on and from column k on, which are widened next: the second-level cache gets them
// meanwhile, a part with each block of x.
struct ComingRows {
    int64_t n, rows, k, width;
    void fetch(const PackedRows &a, int64_t part, int64_t parts) const {
        const int64_t bytes = (width + RECORD - 1) / RECORD * RECORD_BYTES;
        for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; ++i) {
            const uint8_t *record = record_of(a, n + i, k);
            for (int64_t at = 0; at < bytes; at += 64) prefetch_far(record + at);
        }
    }
};

// Rows [n, n + count) of the weights against the rows of x, piece by piece of K; `next_rows` come after them.
static void packed_pieces(const Linear &a, const RowBlocks &x, int64_t n, int64_t count, int64_t next_rows, const ManyRows &room,
                          float *wide) {
    float *before = wide + room.wide, *after = before + room.sums;
    Linear piece = a; // of one piece: rows of x and of weights are counted from the first ones here
    piece.x += x.first * a.ldx, piece.bias = nullptr, piece.ldy = piece.ldr = count;
    for (int64_t k = 0; k < a.K; k += PACKED_CHAIN, piece.x += PACKED_CHAIN) {
        piece.K = least(PACKED_CHAIN, a.K - k), piece.y = after, piece.residual = k ? before : nullptr;
        for (int64_t i = 0; i < count; ++i) unpack_row(a.packed, n + i, k, piece.K, wide + i * room.ld);
        const int64_t then = k + PACKED_CHAIN;
        const ComingRows coming = then < a.K ? ComingRows{n, count, then, least(PACKED_CHAIN, a.K - then)}
                                             : ComingRows{n + count, next_rows, 0, PACKED_CHAIN};
        for (int64_t block = 0; block < x.count; ++block) {
            coming.fetch(a.packed, block, x.count);
            const int64_t m = x.begin(block) - x.first, next = x.begin(block + 1) - x.first;
            wide_block(piece, wide, room.ld, 0, count, m, next);
        }
        float *sums = before;
        before = after, after = sums;
    }
    finish_dots(a, n, count, x.first, static_cast<int>(x.rows), before, count);
}

static void packed_task(const Linear &a, const LinearPlan &plan, float *scratch, int task) {
    const int tn = task % plan.grid_n;
    const int64_t begin = a.N * tn / plan.grid_n, end = a.N * (tn + 1) / plan.grid_n;
    const RowBlocks x(a, plan, task);
    if (!plan.scratch) return packed_few_rows_for<DOT_COLS>(widest_block(x), x.count > 1)(a, x, begin, end, plan.reading);
    const ManyRows room(a, plan);
    float *wide = scratch + task * room.floats();
    for (int64_t n = begin; n < end; n += plan.block) {
        const int64_t count = least(plan.block, end - n), next_rows = least(plan.block, end - n - count);
        if (room.sums) {
            packed_pieces(a, x, n, count, next_rows, room, wide);
            continue;
        }
        for (int64_t i = 0; i < count; ++i) unpack_row(a.packed, n + i, 0, a.K, wide + i * room.ld);
        const ComingRows coming = {n + count, next_rows, 0, a.K};
        for (int64_t block = 0; block < x.count; ++block) {
            coming.fetch(a.packed, block, x.count);
            wide_block(a, wide, room.ld, n, n + count, x.begin(block), x.begin(block + 1));
        }
    }
}

} // namespace UPCAST_NS
} // namespace upcast
