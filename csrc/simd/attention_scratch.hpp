// What one unit of attention works in: its queries, one span of scores, and the sums of that span's values.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

struct AttentionScratch {
    float *queries; // [rows][width of a key]
    float *scores;  // [rows][ld]
    int64_t ld;
    float *sums;    // [rows][width of a value]
    float *wide;    // many queries: the span's keys or values, widened
};

} // namespace UPCAST_NS
} // namespace upcast
