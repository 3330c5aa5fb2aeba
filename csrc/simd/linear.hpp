// Which strategy carries out a linear, and the two entry points of a level for it.
#pragma once

#include "simd/linear_axpy.hpp"
#include "simd/linear_dot.hpp"
#include "simd/linear_far.hpp"
#include "simd/linear_packed_many.hpp"
#include "simd/linear_panel.hpp"
#include "simd/amx_linear.hpp"

namespace upcast {
namespace UPCAST_NS {

// Fewest multiply-adds worth waking another thread for: waking costs about a microsecond.
constexpr int64_t WORK_PER_THREAD = 32 * 1024;

static LinearPlan plan_linear(const Linear &a, int threads) {
    const int64_t work = a.M * a.N * a.K;
    threads = static_cast<int>(most<int64_t>(1, least<int64_t>(threads, work / WORK_PER_THREAD)));
#if UPCAST_AMX
    const bool many = a.M >= (a.transposed ? LEAST_BACKWARD : LEAST_FORWARD) && a.N >= TILE && a.K >= STEP;
    if (many && !(a.packed.records && a.transposed)) return plan_tiles(a, threads);
#endif
    // Without products there is only bias and residual, which the tiles add without touching a weight.
    if (a.packed.records) return a.transposed && a.K > 0 ? plan_panel(a, threads) : plan_packed(a, threads);
    if (a.transposed && a.K > 0) return a.M == 1 ? plan_axpy(a, threads) : plan_panel(a, threads);
    return plan_dot(a, threads);
}

static void linear(const Linear &a, const LinearPlan &plan, void *scratch, int phase, int task) {
    float *floats = static_cast<float *>(scratch);
    switch (plan.strategy) {
    case Strategy::dot:
        return reads_far_rows(a, plan) ? far_task(a, plan, task) : dot_task(a, plan, floats, task);
    case Strategy::axpy:
        return phase == 0 ? axpy_task(a, plan, floats, task) : axpy_gather(a, plan, floats, task);
    case Strategy::packed:
        return packed_task(a, plan, floats, task);
    case Strategy::panel:
        return panel_task(a, plan, floats, task);
    case Strategy::tiles:
#if UPCAST_AMX
        return tile_task(a, plan, scratch, task);
#else
        return;
#endif
    }
}

} // namespace UPCAST_NS
} // namespace upcast
