// A stretch of packed rows of weights, unpacked for many rows of x: what its numbers are stored as meanwhile, and how they
// meet x. Where vectors are long, as the bfloat16 numbers that they are, in the pairs that unpacking leaves: half of the
// bytes to write to the second-level cache, which took as long as the unpacking, and one shift or mask per vector instead
// of a load. Elsewhere as floats.
#pragma once

#include "simd/linear_dot.hpp"
#include "simd/packed.hpp"

namespace upcast {
namespace UPCAST_NS {

#if UPCAST_AVX512

constexpr int64_t PAIRED = 2 * LANES; // numbers of a vector of pairs
constexpr int64_t WIDE_BYTES = 2;     // per number

// Numbers [k, k + count) of a row, whole records of them; k begins one.
static void unpack_row(const PackedRows &a, int64_t row, int64_t k, int64_t count, float *out) {
    const uint8_t *record = record_of(a, row, k);
    const HighBytesOf high(a.table);
    float *to = out;
    for (int64_t i = 0; i < count; i += RECORD, record += RECORD_BYTES, to += RECORD / 2) {
        vu pairs[RECORD_VECTORS / 2];
        unpack_pairs(record, high, pairs);
        UPCAST_UNROLL
        for (int v = 0; v < RECORD_VECTORS / 2; ++v) store(to + v * LANES, (vf)pairs[v]);
    }
    if (!a.pointers) return;
    Escapes escapes = Escapes::of(a, row);
    if (k) escapes.skip(k);
    for (; escapes.next < k + count; ++escapes.at, escapes.look()) {
        const int64_t i = escapes.next - k;
        if (i < 0) continue; // only in a list that is out of order
        uint16_t *half = reinterpret_cast<uint16_t *>(out) + i / PAIRED * PAIRED + i % LANES * 2 + i % PAIRED / LANES;
        memcpy(half, escapes.values + 2 * escapes.at, sizeof *half);
    }
}

UPCAST_INLINE vf half_of(vu pairs, int half) { return half ? upper_half(pairs) : lower_half(pairs); }

// dots[c * R + r] = x[c] . w[r], rows of weights `ldw` floats apart; in the order of DotTile, whose chain is longer than K.
template <int R, int COLS>
static void wide_tile(const float *w, int64_t ldw, const float *x, int64_t ldx, int64_t K, float *dots) {
    constexpr int PADDED = DotTile<R, COLS, false>::PADDED;
    vf sums[PADDED];
    UPCAST_UNROLL
    for (int i = 0; i < PADDED; ++i) sums[i] = vf{};
    int64_t k = 0;
    for (; k + PAIRED <= K; k += PAIRED, w += LANES) {
        vu pairs[R];
        UPCAST_UNROLL
        for (int r = 0; r < R; ++r) pairs[r] = (vu)load(w + r * ldw);
        UPCAST_UNROLL
        for (int half = 0; half < 2; ++half) {
            vf wide[R];
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) wide[r] = half_of(pairs[r], half);
            UPCAST_UNROLL
            for (int c = 0; c < COLS; ++c) {
                vf xs = load(x + c * ldx + k + half * LANES);
                UPCAST_KEEP(xs);
                UPCAST_UNROLL
                for (int r = 0; r < R; ++r) sums[c * R + r] += wide[r] * xs;
            }
        }
    }
    for (int half = 0; half < 2 && k < K; ++half, k += LANES) {
        const int count = static_cast<int>(least<int64_t>(LANES, K - k));
        UPCAST_UNROLL
        for (int c = 0; c < COLS; ++c) {
            const vf xs = load_part(x + c * ldx + k, count);
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) {
                const vf wide = half_of((vu)load(w + r * ldw), half);
                sums[c * R + r] += keep_part(wide, vf{}, count) * xs;
            }
        }
    }
    if (R * COLS == 1) {
        dots[0] = sum(sums[0]);
        return;
    }
    UPCAST_UNROLL
    for (int i = 0; i < PADDED; i += LANES) store(dots + i, sum_each(sums + i));
}

// Weights [begin, end), unpacked from `w` on, against COLS rows of x from m on.
template <int R, int COLS>
static void wide_rows(const Linear &a, const float *w, int64_t ldw, int64_t begin, int64_t end, int64_t m) {
    float dots[DotTile<R, COLS, false>::PADDED];
    DotSums sums;
    const float *x = a.x + m * a.ldx;
    int64_t n = begin;
    for (; n + R <= end; n += R, w += R * ldw) {
        wide_tile<R, COLS>(w, ldw, x, a.ldx, a.K, dots);
        for (int c = 0; c < COLS; ++c)
            for (int r = 0; r < R; ++r) sums[c][n - begin + r] = dots[c * R + r];
    }
    for (; n < end; ++n, w += ldw) {
        wide_tile<1, COLS>(w, ldw, x, a.ldx, a.K, dots);
        for (int c = 0; c < COLS; ++c) sums[c][n - begin] = dots[c];
    }
    finish_dots(a, begin, end - begin, m, COLS, sums[0], STRETCH + 3);
}

template <int COLS = DOT_COLS>
static void wide_block(const Linear &a, const float *w, int64_t ldw, int64_t begin, int64_t end, int64_t m, int64_t next) {
    if constexpr (COLS > 0) {
        if (next - m == COLS) wide_rows<dot_rows(COLS), COLS>(a, w, ldw, begin, end, m);
        else wide_block<COLS - 1>(a, w, ldw, begin, end, m, next);
    }
}

#else

constexpr int64_t WIDE_BYTES = 4;

static void unpack_row(const PackedRows &a, int64_t row, int64_t k, int64_t count, float *out) {
    widen_packed(a, row, k, count, out);
}

static void wide_block(const Linear &a, const float *w, int64_t ldw, int64_t begin, int64_t end, int64_t m, int64_t next) {
    dot_block<false>(a, Rows<float>{w, ldw}, begin, end, m, next, Reading::one_stream);
}

#endif

} // namespace UPCAST_NS
} // namespace upcast
