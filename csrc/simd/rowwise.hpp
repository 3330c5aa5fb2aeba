// Operations on each row by itself: normalisation, gated activation, rotary embedding, embedding, cache.
#pragma once

#include "simd/exponential.hpp"
#include "runtime/kernels.hpp"
#include "simd/packed.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

static void embedding(const Embedding &a, int64_t begin, int64_t end) {
    if (a.packed.records) {
        for (int64_t i = begin; i < end; ++i) widen_packed(a.packed, a.indices[i], 0, a.width, a.out + i * a.width);
        return;
    }
    for (int64_t i = begin; i < end; ++i) widen_row(a.table + a.indices[i] * a.ld, a.out + i * a.width, a.width);
}

// Calls body(i, count) over [0, n) in steps of a vector; only the last count may be short.
template <class Body> UPCAST_INLINE void each_vector(int64_t n, Body body) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) body(i, LANES);
    if (i < n) body(i, static_cast<int>(n - i));
}

UPCAST_INLINE vf load_upto(const float *p, int count) { return count == LANES ? load(p) : load_part(p, count); }
UPCAST_INLINE void store_upto(float *p, vf v, int count) {
    if (count == LANES) store(p, v);
    else store_part(p, v, count);
}

// Four partial sums hide the latency of an addition and keep long rows accurate.
constexpr int PARTIAL = 4;

UPCAST_INLINE float row_sum(const float *x, int64_t width) {
    vf sums[PARTIAL] = {};
    each_vector(width, [&](int64_t i, int count) { sums[i / LANES % PARTIAL] += load_upto(x + i, count); });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Sum of (x - centre)^2.
UPCAST_INLINE float row_squares(const float *x, int64_t width, float centre) {
    vf sums[PARTIAL] = {};
    each_vector(width, [&](int64_t i, int count) {
        vf distance = load_upto(x + i, count) - centre;
        if (count < LANES) distance = keep_part(distance, vf{}, count);
        sums[i / LANES % PARTIAL] += distance * distance;
    });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static void norm(const Norm &a, int64_t begin, int64_t end) {
    const float size = static_cast<float>(a.width);
    for (int64_t row = begin; row < end; ++row) {
        const float *x = a.x + row * a.ld;
        float *out = a.out + row * a.width;
        const float centre = a.centred ? row_sum(x, a.width) / size : 0.0f;
        const float scale = 1.0f / __builtin_sqrtf(row_squares(x, a.width, centre) / size + a.eps);
        each_vector(a.width, [&](int64_t i, int count) {
            vf v = (load_upto(x + i, count) - centre) * scale;
            if (a.weight) v *= load_upto(a.weight + i, count) + a.offset;
            if (a.bias) v += load_upto(a.bias + i, count);
            store_upto(out + i, v, count);
        });
    }
}

template <Activation KIND> UPCAST_INLINE vf activate(vf x) {
    if constexpr (KIND == Activation::silu) return x / (1.0f + vexp(-x));
    if constexpr (KIND == Activation::gelu) return x * normal_cdf(x);
    // (1 + tanh(u)) / 2 is the logistic function of 2u, which does not cancel for negative u.
    const vf doubled = x * (1.59576912f + 0.0713548163f * x * x);
    return x / (1.0f + vexp(-doubled));
}

template <Activation KIND> static void gated_rows(const Gated &a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float *gate = a.gate + row * a.ld_gate, *up = a.up + row * a.ld_up;
        float *out = a.out + row * a.width;
        each_vector(a.width, [&](int64_t i, int count) {
            store_upto(out + i, activate<KIND>(load_upto(gate + i, count)) * load_upto(up + i, count), count);
        });
    }
}

static void gated(const Gated &a, int64_t begin, int64_t end) {
    switch (a.activation) {
    case Activation::silu: return gated_rows<Activation::silu>(a, begin, end);
    case Activation::gelu: return gated_rows<Activation::gelu>(a, begin, end);
    case Activation::gelu_tanh: return gated_rows<Activation::gelu_tanh>(a, begin, end);
    }
}

// out = x * cos + turned(x) * sin, where turned() swaps the halves, or the members of each pair, negating
// the one that comes first.
static void rope_row(const Rope &a, const float *x, const float *cosine, const float *sine, float *out) {
    const int64_t half = a.turned / 2;
    if (a.interleaved) {
        for (int64_t i = 0; i < half; ++i) {
            const float even = x[2 * i], odd = x[2 * i + 1];
            out[2 * i] = even * cosine[2 * i] - odd * sine[2 * i];
            out[2 * i + 1] = odd * cosine[2 * i + 1] + even * sine[2 * i + 1];
        }
    } else {
        each_vector(half, [&](int64_t i, int count) {
            const vf low = load_upto(x + i, count), high = load_upto(x + half + i, count);
            const vf cos_low = load_upto(cosine + i, count), cos_high = load_upto(cosine + half + i, count);
            const vf sin_low = load_upto(sine + i, count), sin_high = load_upto(sine + half + i, count);
            store_upto(out + i, low * cos_low - high * sin_low, count);
            store_upto(out + half + i, high * cos_high + low * sin_high, count);
        });
    }
    if (a.turned < a.width) memcpy(out + a.turned, x + a.turned, sizeof(float) * static_cast<size_t>(a.width - a.turned));
}

static void rope(const Rope &a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const int64_t t = row % a.time, h = row / a.time % a.heads, b = row / a.time / a.heads;
        const int64_t angle = b * a.angle_batch + t * a.angle_time;
        const int64_t sine = b * a.sine_batch + t * a.sine_time;
        rope_row(a, a.x + b * a.batch_stride + h * a.head_stride + t * a.time_stride, a.cosine + angle,
                 a.sine + sine, a.out + row * a.width);
    }
}

// Whether of positions [begin, end), which are [batch, time], float16 cannot hold a finite value, or one is beyond a.limit.
static bool refuses(const Append &a, int64_t begin, int64_t end) {
    const float most = a.limit * a.limit * static_cast<float>(a.heads) * static_cast<float>(a.width);
    vi found = {};
    bool any = false;
    for (int64_t at = begin; at < end; ++at) {
        vf squares = {};
        for (int64_t head = 0; head < a.heads; ++head) {
            const float *from = a.from + at / a.time * a.from_batch + head * a.from_head + at % a.time * a.from_time;
            each_vector(a.width, [&](int64_t i, int count) {
                const vf v = load_upto(from + i, count), magnitude = vabs(v);
                // 65520 is halfway between 65504 and the next step, and rounds up.
                found |= (magnitude >= 65520.0f) & (magnitude < __builtin_inff());
                squares += v * v;
            });
        }
        const float total = sum(squares);
        any = any || (a.limit > 0 && total > most && total < __builtin_inff());
    }
    for (int i = 0; i < LANES; ++i) any = any || found[i] != 0;
    return any;
}

static void append(const Append &a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const float *from = a.from_row(row);
        if (a.wide) {
            if (a.width) memcpy(a.to_row<float>(row), from, sizeof(float) * static_cast<size_t>(a.width));
            continue;
        }
        uint16_t *to = a.to_row<uint16_t>(row);
        each_vector(a.width, [&](int64_t i, int count) {
            const vf v = load_upto(from + i, count);
            if (count == LANES) store_half(to + i, v);
            else store_half_part(to + i, v, count);
        });
    }
}

} // namespace UPCAST_NS
} // namespace upcast
