// AMX tiles in plain C++, where the processor has none: the drivers of levels 5 and 6 then run on AVX-512.
//
// Sums are float32, added pair by pair as the instructions add them. The one of bfloat16 reads subnormal pieces as zero, the
// one of halves as they are, and so does this.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "runtime/kernels.hpp" // before the names below are taken

namespace emulated {

struct Tile {
    unsigned char bytes[16][64];
};
static Tile tiles[8];
static long products, half_products; // of two tiles: bfloat16, float16
static bool flushes_halves;          // a processor that is not as we believe

static float piece(const unsigned char *bytes) {
    uint16_t bits;
    memcpy(&bits, bytes, sizeof bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return fpclassify(value) == FP_SUBNORMAL ? 0.0f : value;
}

static float half_piece(const unsigned char *bytes) {
    uint16_t bits;
    memcpy(&bits, bytes, sizeof bits);
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (flushes_halves && exponent == 0) return 0;
    const float size = exponent == 0 ? ldexpf(static_cast<float>(fraction), -24)
                                     : ldexpf(static_cast<float>(1024 + fraction), exponent - 25);
    const float value = exponent < 31 ? size : fraction ? NAN : INFINITY;
    return bits >> 15 ? -value : value;
}

static void load(int tile, const void *from, long stride) {
    for (int row = 0; row < 16; ++row) memcpy(tiles[tile].bytes[row], static_cast<const char *>(from) + row * stride, 64);
}
static void store(int tile, void *to, long stride) {
    for (int row = 0; row < 16; ++row) memcpy(static_cast<char *>(to) + row * stride, tiles[tile].bytes[row], 64);
}
static void zero(int tile) { memset(&tiles[tile], 0, sizeof(Tile)); }

// Pairs [row][column][first or second] of a tile as floats.
typedef float Piece(const unsigned char *bytes);
static void widen(int tile, Piece *piece, float pieces[16][16][2]) {
    for (int row = 0; row < 16; ++row)
        for (int i = 0; i < 32; ++i) pieces[row][i / 2][i % 2] = piece(&tiles[tile].bytes[row][2 * i]);
}

static void multiply(int sum, int left, int right, Piece *piece) {
    ++(piece == half_piece ? half_products : products);
    float first[16][16][2], second[16][16][2];
    widen(left, piece, first), widen(right, piece, second);
    for (int m = 0; m < 16; ++m) {
        float sums[16];
        memcpy(sums, tiles[sum].bytes[m], 64);
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 16; ++n)
                for (int i = 0; i < 2; ++i) sums[n] += first[m][k][i] * second[k][n][i];
        memcpy(tiles[sum].bytes[m], sums, 64);
    }
}

} // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadd(tile, from, stride) emulated::load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store(tile, to, stride)
#define _tile_zero(tile) emulated::zero(tile)
#define _tile_dpbf16ps(sum, left, right) emulated::multiply(sum, left, right, emulated::piece)
#define UPCAST_TDPFP16PS(sum, left, right) emulated::multiply(sum, left, right, emulated::half_piece)
#define _tile_loadconfig(config) static_cast<void>(config)
#define _tile_release() static_cast<void>(0)
