// Many rows of x on AMX, whose tiles multiply bfloat16 and add in float32, without losing float32's accuracy.
//
// A half is the exact sum of two bfloat16 numbers and a float of three, by truncation: 11 = 8 + 3 and
// 24 = 8 + 8 + 8 significant bits. Five of the six products of these pieces are added up; the sixth, of both
// last pieces, is below the last bit of a float. (The idea of splitting is Dekker's, 1971; for bfloat16 units
// see Henry, Tang and Heinecke, 2019, arXiv:1904.06376.)
//
// Rows of weights or of x go into tiles of 16 by 32 pieces, the second operand with pairs of k side by side.
// Any pairing of k will do if both operands use the same: here k with k + 16. Pieces of numbers that are
// not finite, or so small that their last pieces would be subnormal (AMX reads these as zero), would not
// add up: a task that meets such numbers leaves its part of y to the other strategies.
#pragma once

#include "kernels.hpp"
#include "linear_dot.hpp"
#include "linear_panel.hpp"
#include "simd.hpp"

#if UPCAST_LEVEL == 5

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t TILE = 16;                  // rows of a tile; both operands' tiles are 16 x 16 pairs
constexpr int64_t STEP = 32;                  // k per tile
constexpr int64_t PIECE = TILE * STEP;        // bfloat16 numbers in a tile
constexpr int X_PIECES = 3, W_PIECES = 2;
constexpr int64_t TILES_K = 1024, TILES_M = 128; // a block of x stays in the second-level cache
constexpr int64_t TILES_N = 2 * TILE;         // columns of y computed together
// Fewest rows of x for which tiles are the fastest.
constexpr int64_t LEAST_FORWARD = 20, LEAST_BACKWARD = 10;

struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are a state of the thread, which other libraries set up in their own way.
class TilesInUse {
  public:
    TilesInUse() {
        static const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~TilesInUse() { _tile_release(); }
    TilesInUse(const TilesInUse &) = delete;
    TilesInUse &operator=(const TilesInUse &) = delete;
};

// Writes the pieces of the pairs (a[i], b[i]), a's in the lower half of each 32 bits, PIECE numbers apart.
template <int PIECES> UPCAST_INLINE void store_pieces(uint16_t *out, vf a, vf b) {
    const vi upper = splat_bits(static_cast<int32_t>(0xffff0000u));
    for (int piece = 0; piece < PIECES; ++piece) {
        const vi top_a = (vi)a & upper, top_b = (vi)b & upper;
        const vu pair = (vu)top_a >> 16 | (vu)top_b;
        memcpy(out + piece * PIECE, &pair, sizeof pair);
        a -= (vf)top_a, b -= (vf)top_b;
    }
}

// A block of K: whether it is the first or the last one decides what joins its sums in y.
struct TileBlock {
    int64_t k, depth;
    bool first, last;
    int64_t steps() const { return (depth + STEP - 1) / STEP; }
};

// What was met while packing, one lane per row or all lanes alike.
struct Range {
    vi largest = {};
    UPCAST_ALWAYS_INLINE void see(vf v) {
        const vi size = (vi)v & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    // Whether the pieces of every row add up to its numbers.
    UPCAST_ALWAYS_INLINE bool exact() const {
        constexpr int32_t INFINITE = 0x7f800000, SMALL = (127 - 80) << 23;
        const vi bad = (largest >= INFINITE) | ((largest > 0) & (largest < SMALL));
        int32_t any = 0;
        for (int i = 0; i < LANES; ++i) any |= bad[i];
        return any == 0;
    }
};

// Whether any weight met while packing was not finite.
struct HalfRange {
    vi found = {};
    // STEP halves: those whose exponent is full become negative when one is added to it.
    UPCAST_ALWAYS_INLINE void see(const uint16_t *w) {
        vi pairs;
        memcpy(&pairs, w, sizeof pairs);
        found |= (pairs & 0x7fff7fff) + 0x04000400;
    }
    UPCAST_ALWAYS_INLINE void see(vf widened) {
        found |= ((vi)widened & 0x7f800000) == 0x7f800000;
    }
    UPCAST_ALWAYS_INLINE bool finite() const {
        int32_t any = 0;
        for (int i = 0; i < LANES; ++i) any |= found[i];
        return (any & 0x80008000) == 0;
    }
};

UPCAST_INLINE vf load_some(const float *p, int64_t count) {
    return count >= LANES ? load(p) : count > 0 ? load_part(p, static_cast<int>(count)) : vf{};
}
UPCAST_INLINE vf load_some(const uint16_t *p, int64_t count) {
    return count >= LANES ? load(p) : count > 0 ? load_part(p, static_cast<int>(count)) : vf{};
}

// Rows of x; beyond the last one, the last one again.
struct Source {
    const float *data;
    int64_t ld, rows;
    UPCAST_ALWAYS_INLINE const float *row(int64_t i) const { return data + least(i, rows - 1) * ld; }
};

// First operand, from rows of k: row i of a tile holds the pairs of row first + i.
static bool pack_rows_of_x(Source from, int64_t first, int64_t depth, uint16_t *out) {
    Range ranges[TILE];
    for (int64_t k = 0; k < depth; k += STEP, out += X_PIECES * PIECE) {
        for (int64_t i = 0; i < TILE; ++i) {
            const float *row = from.row(first + i) + k;
            const vf a = load_some(row, depth - k), b = load_some(row + TILE, depth - k - TILE);
            ranges[i].see(a), ranges[i].see(b);
            store_pieces<X_PIECES>(out + i * STEP, a, b);
        }
    }
    bool exact = true;
    for (const Range &range : ranges) {
        Range whole;
        whole.largest = splat_bits(largest_lane(range.largest));
        exact &= whole.exact();
    }
    return exact;
}

// Second operand, from rows of k: column i of a tile holds the pairs of row first + i.
static bool pack_columns_of_x(Source from, int64_t first, int64_t depth, uint16_t *out) {
    Range range;
    for (int64_t k = 0; k < depth; k += STEP, out += X_PIECES * PIECE) {
        vf a[TILE], b[TILE];
        for (int64_t i = 0; i < TILE; ++i) {
            const float *row = from.row(first + i) + k;
            a[i] = load_some(row, depth - k), b[i] = load_some(row + TILE, depth - k - TILE);
        }
        transpose(a), transpose(b);
        for (int64_t j = 0; j < TILE; ++j) {
            range.see(a[j]), range.see(b[j]);
            store_pieces<X_PIECES>(out + j * STEP, a[j], b[j]);
        }
    }
    return range.exact();
}

// First operand, from rows of k of the weights: [n, n + TILE), the last row repeated. Tile by tile, which writes
// in order: along the rows, the tiles' lines would evict each other.
static void pack_rows(const Linear &a, const TileBlock &block, int64_t n, uint16_t *out, HalfRange &all) {
    HalfRange range = all; // in a register, which memory that anyone may write to is not
    const uint16_t *rows[TILE];
    for (int64_t i = 0; i < TILE; ++i) rows[i] = a.w + least(n + i, a.N - 1) * a.ldw + block.k;
    int64_t k = 0;
    for (; k + STEP <= block.depth; k += STEP, out += W_PIECES * PIECE) {
        for (int64_t i = 0; i < TILE; ++i) {
            range.see(rows[i] + k);
            store_pieces<W_PIECES>(out + i * STEP, load_half(rows[i] + k), load_half(rows[i] + k + TILE));
        }
    }
    for (int64_t i = 0; k < block.depth && i < TILE; ++i) {
        const vf first = load_some(rows[i] + k, block.depth - k);
        const vf second = load_some(rows[i] + k + TILE, block.depth - k - TILE);
        range.see(first), range.see(second);
        store_pieces<W_PIECES>(out + i * STEP, first, second);
    }
    all = range;
}

// Second operand, from rows of n of the weights: columns [n, n + TILES_N), zero beyond the last one, into two rows
// of tiles `next` apart. A row's next line is fetched for the next columns: rows may be pages apart.
static void pack_stacked(const Linear &a, const TileBlock &block, int64_t n, uint16_t *out, int64_t next, HalfRange &range) {
    const int64_t columns = a.N - n, ahead = columns > TILES_N ? TILES_N : 0;
    for (int64_t k = 0; k < block.depth; k += STEP, out += W_PIECES * PIECE) {
        for (int64_t j = 0; j < TILE; ++j) {
            const uint16_t *first = a.w + (block.k + k + j) * a.ldw + n, *second = first + TILE * a.ldw;
            const int64_t in_first = k + j < block.depth ? columns : 0;
            const int64_t in_second = k + j + TILE < block.depth ? columns : 0;
            if (in_second) prefetch(first + ahead), prefetch(second + ahead);
            for (int64_t tile = 0; tile < 2; ++tile) {
                const vf upper = load_some(first + tile * TILE, in_first - tile * TILE);
                const vf lower = load_some(second + tile * TILE, in_second - tile * TILE);
                range.see(upper), range.see(lower);
                store_pieces<W_PIECES>(out + tile * next + j * STEP, upper, lower);
            }
        }
    }
}

// Sums of 2 x 2 tiles, and the distance between the tiles of an operand.
typedef float TileSums[2][2][TILE][TILE];

#define UPCAST_MULTIPLY_FOUR() \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7)
#define UPCAST_LOAD_FIRST(piece) \
    _tile_loadd(4, first + (piece)*PIECE, 64); \
    _tile_loadd(5, first + (piece)*PIECE + first_next, 64)
#define UPCAST_LOAD_SECOND(piece) \
    _tile_loadd(6, second + (piece)*PIECE, 64); \
    _tile_loadd(7, second + (piece)*PIECE + second_next, 64)

// Lines of weights to fetch while tiles multiply: `rows` of them per step along k, one step further in each row.
struct Ahead {
    const uint16_t *w = nullptr;
    int64_t ld = 0, rows = 0;
    UPCAST_ALWAYS_INLINE void fetch(int64_t step) const {
        for (int64_t i = 0; i < rows; ++i) prefetch(w + i * ld + step * STEP);
    }
};

// The intrinsics do not tell the compiler which memory they read: whatever was packed must have been stored.
static void zero_sums() {
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static void store_sums(TileSums &sums) {
    _tile_stored(0, sums[0][0], 64);
    _tile_stored(1, sums[0][1], 64);
    _tile_stored(2, sums[1][0], 64);
    _tile_stored(3, sums[1][1], 64);
    __asm__ volatile("" ::: "memory");
}

// sums[i][j] = tile i of the first operand times tile j of the second, over `steps` tiles along k. Small
// products go first. WEIGHTS_FIRST: the first operand has the two pieces of weights, the second x's three.
template <bool WEIGHTS_FIRST>
static void multiply_square(const uint16_t *first, int64_t first_next, const uint16_t *second, int64_t second_next,
                            int64_t steps, const Ahead &ahead, TileSums &sums) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s) {
        ahead.fetch(s);
        if constexpr (WEIGHTS_FIRST) {
            UPCAST_LOAD_FIRST(1);
            UPCAST_LOAD_SECOND(1);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_SECOND(0);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_FIRST(0);
            UPCAST_LOAD_SECOND(2);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_SECOND(1);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_SECOND(0);
            UPCAST_MULTIPLY_FOUR();
        } else {
            UPCAST_LOAD_SECOND(1);
            UPCAST_LOAD_FIRST(1);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_FIRST(0);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_SECOND(0);
            UPCAST_LOAD_FIRST(2);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_FIRST(1);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_FIRST(0);
            UPCAST_MULTIPLY_FOUR();
        }
        first += (WEIGHTS_FIRST ? W_PIECES : X_PIECES) * PIECE;
        second += (WEIGHTS_FIRST ? X_PIECES : W_PIECES) * PIECE;
    }
    store_sums(sums);
}

// As above for one tile of x. Two tiles of weights alone would wait for each other's sums: the products with
// the second piece of the weights have sums of their own, in sums[1].
template <bool WEIGHTS_FIRST>
static void multiply_thin(const uint16_t *w, int64_t w_next, const uint16_t *x, int64_t steps, const Ahead &ahead,
                          TileSums &sums) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s, w += W_PIECES * PIECE, x += X_PIECES * PIECE) {
        ahead.fetch(s);
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + PIECE, 64);
        _tile_loadd(6, x + 2 * PIECE, 64);
        if constexpr (WEIGHTS_FIRST) {
            _tile_loadd(7, w, 64);
            _tile_dpbf16ps(0, 7, 6);
            _tile_dpbf16ps(0, 7, 5);
            _tile_dpbf16ps(0, 7, 4);
            _tile_loadd(7, w + w_next, 64);
            _tile_dpbf16ps(1, 7, 6);
            _tile_dpbf16ps(1, 7, 5);
            _tile_dpbf16ps(1, 7, 4);
            _tile_loadd(7, w + PIECE, 64);
            _tile_dpbf16ps(2, 7, 5);
            _tile_dpbf16ps(2, 7, 4);
            _tile_loadd(7, w + w_next + PIECE, 64);
            _tile_dpbf16ps(3, 7, 5);
            _tile_dpbf16ps(3, 7, 4);
        } else {
            _tile_loadd(7, w, 64);
            _tile_dpbf16ps(0, 6, 7);
            _tile_dpbf16ps(0, 5, 7);
            _tile_dpbf16ps(0, 4, 7);
            _tile_loadd(7, w + w_next, 64);
            _tile_dpbf16ps(1, 6, 7);
            _tile_dpbf16ps(1, 5, 7);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(7, w + PIECE, 64);
            _tile_dpbf16ps(2, 5, 7);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(7, w + w_next + PIECE, 64);
            _tile_dpbf16ps(3, 5, 7);
            _tile_dpbf16ps(3, 4, 7);
        }
    }
    store_sums(sums);
}

