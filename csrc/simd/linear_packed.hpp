// y = x W^T for packed weights. Each number is added in the order in which `DotTile` adds a float16 one, so that what
// both can hold gives the same bits, alone and in a batch.
//
// One row of x: records are unpacked in registers, of several rows of weights in turn, since one sum would wait for
// itself. A few: a tile's rows are unpacked into the nearest cache, a chunk at a time, and met there by all rows of
// x; the sums of a block of these wait beside them. Many: a stretch of rows of weights is widened once.
// The rows of a tile are neighbours, or lie far apart: see linear_far.hpp.
#pragma once

#include "simd/linear_dot.hpp"
#include "simd/linear_far.hpp"
#include "simd/packed.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int ALONE_ROWS = UPCAST_LEVEL == 64 ? 8 : 4; // as many as hide the latency of a multiply-add
constexpr int64_t PACKED_CHUNK = 512;                  // numbers of each row of a tile; a divisor of CHAIN
constexpr int64_t PACKED_BLOCKS = 4;                   // of x that meet a chunk, at most
constexpr int64_t PACKED_AHEAD = 512;                  // bytes between those in use and those being fetched
constexpr int64_t PACKED_WIDE = 64 * 1024;             // floats of a stretch that is widened once
constexpr int64_t PACKED_LINE = 16;                    // tiles whose sums wait for one another
constexpr int MOST_KEPT = 32;                          // sums of a tile

// Where a tile's rows of weights are: the first is n, each other one `apart` rows after the one before.
struct TileRows {
    int64_t n, apart;
    int64_t ahead; // bytes, 0 near the end: addresses stay inside the weights
};

// sum + the products of one record, `count` numbers of it, with what escaped.
static __attribute__((noinline)) vf add_patched(const uint8_t *record, const uint8_t *table, Escapes &escapes, int64_t k,
                                                int64_t count, const float *x, vf sum) {
    float numbers[RECORD];
    unpack_some(record, HighBytesOf(table), count, numbers);
    escapes.patch(k, count, numbers);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) sum += load(numbers + i) * load(x + i);
    if (i == count) return sum;
    const int rest = static_cast<int>(count - i);
    return sum + load_part(numbers + i, rest) * load_part(x + i, rest);
}

template <int R> static void packed_alone(const Linear &a, const RowBlocks &rows, const TileRows &tile, float *dots) {
    typedef DotTile<R, 1, false> Tile;
    const float *x = a.x + rows.first * a.ldx;
    const HighBytesOf high(a.packed.table);
    const uint8_t *w = record_of(a.packed, tile.n, 0);
    const int64_t stride = tile.apart * a.packed.row_bytes;
    Escapes escapes[R];
    for (int r = 0; r < R; ++r) escapes[r] = Escapes::of(a.packed, tile.n + r * tile.apart), dots[r] = 0.0f;
    for (int64_t k = 0; k < a.K;) {
        const bool first = k == 0;
        const int64_t end = least(a.K, k + Tile::CHAIN);
        vf sums[Tile::PADDED];
        UPCAST_UNROLL
        for (int i = 0; i < Tile::PADDED; ++i) sums[i] = vf{};
        for (; k + RECORD <= end; k += RECORD, w += RECORD_BYTES) {
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) {
                const uint8_t *record = w + r * stride;
                prefetch(record + tile.ahead), prefetch(record + tile.ahead + 64);
                if (__builtin_expect(escapes[r].next < k + RECORD, 0)) {
                    sums[r] = add_patched(record, a.packed.table, escapes[r], k, RECORD, x + k, sums[r]);
                    continue;
                }
                vf wide[RECORD_VECTORS];
                unpack_record(record, high, wide);
                UPCAST_UNROLL
                for (int i = 0; i < RECORD_VECTORS; ++i) sums[r] += wide[i] * load(x + k + i * LANES);
            }
        }
        for (int r = 0; k < end && r < R; ++r)
            sums[r] = add_patched(w + r * stride, a.packed.table, escapes[r], k, end - k, x + k, sums[r]);
        k = end;
        for (int r = 0; r < R; ++r) dots[r] = first ? sum(sums[r]) : dots[r] + sum(sums[r]);
    }
}

