// Products of tiles of pieces, summed in float32: see simd/amx_linear.hpp.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/simd.hpp"
#include "simd/amx_pack.hpp"

#if UPCAST_AMX

namespace upcast {
namespace UPCAST_NS {

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

// The same by what the operands are, where WEIGHTS_FIRST says which of them the weights are.
#define UPCAST_LOAD_W(piece) \
    if constexpr (WEIGHTS_FIRST) { \
        UPCAST_LOAD_FIRST(piece); \
    } else { \
        UPCAST_LOAD_SECOND(piece); \
    }
#define UPCAST_LOAD_X(piece) \
    if constexpr (WEIGHTS_FIRST) { \
        UPCAST_LOAD_SECOND(piece); \
    } else { \
        UPCAST_LOAD_FIRST(piece); \
    }
// Tile `sum` plus the product of a piece of x with the piece of weights in tile 7.
#define UPCAST_TIMES_W(sum, piece) \
    if constexpr (WEIGHTS_FIRST) { \
        _tile_dpbf16ps(sum, 7, piece); \
    } else { \
        _tile_dpbf16ps(sum, piece, 7); \
    }

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
// products go first. WEIGHTS_FIRST: the first operand has the two pieces of weights, the second x's three. SECOND: the
// weights' second pieces are not all zero.
template <bool WEIGHTS_FIRST, bool SECOND>
static void multiply_square(const uint16_t *first, int64_t first_next, const uint16_t *second, int64_t second_next,
                            int64_t steps, const Ahead &ahead, TileSums &sums) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s) {
        ahead.fetch(s);
        if constexpr (SECOND) {
            UPCAST_LOAD_W(1);
            UPCAST_LOAD_X(1);
            UPCAST_MULTIPLY_FOUR();
            UPCAST_LOAD_X(0);
            UPCAST_MULTIPLY_FOUR();
        }
        UPCAST_LOAD_W(0);
        UPCAST_LOAD_X(2);
        UPCAST_MULTIPLY_FOUR();
        UPCAST_LOAD_X(1);
        UPCAST_MULTIPLY_FOUR();
        UPCAST_LOAD_X(0);
        UPCAST_MULTIPLY_FOUR();
        first += (WEIGHTS_FIRST ? W_PIECES : X_PIECES) * PIECE;
        second += (WEIGHTS_FIRST ? X_PIECES : W_PIECES) * PIECE;
    }
    store_sums(sums);
}

// As above for one tile of x. Two tiles of weights alone would wait for each other's sums: the products with
// the second piece of the weights have sums of their own, in sums[1].
template <bool WEIGHTS_FIRST, bool SECOND>
static void multiply_thin(const uint16_t *w, int64_t w_next, const uint16_t *x, int64_t steps, const Ahead &ahead,
                          TileSums &sums) {
    zero_sums();
    for (int64_t s = 0; s < steps; ++s, w += W_PIECES * PIECE, x += X_PIECES * PIECE) {
        ahead.fetch(s);
        _tile_loadd(4, x, 64);
        _tile_loadd(5, x + PIECE, 64);
        _tile_loadd(6, x + 2 * PIECE, 64);
        _tile_loadd(7, w, 64);
        UPCAST_TIMES_W(0, 6);
        UPCAST_TIMES_W(0, 5);
        UPCAST_TIMES_W(0, 4);
        _tile_loadd(7, w + w_next, 64);
        UPCAST_TIMES_W(1, 6);
        UPCAST_TIMES_W(1, 5);
        UPCAST_TIMES_W(1, 4);
        if constexpr (!SECOND) continue;
        _tile_loadd(7, w + PIECE, 64);
        UPCAST_TIMES_W(2, 5);
        UPCAST_TIMES_W(2, 4);
        _tile_loadd(7, w + w_next + PIECE, 64);
        UPCAST_TIMES_W(3, 5);
        UPCAST_TIMES_W(3, 4);
    }
    store_sums(sums);
}

#undef UPCAST_MULTIPLY_FOUR
#undef UPCAST_LOAD_FIRST
#undef UPCAST_LOAD_SECOND
#undef UPCAST_LOAD_W
#undef UPCAST_LOAD_X
#undef UPCAST_TIMES_W

// What a group of columns is multiplied by: numbers per step of k, and how.
template <bool SECOND> struct SplitProducts {
    static constexpr int64_t W_STEP = W_PIECES * PIECE, X_STEP = X_PIECES * PIECE;
    template <bool WEIGHTS_FIRST> static constexpr auto square = multiply_square<WEIGHTS_FIRST, SECOND>;
    template <bool WEIGHTS_FIRST> static constexpr auto thin = multiply_thin<WEIGHTS_FIRST, SECOND>;
};

} // namespace UPCAST_NS
} // namespace upcast

#endif
