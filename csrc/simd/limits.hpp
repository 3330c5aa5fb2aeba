// What no kernel exceeds: multiply-adds of what is in registers, and plain reads of memory.
#pragma once

#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

// As many sums as hide the latency of a multiply-add and leave registers for its operands.
constexpr int BUSY_SUMS = 12;

// Returns how many floating-point operations it did.
static int64_t multiply_adds(int64_t rounds) {
    vf sums[BUSY_SUMS], factor = splat(0.999f), term = splat(0.001f);
    UPCAST_UNROLL
    for (int i = 0; i < BUSY_SUMS; ++i) sums[i] = splat(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round) {
        UPCAST_UNROLL
        for (int i = 0; i < BUSY_SUMS; ++i) {
            sums[i] = sums[i] * factor + term;
            UPCAST_KEEP(sums[i]);
        }
    }
    vf all = sums[0];
    UPCAST_UNROLL
    for (int i = 1; i < BUSY_SUMS; ++i) all += sums[i];
    volatile float used = all[0]; // or the compiler drops the loop
    static_cast<void>(used);
    return rounds * BUSY_SUMS * LANES * 2;
}

// The bits of `count` floats, joined, read as `streams` equal parts side by side; what does not divide is left out.
static int32_t read_memory(const float *data, int64_t count, int64_t streams) {
    constexpr int AT_ONCE = 4;
    const int64_t part = count / streams / (AT_ONCE * LANES) * (AT_ONCE * LANES);
    vi bits[AT_ONCE];
    UPCAST_UNROLL
    for (int i = 0; i < AT_ONCE; ++i) bits[i] = vi{};
    for (int64_t at = 0; at < part; at += AT_ONCE * LANES) {
        for (int64_t stream = 0; stream < streams; ++stream) {
            const float *from = data + stream * (count / streams) + at;
            UPCAST_UNROLL
            for (int i = 0; i < AT_ONCE; ++i) bits[i] |= (vi)load(from + i * LANES);
        }
    }
    return largest_lane(bits[0] | bits[1] | bits[2] | bits[3]);
}

} // namespace UPCAST_NS
} // namespace upcast