// kept[c * R + r] += lane by lane, `depth` numbers of rows of weights against COLS rows of x.
template <int R, int COLS>
static void packed_chunk(const float *wide, const float *x, int64_t ldx, int64_t depth, vf *kept) {
    typedef DotTile<R, COLS, false> Tile;
    vf sums[Tile::COUNT];
    UPCAST_UNROLL
    for (int i = 0; i < Tile::COUNT; ++i) sums[i] = kept[i];
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) Tile::step(wide + k, PACKED_CHUNK, x + k, ldx, sums);
    if (k < depth) {
        const int count = static_cast<int>(depth - k);
        UPCAST_UNROLL
        for (int c = 0; c < COLS; ++c) {
            const vf xs = load_part(x + c * ldx + k, count);
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) sums[c * R + r] += load_part(wide + r * PACKED_CHUNK + k, count) * xs;
        }
    }
    UPCAST_UNROLL
    for (int i = 0; i < Tile::COUNT; ++i) kept[i] = sums[i];
}

typedef void (*PackedChunk)(const float *wide, const float *x, int64_t ldx, int64_t depth, vf *kept);

template <int R, int COLS> static PackedChunk packed_chunk_for(int cols) {
    if constexpr (COLS == 0) return nullptr;
    else return cols == COLS ? packed_chunk<R, COLS> : packed_chunk_for<R, COLS - 1>(cols);
}

// Numbers [k, k + depth) of the rows of a tile, each PACKED_CHUNK floats after the other.
template <int R>
UPCAST_INLINE void widen_chunk(const Linear &a, const TileRows &tile, Escapes *escapes, int64_t k, int64_t depth, float *wide) {
    const HighBytesOf high(a.packed.table);
    const uint8_t *w = record_of(a.packed, tile.n, k);
    const int64_t stride = tile.apart * a.packed.row_bytes;
    for (int64_t i = 0; i < depth; i += RECORD, w += RECORD_BYTES) {
        UPCAST_UNROLL
        for (int r = 0; r < R; ++r) {
            const uint8_t *record = w + r * stride;
            prefetch(record + tile.ahead), prefetch(record + tile.ahead + 64);
            vf numbers[RECORD_VECTORS];
            unpack_record(record, high, numbers);
            UPCAST_UNROLL
            for (int v = 0; v < RECORD_VECTORS; ++v) store(wide + r * PACKED_CHUNK + i + v * LANES, numbers[v]);
        }
    }
    for (int r = 0; r < R; ++r)
        if (escapes[r].next < k + depth) escapes[r].patch(k, depth, wide + r * PACKED_CHUNK);
}

// dots[m * R + r] for all rows of x of the task.
template <int R> static void packed_few(const Linear &a, const RowBlocks &rows, const TileRows &tile, float *dots) {
    constexpr int64_t CHAIN = DotTile<1, 1, false>::CHAIN;
    alignas(64) float wide[R * PACKED_CHUNK];
    vf kept[PACKED_BLOCKS][MOST_KEPT];
    Escapes escapes[R];
    PackedChunk chunks[PACKED_BLOCKS];
    for (int r = 0; r < R; ++r) escapes[r] = Escapes::of(a.packed, tile.n + r * tile.apart);
    for (int64_t b = 0; b < rows.count; ++b)
        chunks[b] = packed_chunk_for<R, DOT_COLS>(static_cast<int>(rows.begin(b + 1) - rows.begin(b)));
    for (int64_t i = 0; i < rows.rows * R; ++i) dots[i] = 0.0f;
    for (int64_t k = 0; k < a.K;) {
        const bool first = k == 0;
        const int64_t end = least(a.K, k + CHAIN);
        for (int64_t b = 0; b < rows.count; ++b)
            for (vf &sums : kept[b]) sums = vf{};
        for (; k < end; k += PACKED_CHUNK) {
            const int64_t depth = least(PACKED_CHUNK, end - k);
            widen_chunk<R>(a, tile, escapes, k, depth, wide);
            for (int64_t b = 0; b < rows.count; ++b)
                chunks[b](wide, a.x + rows.begin(b) * a.ldx + k, a.ldx, depth, kept[b]);
        }
        k = end;
        for (int64_t b = 0; b < rows.count; ++b) {
            float *to = dots + (rows.begin(b) - rows.first) * R;
            const int64_t count = (rows.begin(b + 1) - rows.begin(b)) * R;
            for (int64_t i = 0; i < count; ++i) to[i] = first ? sum(kept[b][i]) : to[i] + sum(kept[b][i]);
        }
    }
}

typedef void (*PackedTile)(const Linear &, const RowBlocks &, const TileRows &, float *dots);

struct PackedTiles {
    PackedTile full, single;
    int height; // rows of weights of a full one
};

