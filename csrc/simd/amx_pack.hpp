// Splitting floats and halves into bfloat16 pieces, laid out as AMX tiles: see simd/amx_linear.hpp.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/simd.hpp"

#if UPCAST_AMX

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t TILE = 16;                  // rows of a tile; both operands' tiles are 16 x 16 pairs
constexpr int64_t STEP = 32;                  // k per tile
constexpr int64_t PIECE = TILE * STEP;        // numbers in a tile
constexpr int X_PIECES = 3, W_PIECES = 2;
constexpr int64_t TILES_N = 2 * TILE;         // columns of y computed together
constexpr int64_t TILES_K = 1024, TILES_M = 128; // a block of x stays in the second-level cache

// Writes the pieces of the pairs (a[i], b[i]), a's in the lower half of each 32 bits, PIECE numbers apart. Returns the
// last pieces: without their signs they are zero where the first ones say everything.
template <int PIECES> UPCAST_INLINE vi store_pieces(uint16_t *out, vf a, vf b) {
    vu last = {};
    const vi upper = splat_bits(static_cast<int32_t>(0xffff0000u));
    for (int piece = 0; piece < PIECES; ++piece) {
        const vi top_a = (vi)a & upper, top_b = (vi)b & upper;
        const vu pair = (vu)top_a >> 16 | (vu)top_b;
        memcpy(out + piece * PIECE, &pair, sizeof pair);
        a -= (vf)top_a, b -= (vf)top_b;
        last = pair;
    }
    return (vi)last;
}

// A block of K: whether it is the first or the last one decides what joins its sums in y.
struct TileBlock {
    int64_t k, depth;
    bool first, last;
    const float *undo = nullptr; // for row m of x, at m % TILES_M: what its sums are multiplied by, if by anything
    int64_t steps() const { return (depth + STEP - 1) / STEP; }
};

// What was met while packing, one lane per row or all lanes alike.
struct Range {
    vi largest = {};
    UPCAST_ALWAYS_INLINE void see(vf v) {
        const vi size = (vi)v & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    // Whether the pieces of every row add up to its numbers, which must not all be below `tiny`, the bits of a float.
    UPCAST_ALWAYS_INLINE bool exact(int32_t tiny) const {
        constexpr int32_t INFINITE = 0x7f800000;
        const vi bad = (largest >= INFINITE) | ((largest > 0) & (largest < tiny));
        int32_t any = 0;
        for (int i = 0; i < LANES; ++i) any |= bad[i];
        return any == 0;
    }
};

// Whether any weight met while packing was not finite, and whether any of those of the group needs its second piece:
// none does that was a bfloat16 number, whose 8 digits are the first.
struct HalfRange {
    vi found = {}, second = {};
    UPCAST_ALWAYS_INLINE bool needs_second() const {
        int32_t any = 0;
        for (int i = 0; i < LANES; ++i) any |= second[i];
        return (any & 0x7fff7fff) != 0;
    }
    // STEP halves: those whose exponent is full become negative when one is added to it.
    UPCAST_ALWAYS_INLINE void see(const uint16_t *w) {
        vi pairs;
        memcpy(&pairs, w, sizeof pairs);
        see_pairs(pairs);
    }
    UPCAST_ALWAYS_INLINE void see_pairs(vi pairs) { found |= (vi)(((vu)pairs & 0x7fff7fffu) + 0x04000400u); }
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
static bool pack_rows_of_x(Source from, int64_t first, int64_t depth, int32_t tiny, uint16_t *out) {
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
        exact &= whole.exact(tiny);
    }
    return exact;
}

// Second operand, from rows of k: column i of a tile holds the pairs of row first + i.
static bool pack_columns_of_x(Source from, int64_t first, int64_t depth, int32_t tiny, uint16_t *out) {
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
    return range.exact(tiny);
}

#if UPCAST_LEVEL == 5 // later ones multiply halves: simd/amx_half.hpp

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
            range.second |= store_pieces<W_PIECES>(out + i * STEP, load_half(rows[i] + k), load_half(rows[i] + k + TILE));
        }
    }
    for (int64_t i = 0; k < block.depth && i < TILE; ++i) {
        const vf first = load_some(rows[i] + k, block.depth - k);
        const vf second = load_some(rows[i] + k + TILE, block.depth - k - TILE);
        range.see(first), range.see(second);
        range.second |= store_pieces<W_PIECES>(out + i * STEP, first, second);
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
                range.second |= store_pieces<W_PIECES>(out + tile * next + j * STEP, upper, lower);
            }
        }
    }
}

#endif

} // namespace UPCAST_NS
} // namespace upcast

#endif
