// Rows of a float16 table, widened to float32.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace upcast {
namespace UPCAST_NS {

static void widen_row(const uint16_t *from, float *to, int64_t width) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load_half(from + i));
    if (i == width) return;
    const int count = static_cast<int>(width - i);
    store_part(to + i, load_half_part(from + i, count), count);
}

static void embedding(const Embedding &a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        widen_row(a.table + a.indices[i] * a.ld, a.out + i * a.width, a.width);
    }
}

} // namespace UPCAST_NS
} // namespace upcast
