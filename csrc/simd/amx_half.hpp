// Float16 weights in tiles as they are, where AMX multiplies float16: see simd/amx_linear.hpp.
//
// Each row of x is multiplied by a power of two that brings its largest number to [2^14, 2^15), close to the largest half,
// and each of its numbers becomes the sum of two halves. Less than 2^-23 of a number is lost, or 2^-39 of the row's largest.
// What was multiplied is undone when sums are finished. Unlike bfloat16, halves may be subnormal: AMX reads them as they are.
// A row whose largest number dwarfs most others would lose these, which counts where that one meets weights of zero: it is
// left to the other strategies, as numbers are that are not finite.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/amx_pack.hpp"
#include "simd/amx_products.hpp"

#if UPCAST_LEVEL == 6

// Tile `sum` plus the product of two tiles of halves. gcc before 13 has no name for the instruction: these are its bytes,
// those of the product of bfloat16 tiles but for the last bit of the third one. clang knows nothing of tiles in bytes, and
// might move them.
#ifndef UPCAST_TDPFP16PS
#ifdef __clang__
#define UPCAST_TDPFP16PS(sum, left, right) _tile_dpfp16ps(sum, left, right)
#else
#define UPCAST_TDPFP16PS(sum, left, right) \
    __asm__ volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" : : "i"((~(right)&15) << 3 | 3), "i"(0xc0 | (sum) << 3 | (left)))
#endif
#endif

