// Rows of a float16 table, widened to float32.
#pragma once

#include "kernels.hpp"
#include "simd.hpp"

namespace upcast {
namespace UPCAST_NS {

static void embedding(const Embedding &a, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        widen_row(a.table + a.indices[i] * a.ld, a.out + i * a.width, a.width);
    }
}

} // namespace UPCAST_NS
} // namespace upcast
