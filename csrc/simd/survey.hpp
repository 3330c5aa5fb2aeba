// How large numbers are, how many are not finite, and what is lost when they are rounded to float16.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/rowwise.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr float HALF_MAX = 65504.0f;
constexpr float HALF_TINY = 0x1p-25f; // and below, float16 has zero: a tie goes to the even neighbour

// Counts of each lane; a block is short enough for 32 bits.
struct Counts {
    vi nonfinite, out_of_range, nonzero, flushed;
};

UPCAST_INLINE int64_t total(vi counts) {
    int64_t result = 0;
    for (int i = 0; i < LANES; ++i) result += counts[i];
    return result;
}

// A comparison gives -1 where it holds.
UPCAST_INLINE void count_numbers(vf magnitude, vi finite, Counts &counts) {
    const vi nonzero = magnitude > 0.0f;
    counts.nonfinite -= ~finite;
    counts.out_of_range -= finite & (magnitude > HALF_MAX);
    counts.nonzero -= nonzero;
    counts.flushed -= nonzero & (magnitude <= HALF_TINY);
}

UPCAST_INLINE void put_half(uint16_t *to, vf v, int count) {
    if (count == LANES) store_half(to, v);
    else store_half_part(to, v, count);
}
UPCAST_INLINE vf load_upto(const uint16_t *p, int count) { return count == LANES ? load_half(p) : load_half_part(p, count); }

// Lanes beyond the end hold zero, which counts as nothing.
template <bool ROUNDS, class From>
static void survey_block(const From *from, uint16_t *to, int64_t n, vf &largest, vf &error, Counts &counts) {
    each_vector(n, [&](int64_t i, int count) {
        const vf v = load_upto(from + i, count), magnitude = vabs(v);
        const vi finite = magnitude < __builtin_inff();
        largest = vmax(largest, select(finite, magnitude, vf{}));
        count_numbers(magnitude, finite, counts);
        if constexpr (ROUNDS) {
            uint16_t scratch[LANES];
            uint16_t *half = to ? to + i : scratch;
            put_half(half, v, count);
            const vf off = vabs(load_upto(half, count) - v);
            error = vmax(error, select(magnitude <= HALF_MAX, off, vf{}));
        }
    });
}

template <bool ROUNDS, class From> static Surveyed survey_range(const From *from, uint16_t *to, int64_t n) {
    constexpr int64_t BLOCK = 1 << 16;
    Surveyed found = {};
    vf largest = {}, error = {};
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
        Counts counts = {};
        survey_block<ROUNDS>(from + begin, to ? to + begin : nullptr, least(BLOCK, n - begin), largest, error, counts);
        found.nonfinite += total(counts.nonfinite), found.out_of_range += total(counts.out_of_range);
        found.nonzero += total(counts.nonzero), found.flushed += total(counts.flushed);
    }
    found.largest = maximum(largest), found.max_error = maximum(error);
    return found;
}

static Surveyed survey(const Survey &a, int64_t begin, int64_t end) {
    if (!a.wide) return survey_range<false>(a.halves + begin, nullptr, end - begin);
    if (!a.rounds) return survey_range<false>(a.wide + begin, nullptr, end - begin);
    return survey_range<true>(a.wide + begin, a.out ? a.out + begin : nullptr, end - begin);
}

} // namespace UPCAST_NS
} // namespace upcast