#undef UPCAST_MULTIPLY_FOUR
#undef UPCAST_LOAD_FIRST
#undef UPCAST_LOAD_SECOND

// y[m .. m + TILE)[n .. n + TILE) from rows[m][n], as far as y goes.
static void finish_tile(const Linear &a, const TileBlock &block, const vf *rows, int64_t m, int64_t n) {
    if (n >= a.N) return;
    const int count = static_cast<int>(least<int64_t>(LANES, a.N - n));
    for (int64_t i = 0; i < least(TILE, a.M - m); ++i) finish_vector(a, m + i, n, count, rows[i], block.first, block.last);
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
    if (a.transposed || end > a.N || block.k + block.steps() * STEP > a.K) return {};
    return {a.w + begin * a.ldw + block.k, a.ldw, end - begin};
}

// One group of columns of y, [n, n + TILES_N), whose weights are packed at w, against the rows of x packed at x.
static void tile_group(const Linear &a, const TileBlock &block, const uint16_t *w, const uint16_t *x, int64_t begin,
                       int64_t end, int64_t n) {
    const int64_t steps = block.steps(), next_w = steps * W_PIECES * PIECE, next_x = steps * X_PIECES * PIECE;
    const int64_t squares = (end - begin + 2 * TILE - 1) / (2 * TILE);
    TileSums sums;
    for (int64_t i = 0; i < squares; ++i, x += 2 * next_x) {
        const int64_t m = begin + 2 * TILE * i;
        const Ahead ahead = ahead_of(a, block, n, i, squares);
        if (m + TILE >= end) {
            if (a.transposed) multiply_thin<false>(w, next_w, x, steps, ahead, sums);
            else multiply_thin<true>(w, next_w, x, steps, ahead, sums);
            finish_thin(a, block, sums, m, n);
        } else {
            if (a.transposed) multiply_square<false>(x, next_x, w, next_w, steps, ahead, sums);
            else multiply_square<true>(w, next_w, x, next_x, steps, ahead, sums);
            finish_square(a, block, sums, m, n);
        }
    }
}

