// Packed rows of weights, unpacked for several rows of x: what their numbers are stored as meanwhile, and how they meet x.
// Where vectors are long, as the bfloat16 numbers that they are, in the pairs that unpacking leaves: half of the bytes to
// store, which took as long as the unpacking, and one shift or mask per vector instead of a load. Elsewhere as floats.
#pragma once

#include "simd/linear_dot.hpp"
#include "simd/packed.hpp"

namespace upcast {
namespace UPCAST_NS {

#if UPCAST_AVX512

constexpr int64_t PAIRED = 2 * LANES; // numbers of a vector of pairs
constexpr int64_t WIDE_BYTES = 2;     // per number

// Where number i of a row is.
UPCAST_INLINE int64_t place_of(int64_t i) { return i / PAIRED * PAIRED + i % LANES * 2 + i % PAIRED / LANES; }

UPCAST_INLINE void unpack_wide(const uint8_t *record, const HighBytesOf &high, float *to) {
    vu pairs[RECORD_VECTORS / 2];
    unpack_pairs(record, high, pairs);
    UPCAST_UNROLL
    for (int v = 0; v < RECORD_VECTORS / 2; ++v) store(to + v * LANES, (vf)pairs[v]);
}

// Puts the escapes of [k, k + count) into out, which holds these columns.
static void patch_wide(Escapes &escapes, int64_t k, int64_t count, float *out) {
    for (; escapes.next < k + count; ++escapes.at, escapes.look()) {
        if (escapes.next < k) continue; // only in a list that is out of order
        memcpy(reinterpret_cast<uint16_t *>(out) + place_of(escapes.next - k), escapes.values + 2 * escapes.at, 2);
    }
}

UPCAST_INLINE vf half_of(vu pairs, int half) { return half ? upper_half(pairs) : lower_half(pairs); }

// sums[c * R + r] += lane by lane, a vector of pairs of R rows of weights against COLS rows of x.
template <int R, int COLS>
UPCAST_INLINE void add_pairs(const float *w, int64_t ldw, const float *x, int64_t ldx, vf *sums) {
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
            vf xs = load(x + c * ldx + half * LANES);
            UPCAST_KEEP(xs);
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) sums[c * R + r] += wide[r] * xs;
        }
    }
}

// The same of `count` numbers.
template <int R, int COLS>
UPCAST_INLINE void add_wide(const float *w, int64_t ldw, const float *x, int64_t ldx, int64_t count, vf *sums) {
    int64_t k = 0;
    for (; k + PAIRED <= count; k += PAIRED, w += LANES) add_pairs<R, COLS>(w, ldw, x + k, ldx, sums);
    for (int half = 0; half < 2 && k < count; ++half, k += LANES) {
        const int rest = static_cast<int>(least<int64_t>(LANES, count - k));
        UPCAST_UNROLL
        for (int c = 0; c < COLS; ++c) {
            const vf xs = load_part(x + c * ldx + k, rest);
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) {
                const vf wide = half_of((vu)load(w + r * ldw), half);
                sums[c * R + r] += keep_part(wide, vf{}, rest) * xs;
            }
        }
    }
}

// Numbers [k, k + count) of a row, whole records of them; k begins one.
static void unpack_row(const PackedRows &a, int64_t row, int64_t k, int64_t count, float *out) {
    const uint8_t *record = record_of(a, row, k);
    const HighBytesOf high(a.table);
    for (int64_t i = 0; i < count; i += RECORD, record += RECORD_BYTES) unpack_wide(record, high, out + i / 2);
    if (!a.pointers) return;
    Escapes escapes = Escapes::of(a, row);
    if (k) escapes.skip(k);
    patch_wide(escapes, k, count, out);
}

// dots[c * R + r] = x[c] . w[r], rows of weights `ldw` floats apart; in the order of DotTile, whose chain is longer than K.
template <int R, int COLS>
static void wide_tile(const float *w, int64_t ldw, const float *x, int64_t ldx, int64_t K, float *dots) {
    constexpr int PADDED = DotTile<R, COLS, false>::PADDED;
    vf sums[PADDED];
    UPCAST_UNROLL
    for (int i = 0; i < PADDED; ++i) sums[i] = vf{};
    add_wide<R, COLS>(w, ldw, x, ldx, K, sums);
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

UPCAST_INLINE void unpack_wide(const uint8_t *record, const HighBytesOf &high, float *to) {
    vf numbers[RECORD_VECTORS];
    unpack_record(record, high, numbers);
    UPCAST_UNROLL
    for (int v = 0; v < RECORD_VECTORS; ++v) store(to + v * LANES, numbers[v]);
}

UPCAST_INLINE void patch_wide(Escapes &escapes, int64_t k, int64_t count, float *out) { escapes.patch(k, count, out); }

static void unpack_row(const PackedRows &a, int64_t row, int64_t k, int64_t count, float *out) {
    widen_packed(a, row, k, count, out);
}

template <int R, int COLS>
UPCAST_INLINE void add_wide(const float *w, int64_t ldw, const float *x, int64_t ldx, int64_t count, vf *sums) {
    typedef DotTile<R, COLS, false> Tile;
    if (count == RECORD) {
        UPCAST_UNROLL
        for (int i = 0; i < RECORD_VECTORS; ++i) Tile::step(w + i * LANES, ldw, x + i * LANES, ldx, sums);
        return;
    }
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) Tile::step(w + k, ldw, x + k, ldx, sums);
    if (k == count) return;
    const int rest = static_cast<int>(count - k);
    UPCAST_UNROLL
    for (int c = 0; c < COLS; ++c) {
        const vf xs = load_part(x + c * ldx + k, rest);
        UPCAST_UNROLL
        for (int r = 0; r < R; ++r) sums[c * R + r] += load_part(w + r * ldw + k, rest) * xs;
    }
}

static void wide_block(const Linear &a, const float *w, int64_t ldw, int64_t begin, int64_t end, int64_t m, int64_t next) {
    dot_block<false>(a, Rows<float>{w, ldw}, begin, end, m, next, Reading::one_stream);
}

#endif

} // namespace UPCAST_NS
} // namespace upcast