namespace upcast {
namespace UPCAST_NS {

constexpr int X_HALVES = 2; // pieces of x; weights have one

// A power of two for a row of x, and what undoes it.
struct Scale {
    float up, down;
    // From the bits of the row's largest number. Tiny rows do not reach 2^14, so that neither number is subnormal.
    explicit Scale(int32_t largest) {
        const int32_t exponent = most(largest >> 23, 15), bits[] = {(127 + 127 + 14 - exponent) << 23, (exponent - 14) << 23};
        memcpy(&up, bits, sizeof up);
        memcpy(&down, bits + 1, sizeof down);
    }
};

// The bits of the largest number of a row; negative if two halves do not hold the row: it is not finite, nothing in it is
// normal, or some lane (every LANES-th number) has nothing of the largest one's size, to 20 bits.
static int32_t largest_of(const float *row, int64_t depth) {
    constexpr int32_t LEAST_NORMAL = 0x00800000, INFINITE = 0x7f800000, FAR = 20 << 23;
    Range range;
    for (int64_t k = 0; k < depth; k += LANES) range.see(load_some(row + k, depth - k));
    const int32_t largest = largest_lane(range.largest);
    bool held = largest < INFINITE && (largest == 0 || largest >= LEAST_NORMAL);
    for (int i = 0; i < LANES; ++i) held &= range.largest[i] == 0 || range.largest[i] >= largest - FAR;
    return held ? largest : -1;
}

// Writes the halves that numbers are rounded to and, PIECE halves on, those for what is left, which subtracts exactly.
UPCAST_INLINE void store_halves(uint16_t *out, vf v) {
    store_half(out, v);
    store_half(out + PIECE, v - load_half(out));
}

// From a first operand's tile to a second one's: pairs stay side by side.
static void turn_tile(uint16_t *tile) {
    vf rows[TILE];
    memcpy(rows, tile, sizeof rows);
    transpose(rows);
    memcpy(tile, rows, sizeof rows);
}

// Rows [first, first + TILE) of x times their scales, in pieces.
static void pack_scaled(Source from, int64_t first, int64_t depth, const float *scales, bool turned, uint16_t *out) {
    for (int64_t k = 0; k < depth; k += STEP, out += X_HALVES * PIECE) {
        for (int64_t i = 0; i < TILE; ++i) {
            const float *row = from.row(first + i) + k;
            store_halves(out + i * STEP, load_some(row, depth - k) * scales[i]);
            store_halves(out + i * STEP + LANES, load_some(row + LANES, depth - k - LANES) * scales[i]);
        }
        if (turned) turn_tile(out), turn_tile(out + PIECE);
    }
}

// Rows [begin, end) of x and, for each, what undoes its scale; false if two halves do not hold some row.
static bool pack_halves_of_x(const Linear &a, const TileBlock &block, int64_t begin, int64_t end, float *undo, uint16_t *out) {
    const Source from = {a.x + block.k, a.ldx, a.M};
    for (int64_t m = begin; m < end; m += TILE, undo += TILE, out += block.steps() * X_HALVES * PIECE) {
        float scales[TILE];
        for (int64_t i = 0; i < TILE; ++i) {
            const int32_t largest = largest_of(from.row(m + i), block.depth);
            if (largest < 0) return false;
            const Scale scale(largest);
            scales[i] = scale.up, undo[i] = scale.down;
        }
        pack_scaled(from, m, block.depth, scales, !a.transposed, out);
    }
    return true;
}

// First operand: rows [n, n + TILE) of the weights, the last one repeated.
static void pack_half_rows(const Linear &a, const TileBlock &block, int64_t n, uint16_t *out, HalfRange &all) {
    HalfRange range = all; // in a register, as in pack_rows
    const uint16_t *rows[TILE];
    for (int64_t i = 0; i < TILE; ++i) rows[i] = a.w + least(n + i, a.N - 1) * a.ldw + block.k;
    for (int64_t k = 0; k < block.depth; k += STEP, out += PIECE) {
        const int64_t left = block.depth - k;
        for (int64_t i = 0; i < TILE; ++i) {
            vi pairs = {};
            if (left >= STEP) memcpy(&pairs, rows[i] + k, sizeof pairs);
            else memcpy(&pairs, rows[i] + k, sizeof(uint16_t) * static_cast<size_t>(left));
            range.see_pairs(pairs);
            memcpy(out + i * STEP, &pairs, sizeof pairs);
        }
    }
    all = range;
}

// The bits of LANES halves, zero beyond the first `count`.
UPCAST_INLINE vu load_bits(const uint16_t *p, int64_t count) {
    typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
    halves bits = {};
    if (count >= LANES) memcpy(&bits, p, sizeof bits);
    else if (count > 0) memcpy(&bits, p, sizeof(uint16_t) * static_cast<size_t>(count));
    return __builtin_convertvector(bits, vu);
}

// Second operand: rows of n of the weights, as pack_stacked has them.
static void pack_half_stacked(const Linear &a, const TileBlock &block, int64_t n, uint16_t *out, int64_t next, HalfRange &all) {
    HalfRange range = all;
    const int64_t columns = a.N - n, ahead = columns > TILES_N ? TILES_N : 0;
    for (int64_t k = 0; k < block.depth; k += STEP, out += PIECE) {
        for (int64_t j = 0; j < TILE; ++j) {
            const uint16_t *first = a.w + (block.k + k + 2 * j) * a.ldw + n, *second = first + a.ldw;
            const int64_t in_first = k + 2 * j < block.depth ? columns : 0;
            const int64_t in_second = k + 2 * j + 1 < block.depth ? columns : 0;
            if (in_second) prefetch(first + ahead), prefetch(second + ahead);
            for (int64_t tile = 0; tile < 2; ++tile) {
                const vu upper = load_bits(second + tile * TILE, in_second - tile * TILE) << 16;
                const vi pairs = (vi)(load_bits(first + tile * TILE, in_first - tile * TILE) | upper);
                range.see_pairs(pairs);
                memcpy(out + tile * next + j * STEP, &pairs, sizeof pairs);
            }
        }
    }
    all = range;
}

#define UPCAST_FOUR_HALVES() \
    UPCAST_TDPFP16PS(0, 4, 6); \
    UPCAST_TDPFP16PS(1, 4, 7); \
    UPCAST_TDPFP16PS(2, 5, 6); \
    UPCAST_TDPFP16PS(3, 5, 7)

// As multiply_square.
template <bool WEIGHTS_FIRST>
static void multiply_halves(const uint16_t *first, int64_t first_next, const uint16_t *second, int64_t second_next,
                            int64_t steps, const Ahead &ahead, TileSums &sums) {
    constexpr int64_t FIRST_REST = WEIGHTS_FIRST ? 0 : PIECE, SECOND_REST = WEIGHTS_FIRST ? PIECE : 0;
    zero_sums();
    for (int64_t s = 0; s < steps; ++s, first += FIRST_REST + PIECE, second += SECOND_REST + PIECE) {
        ahead.fetch(s);
        _tile_loadd(4, first + FIRST_REST, 64);
        _tile_loadd(5, first + FIRST_REST + first_next, 64);
        _tile_loadd(6, second + SECOND_REST, 64);
        _tile_loadd(7, second + SECOND_REST + second_next, 64);
        UPCAST_FOUR_HALVES();
        if constexpr (WEIGHTS_FIRST) {
            _tile_loadd(6, second, 64);
            _tile_loadd(7, second + second_next, 64);
        } else {
            _tile_loadd(4, first, 64);
            _tile_loadd(5, first + first_next, 64);
        }
        UPCAST_FOUR_HALVES();
    }
    store_sums(sums);
}

// As multiply_thin: here the products with what is left of x have sums of their own.
template <bool WEIGHTS_FIRST>
static void multiply_halves_thin(const uint16_t *w, int64_t w_next, const uint16_t *x, int64_t steps, const Ahead &ahead,
                                 TileSums &sums) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s, w += PIECE, x += X_HALVES * PIECE) {
        ahead.fetch(s);
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + PIECE, 64);
        _tile_loadd(6, w, 64);
        _tile_loadd(7, w + w_next, 64);
        if constexpr (WEIGHTS_FIRST) {
            UPCAST_TDPFP16PS(0, 6, 5);
            UPCAST_TDPFP16PS(1, 7, 5);
            UPCAST_TDPFP16PS(2, 6, 4);
            UPCAST_TDPFP16PS(3, 7, 4);
        } else {
            UPCAST_TDPFP16PS(0, 5, 6);
            UPCAST_TDPFP16PS(1, 5, 7);
            UPCAST_TDPFP16PS(2, 4, 6);
            UPCAST_TDPFP16PS(3, 4, 7);
        }
    }
    store_sums(sums);
}