static bool pack_x(const Linear &a, const TileBlock &block, int64_t begin, int64_t end, uint16_t *out) {
    const Source rows = {a.x + block.k, a.ldx, a.M};
    bool exact = true;
    for (int64_t m = begin; m < end; m += TILE, out += block.steps() * X_PIECES * PIECE) {
        exact &= a.transposed ? pack_rows_of_x(rows, m, block.depth, out) : pack_columns_of_x(rows, m, block.depth, out);
    }
    return exact;
}

static int64_t tile_depth(const Linear &a) { return (least(a.K, TILES_K) + STEP - 1) / STEP * STEP; }

// bfloat16 numbers of a block of x.
static int64_t tile_x(const Linear &a) { return (least(a.M, TILES_M) + TILE - 1) / TILE * TILE * tile_depth(a) * X_PIECES; }

// bfloat16 numbers of the weights of a group of columns.
static int64_t tile_w(const Linear &a) { return TILES_N * tile_depth(a) * W_PIECES; }

// Bytes of scratch per task: a block of x and a group's weights, or what panels take instead.
static size_t tile_scratch(const Linear &a) {
    const size_t own = sizeof(uint16_t) * static_cast<size_t>(tile_x(a) + tile_w(a));
    const size_t instead = a.transposed ? plan_panel(a, 1).scratch : 0;
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

// One block of x against all weights; false if some pieces did not add up.
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
        tile_group(a, block, w, scratch, m, next, n);
    }
    return range.finite();
}

// All of a, on this thread; false if some pieces did not add up, and y is not to be used.
static bool multiply_tiles(const Linear &a, uint16_t *scratch) {
    const TilesInUse tiles;
    for (int64_t k = 0; k < a.K; k += TILES_K) {
        const TileBlock block = {k, least(TILES_K, a.K - k), k == 0, k + TILES_K >= a.K};
        for (int64_t m = 0; m < a.M; m += TILES_M) {
            if (!multiply_block(a, block, m, least(a.M, m + TILES_M), scratch)) return false;
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
    part.x += m * a.ldx, part.w += a.transposed ? n : n * a.ldw, part.y += m * a.ldy + n;
    if (a.bias) part.bias += n;
    if (a.residual) part.residual += m * a.ldr + n;
    return part;
}

static void tile_task(const Linear &a, const LinearPlan &plan, void *scratch, int task) {
    const Linear part = tile_part(a, plan, task);
    char *own = static_cast<char *>(scratch) + static_cast<size_t>(task) * tile_scratch(a);
    if (multiply_tiles(part, reinterpret_cast<uint16_t *>(own))) return;
    if (a.transposed) panel_task(part, plan_panel(part, 1), reinterpret_cast<float *>(own), 0);
    else dot_task(part, plan_dot(part, 1), nullptr, 0);
}

} // namespace UPCAST_NS
} // namespace upcast

#endif
