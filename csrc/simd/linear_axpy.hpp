// One row of x against weights stored [K, N]: y += x[k] * w[k], reading the weights strictly in order.
//
// Every task takes a contiguous range of K into its own sums; a second phase adds them up. Sums are
// folded every FOLD rows, which keeps the rounding error that of a blocked sum.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t AXPY_FOLD = 64;
constexpr int AXPY_ROWS = 4;

static LinearPlan plan_axpy(const Linear &a, int threads) {
    LinearPlan plan = {};
    plan.strategy = Strategy::axpy;
    plan.tasks[0] = static_cast<int>(most<int64_t>(1, least<int64_t>(threads, a.K / AXPY_FOLD)));
    plan.tasks[1] = a.N < 4096 ? 1 : threads;
    plan.scratch = 2 * sizeof(float) * static_cast<size_t>(plan.tasks[0] * a.N);
    return plan;
}

// sums += x[0..ROWS) * w[0..ROWS), row by row of w.
template <int ROWS> static void axpy_rows(const Linear &a, int64_t k, float *sums) {
    const uint16_t *w = a.w + k * a.ldw;
    const int64_t ahead = k + 2 * ROWS <= a.K ? ROWS * a.ldw : 0;
    vf x[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = splat(a.x[k + r]);
    int64_t n = 0;
    for (; n + LANES <= a.N; n += LANES) {
        vf total = load(sums + n);
        for (int r = 0; r < ROWS; ++r) {
            prefetch(w + r * a.ldw + n + ahead);
            total += x[r] * load_half(w + r * a.ldw + n);
        }
        store(sums + n, total);
    }
    if (n == a.N) return;
    const int count = static_cast<int>(a.N - n);
    vf total = load_part(sums + n, count);
    for (int r = 0; r < ROWS; ++r) total += x[r] * load_part(w + r * a.ldw + n, count);
    store_part(sums + n, total, count);
}

static void axpy_task(const Linear &a, const LinearPlan &plan, float *scratch, int task) {
    const int64_t begin = a.K * task / plan.tasks[0], end = a.K * (task + 1) / plan.tasks[0];
    float *total = scratch + 2 * a.N * task, *sums = total + a.N;
    memset(total, 0, sizeof(float) * static_cast<size_t>(a.N));
    for (int64_t k0 = begin; k0 < end; k0 += AXPY_FOLD) {
        const int64_t k1 = least(end, k0 + AXPY_FOLD);
        memset(sums, 0, sizeof(float) * static_cast<size_t>(a.N));
        int64_t k = k0;
        for (; k + AXPY_ROWS <= k1; k += AXPY_ROWS) axpy_rows<AXPY_ROWS>(a, k, sums);
        for (; k < k1; ++k) axpy_rows<1>(a, k, sums);
        for (int64_t n = 0; n < a.N; ++n) total[n] += sums[n];
    }
}

static void axpy_gather(const Linear &a, const LinearPlan &plan, const float *scratch, int task) {
    const int64_t begin = a.N * task / plan.tasks[1], end = a.N * (task + 1) / plan.tasks[1];
    for (int64_t n = begin; n < end; ++n) {
        float value = scratch[n];
        for (int64_t t = 1; t < plan.tasks[0]; ++t) value += scratch[2 * a.N * t + n];
        if (a.bias) value += a.bias[n];
        a.y[n] = a.residual ? value + a.residual[n] : value;
    }
}

} // namespace UPCAST_NS
} // namespace upcast