#undef UPCAST_FOUR_HALVES

struct HalfProducts {
    static constexpr int64_t W_STEP = PIECE, X_STEP = X_HALVES * PIECE;
    template <bool WEIGHTS_FIRST> static constexpr auto square = multiply_halves<WEIGHTS_FIRST>;
    template <bool WEIGHTS_FIRST> static constexpr auto thin = multiply_halves_thin<WEIGHTS_FIRST>;
};

// Sums of a square of tiles against sums of floats; x has two pieces of each tile, weights have one.
static bool sums_agree(const TileSums &sums, const float *first, int64_t first_pieces, const float *second,
                       int64_t second_pieces) {
    bool agree = true;
    for (int64_t at = 0; at < 4 * TILE * TILE; ++at) {
        const int64_t i = at / 2 / TILE / TILE, j = at / TILE / TILE % 2, row = at / TILE % TILE, column = at % TILE;
        float want = 0;
        for (int64_t piece = 0; piece < X_HALVES; ++piece) {
            const float *left = first + (i * first_pieces + piece % first_pieces) * PIECE + row * STEP;
            const float *right = second + (j * second_pieces + piece % second_pieces) * PIECE + 2 * column;
            for (int64_t k = 0; k < STEP; ++k) want += left[k] * right[k / 2 * STEP + k % 2];
        }
        agree &= sums[i][j][row][column] == want;
    }
    return agree;
}

// Whether the instruction does what is said of it here, which was written without a processor that has it. Each sum is exact
// in float32, in any order: a multiple of 2^-15, the size of the subnormal weights, and at most 256.
static bool multiplies_halves() {
    constexpr uint16_t WEIGHTS[] = {0x3c00, 0xc000, 0x0000, 0x0200}, NUMBERS[] = {0x3c00, 0xbc00, 0x4000, 0x0000};
    uint16_t w[2 * PIECE], x[2 * X_HALVES * PIECE];
    float wide_w[2 * PIECE], wide_x[2 * X_HALVES * PIECE];
    uint32_t random = 1;
    for (uint16_t &each : w) random = random * 1664525 + 1013904223, each = WEIGHTS[random >> 30];
    for (uint16_t &each : x) random = random * 1664525 + 1013904223, each = NUMBERS[random >> 30];
    widen_row(w, wide_w, 2 * PIECE), widen_row(x, wide_x, 2 * X_HALVES * PIECE);
    const TilesInUse tiles;
    TileSums sums;
    multiply_halves<true>(w, PIECE, x, X_HALVES * PIECE, 1, {}, sums);
    if (!sums_agree(sums, wide_w, 1, wide_x, X_HALVES)) return false;
    multiply_halves<false>(x, X_HALVES * PIECE, w, PIECE, 1, {}, sums);
    return sums_agree(sums, wide_x, X_HALVES, wide_w, 1);
}

} // namespace UPCAST_NS
} // namespace upcast

#endif
