// What a level offers: plain functions over raw pointers, no Python and no torch.
//
// Each operation is cut into numbered tasks that may run in any order and at the same time. Operations
// with two phases need every task of the first to be over before the second starts. Strides count
// elements. Sizes may be zero unless said otherwise; pointers to empty data may be null.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace upcast {

// y[m][n] = sum_k x[m][k] * w(n, k) + bias[n] + residual[m][n]
// w(n, k) is w[n * ldw + k], or w[k * ldw + n] when transposed. bias and residual may be null.
struct Linear {
    const float *x;
    int64_t ldx;
    const uint16_t *w;
    int64_t ldw;
    bool transposed;
    const float *bias;
    const float *residual;
    int64_t ldr;
    float *y;
    int64_t ldy;
    int64_t M, N, K;
};

enum class Strategy { dot, panel, axpy };

// How one Linear is carried out: tasks per phase and bytes of shared scratch (64-byte aligned).
struct LinearPlan {
    Strategy strategy;
    int tasks[2];
    int grid_n, grid_m;   // panel: how the second phase divides the output
    int64_t block;        // panel: length of a block of K
    size_t scratch;
};

// out[i] = table[indices[i]] widened; indices were checked by the caller.
struct Embedding {
    const uint16_t *table;
    int64_t ld;
    const int64_t *indices;
    float *out;
    int64_t count, width;
};

struct Level {
    const char *name;
    LinearPlan (*plan_linear)(const Linear &, int threads);
    void (*linear)(const Linear &, const LinearPlan &, void *scratch, int phase, int task);
    void (*embedding)(const Embedding &, int64_t begin, int64_t end);
};

// Defined by the levels that were built; which ones is told to dispatch.cpp by UPCAST_HAVE_*.
const Level &kernels_x86_64_v4();
const Level &kernels_x86_64_v3();
const Level &kernels_x86_64();
const Level &kernels_aarch64();

} // namespace upcast
