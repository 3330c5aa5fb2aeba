// A handful of queries against a span of the cache: scores are dot products, and values are added up position by position.
#pragma once

#include "simd/attention_scratch.hpp"
#include "simd/linear_dot.hpp"
#include "simd/rowwise.hpp"

namespace upcast {
namespace UPCAST_NS {

// Rows of keys per tile for each number of queries: few queries take many, so that horizontal sums are of full vectors.
constexpr int key_rows(int queries) {
    if (REGISTERS == 16) return queries == 1 ? 8 : dot_rows(queries);
    return queries == 1 ? 16 : queries <= 3 ? 8 : dot_rows(queries);
}

// Rows of a cache that are needed soon.
template <class Element> struct Soon {
    const Element *rows; // or null
    int64_t stride, width;
    void fetch(int64_t j) const {
        if (!rows) return;
        constexpr int64_t LINE = 64 / sizeof(Element);
        for (int64_t d = 0; d < width; d += LINE) prefetch_far(rows + j * stride + d);
    }
};

// scores[r * ld + j] = q_r . k_j for `count` positions j, while their values are fetched.
template <int ROWS, class Element>
static void attention_dots(const Linear &queries, const Element *keys, int64_t stride, int64_t count, float *scores, int64_t ld,
                           Soon<Element> values) {
    constexpr int R = key_rows(ROWS);
    typedef DotTile<R, ROWS, false> Full;
    float dots[Full::PADDED];
    int64_t j = 0;
    for (; j + R <= count; j += R) {
        for (int r = 0; r < R; ++r) values.fetch(j + r);
        Full::run(queries, keys + j * stride, stride, queries.x, 0, dots);
        for (int r = 0; r < ROWS; ++r) memcpy(scores + r * ld + j, dots + r * R, sizeof(float) * R);
    }
    for (; j < count; ++j) {
        DotTile<1, ROWS, false>::run(queries, keys + j * stride, stride, queries.x, 0, dots);
        for (int r = 0; r < ROWS; ++r) scores[r * ld + j] = dots[r];
    }
}

template <class Element>
using AttentionDots = void (*)(const Linear &, const Element *, int64_t, int64_t, float *, int64_t, Soon<Element>);
template <int ROWS, class Element> static AttentionDots<Element> attention_dots_for(int rows) {
    if constexpr (ROWS == 0) return nullptr;
    else if (rows == ROWS) return attention_dots<ROWS, Element>;
    else return attention_dots_for<ROWS - 1, Element>(rows);
}

template <class Element>
static void few_scores(const Attention &a, const Element *keys, int64_t count, int rows, const AttentionScratch &own,
                       Soon<Element> values) {
    Linear queries = {};
    queries.x = own.queries, queries.ldx = queries.K = a.width;
    attention_dots_for<DOT_COLS, Element>(rows)(queries, keys, a.key_stride, count, own.scores, own.ld, values);
}

// sums[r][d ..) = sum_j weights[r][j] * v_j[d ..), for VECTORS vectors of a value; the last has `count` elements.
template <int ROWS, int VECTORS, class Element>
static void attention_strip(const Attention &a, const Element *values, int64_t positions, int64_t d, int count,
                            const AttentionScratch &own, Soon<Element> keys) {
    vf sums[ROWS][VECTORS];
    UPCAST_UNROLL
    for (int r = 0; r < ROWS; ++r) {
        UPCAST_UNROLL
        for (int i = 0; i < VECTORS; ++i) sums[r][i] = vf{};
    }
    for (int64_t j = 0; j < positions; ++j) {
        keys.fetch(j);
        const Element *v = values + j * a.value_stride + d;
        vf wide[VECTORS];
        UPCAST_UNROLL
        for (int i = 0; i < VECTORS; ++i) {
            wide[i] = VECTORS > 1 || count == LANES ? load(v + i * LANES) : load_part(v, count);
        }
        UPCAST_UNROLL
        for (int r = 0; r < ROWS; ++r) {
            const vf weight = splat(own.scores[r * own.ld + j]);
            UPCAST_UNROLL
            for (int i = 0; i < VECTORS; ++i) sums[r][i] += weight * wide[i];
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < VECTORS; ++i) store_upto(own.sums + r * a.value_width + d + i * LANES, sums[r][i], count);
}

// Vectors of a value at a time: as many as the registers hold sums of.
constexpr int value_vectors(int rows) {
    if (UPCAST_LEVEL == 1) return 2; // widening takes registers, too
    return REGISTERS == 16 ? (rows <= 3 ? 4 : 2) : rows <= 6 ? 4 : 2;
}

template <int ROWS, class Element>
static void attention_values(const Attention &a, const Element *values, int64_t positions, const AttentionScratch &own,
                             Soon<Element> keys) {
    constexpr int MOST = value_vectors(ROWS);
    int64_t d = 0;
    for (; d + MOST * LANES <= a.value_width; d += MOST * LANES, keys.rows = nullptr) {
        attention_strip<ROWS, MOST, Element>(a, values, positions, d, LANES, own, keys);
    }
    for (; d + 2 * LANES <= a.value_width; d += 2 * LANES, keys.rows = nullptr) {
        attention_strip<ROWS, 2, Element>(a, values, positions, d, LANES, own, keys);
    }
    for (; d < a.value_width; d += LANES, keys.rows = nullptr) {
        const int count = static_cast<int>(least<int64_t>(LANES, a.value_width - d));
        attention_strip<ROWS, 1, Element>(a, values, positions, d, count, own, keys);
    }
}

template <class Element>
using AttentionValues = void (*)(const Attention &, const Element *, int64_t, const AttentionScratch &, Soon<Element>);
template <int ROWS, class Element> static AttentionValues<Element> attention_values_for(int rows) {
    if constexpr (ROWS == 0) return nullptr;
    else if (rows == ROWS) return attention_values<ROWS, Element>;
    else return attention_values_for<ROWS - 1, Element>(rows);
}

template <class Element>
static void few_values(const Attention &a, const Element *values, int64_t count, int rows, const AttentionScratch &own,
                       Soon<Element> keys) {
    attention_values_for<DOT_COLS, Element>(rows)(a, values, count, own, keys);
}

} // namespace UPCAST_NS
} // namespace upcast
