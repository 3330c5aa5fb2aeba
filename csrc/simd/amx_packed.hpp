// Packed weights as AMX tiles: what they unpack to are bfloat16 numbers, first pieces as they stand. See simd/amx_linear.hpp.
#pragma once

#include "simd/amx_pack.hpp"
#include "simd/packed.hpp"

#if UPCAST_AMX

namespace upcast {
namespace UPCAST_NS {

// A half is never below 2^-24, which leaves x all numbers from 2^-80 on. These may be smaller: both give half of the way.
constexpr int32_t TINY_X = (127 - 80) << 23, TINY_X_PACKED = (127 - 60) << 23, TINY_W_PACKED = (127 - 44) << 23;

// Floats between unpacked rows: a distance that is no multiple of 4 KiB.
static int64_t unpacked_row(int64_t depth) { return depth + LANES; }

// Row n of the block of K, zeros up to a whole tile; whether AMX multiplies its numbers as they are.
static bool unpack_for_tiles(const Linear &a, const TileBlock &block, int64_t n, float *out) {
    widen_packed(a.packed, n, block.k, block.depth, out);
    const int64_t whole = block.steps() * STEP;
    for (int64_t k = block.depth; k < whole; ++k) out[k] = 0;
    Range range, row;
    for (int64_t k = 0; k < whole; k += LANES) range.see(load(out + k));
    row.largest = splat_bits(largest_lane(range.largest));
    return row.exact(TINY_W_PACKED);
}

// First operand, from packed rows [n, n + TILE) of the weights, the last one repeated; `wide` has room for them unpacked.
static bool pack_packed(const Linear &a, const TileBlock &block, int64_t n, float *wide, uint16_t *out) {
    const int64_t ld = unpacked_row(block.steps() * STEP);
    bool exact = true;
    for (int64_t i = 0; i < TILE; ++i) exact &= unpack_for_tiles(a, block, least(n + i, a.N - 1), wide + i * ld);
    for (int64_t k = 0; k < block.depth; k += STEP, out += W_PIECES * PIECE) {
        for (int64_t i = 0; i < TILE; ++i) {
            const float *row = wide + i * ld + k;
            store_pieces<1>(out + i * STEP, load(row), load(row + TILE));
        }
    }
    return exact;
}

} // namespace UPCAST_NS
} // namespace upcast

#endif