static PackedTiles packed_tiles(int64_t cols) {
    if (cols == 1) return {packed_alone<ALONE_ROWS>, packed_alone<1>, ALONE_ROWS};
    if (dot_rows(static_cast<int>(cols)) == 4) return {packed_few<4>, packed_few<1>, 4};
    return {packed_few<3>, packed_few<1>, 3};
}

// Rows [begin, end) of weights: their sums go to y a cache line at a time.
static void packed_few_rows(const Linear &a, const RowBlocks &x, int64_t begin, int64_t end, Reading reading) {
    constexpr int64_t MOST_ROWS = PACKED_BLOCKS * DOT_COLS;
    float dots[8 * MOST_ROWS], sums[8 * MOST_ROWS * PACKED_LINE];
    const PackedTiles tiles = packed_tiles(x.begin(1) - x.first);
    const int64_t height = tiles.height, count = (end - begin) / height;
    const bool far = reading == Reading::far_streams;
    const int64_t apart = far ? count : 1, step = far ? 1 : height;
    // sums[(r * rows + m) * LINE + j] where rows lie apart, else sums[m * LINE * height + j * height + r].
    const int64_t by_r = far ? x.rows * PACKED_LINE : 1, by_m = far ? PACKED_LINE : PACKED_LINE * height, by_j = far ? 1 : height;
    const int64_t last = begin + (far ? (height - 1) * count : 0);
    const int64_t fetching = reading == Reading::one_stream ? -1 : a.N - height - (PACKED_AHEAD + 128) / most<int64_t>(1, a.packed.row_bytes) - 2;
    for (int64_t i = 0; i < count; i += PACKED_LINE) {
        const int64_t line = least(PACKED_LINE, count - i);
        for (int64_t j = 0; j < line; ++j) {
            const int64_t n = begin + (i + j) * step;
            const TileRows tile = {n, apart, last - begin + n <= fetching ? PACKED_AHEAD : 0};
            tiles.full(a, x, tile, dots);
            for (int64_t m = 0; m < x.rows; ++m)
                for (int64_t r = 0; r < height; ++r) sums[r * by_r + m * by_m + j * by_j] = dots[m * height + r];
        }
        const int64_t rows = static_cast<int64_t>(x.rows);
        for (int64_t r = 0; far && r < height; ++r)
            finish_dots(a, begin + r * apart + i, line, x.first, static_cast<int>(rows), sums + r * by_r, by_m);
        if (!far) finish_dots(a, begin + i * height, line * height, x.first, static_cast<int>(rows), sums, by_m);
    }
    for (int64_t n = begin + count * height; n < end; ++n) {
        tiles.single(a, x, TileRows{n, 0, 0}, dots);
        finish_dots(a, n, 1, x.first, static_cast<int>(x.rows), dots, 1);
    }
}

static LinearPlan plan_packed(const Linear &a, int threads) {
    LinearPlan plan = plan_dot(a, threads);
    plan.strategy = Strategy::packed;
    plan.scratch = 0;
    if (RowBlocks(a, plan, 0).count <= PACKED_BLOCKS && plan.grid_m == 1) return plan;
    constexpr int64_t TALLEST_TILES = 12; // a multiple of every tile's height
    plan.block = least(STRETCH, most<int64_t>(1, PACKED_WIDE / (a.K + 1) / TALLEST_TILES) * TALLEST_TILES);
    plan.scratch = sizeof(float) * static_cast<size_t>(plan.tasks[0] * plan.block * a.K);
    return plan;
}

static void packed_task(const Linear &a, const LinearPlan &plan, float *scratch, int task) {
    const int tn = task % plan.grid_n;
    const int64_t begin = a.N * tn / plan.grid_n, end = a.N * (tn + 1) / plan.grid_n;
    const RowBlocks x(a, plan, task);
    if (!plan.scratch) return packed_few_rows(a, x, begin, end, plan.reading);
    float *wide = scratch + task * plan.block * a.K;
    for (int64_t n = begin; n < end; n += plan.block) {
        const int64_t next_n = least(end, n + plan.block);
        for (int64_t i = n; i < next_n; ++i) widen_packed(a.packed, i, 0, a.K, wide + (i - n) * a.K);
        for (int64_t block = 0; block < x.count; ++block)
            dot_block<false>(a, Rows<float>{wide, a.K}, n, next_n, x.begin(block), x.begin(block + 1), Reading::one_stream);
    }
}

} // namespace UPCAST_NS
} // namespace upcast
