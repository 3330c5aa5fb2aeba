// exp and its relatives on vectors, to within two units in the last place; NaN and infinities as in libm.
#pragma once

#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

// x = n ln 2 + r with |r| <= ln 2 / 2; tail = exp(r) - 1. ln 2 is split so that n * high is exact.
struct Reduced {
    vi n;
    vf tail;
};

UPCAST_INLINE Reduced reduce(vf x) {
    const vf shift = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (x * 1.44269504f + shift) - shift;
    const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vf p = r * 1.3950600e-3f + 8.3689541e-3f;
    p = p * r + 4.1666206e-2f;
    p = p * r + 1.6666518e-1f;
    p = p * r + 0.5f;
    return {__builtin_convertvector(n, vi), p * r * r + r};
}

UPCAST_INLINE vf power_of_two(vi n) { return (vf)((n + 127) << 23); }

// The comparisons are written so that NaN passes through both bounds.
UPCAST_INLINE vf bounded(vf x, float low, float high) {
    x = vmax(splat(low), x);
    return vmin(splat(high), x);
}

UPCAST_INLINE vf vexp(vf x) {
    // Beyond these bounds the result is zero or infinite anyway; two factors reach both subnormals and
    // infinity without leaving the range of exponents.
    const Reduced e = reduce(bounded(x, -105.0f, 89.5f));
    const vi half = e.n >> 1;
    return (e.tail + 1.0f) * power_of_two(half) * power_of_two(e.n - half);
}

// tanh(x) = (exp(2x) - 1) / (exp(2x) + 1), from exp(2|x|) - 1 so that small arguments keep their digits.
UPCAST_INLINE vf vtanh(vf x) {
    const Reduced e = reduce(2.0f * bounded(vabs(x), 0.0f, 20.0f));
    const vf scale = power_of_two(e.n);
    const vf less_one = e.tail * scale + (scale - 1.0f);
    const vf magnitude = less_one / (less_one + 2.0f);
    return (vf)((vu)magnitude | ((vu)x & 0x80000000u));
}

// The normal distribution function, as erfc(-x / sqrt 2) / 2. erfc(z) = exp(-z^2) t P(t) with
// t = 1 / (1 + 0.525 z): P is a minimax fit made for this file, relative error 1e-7 up to z = 10.
UPCAST_INLINE vf normal_cdf(vf x) {
    const vf size = bounded(vabs(x), 0.0f, 20.0f);
    const vf t = 1.0f / (1.0f + 0.371231060f * size); // 0.525 / sqrt 2
    const float coefficients[] = {-0.24619156f, 0.65514320f, -0.83322555f, 0.44098863f, -0.11432204f,
                                  0.21924070f,  0.24834585f, 0.29681131f,  0.29617673f};
    vf p = splat(0.037032723f);
    for (float c : coefficients) p = p * t + c;
    const vf square = size * size;
    const vf rest = size * size - square; // the rounding error of the square where multiply-adds are fused
    const vf upper = 0.5f * vexp(-0.5f * square) * (1.0f - 0.5f * rest) * t * p;
    return select(x < 0.0f, upper, 1.0f - upper);
}

} // namespace UPCAST_NS
} // namespace upcast
