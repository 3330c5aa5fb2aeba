// Many queries against a span of the cache: its keys, then its values, are widened into panels once, and all queries
// pass over them in the tiles of linear_panel.hpp. No score is a horizontal sum.
#pragma once

#include "simd/attention_scratch.hpp"
#include "simd/linear_panel.hpp"
#include "simd/rowwise.hpp"

namespace upcast {
namespace UPCAST_NS {

// Queries of a unit, at most and at least, and positions of a span: panels and scores share the second-level cache.
constexpr int64_t MANY_ROWS = 96, FEWEST_OF_MANY = 24, SPAN_OF_MANY = 256;

UPCAST_INLINE int64_t whole_panels(int64_t columns) { return (columns + PANEL - 1) / PANEL * PANEL; }

static int64_t many_wide(const Attention &a) {
    return most(whole_panels(SPAN_OF_MANY) * a.width, whole_panels(a.value_width) * SPAN_OF_MANY);
}

// panels[p][k][j] = rows[p * PANEL + j][k]: squares of LANES by LANES are turned in registers.
template <class Element>
static void turn_rows(const Element *rows, int64_t stride, int64_t count, int64_t width, float *panels) {
    for (int64_t strip = 0; strip < count; strip += LANES) {
        float *to = panels + strip / PANEL * PANEL * width + strip % PANEL;
        for (int64_t k = 0; k < width; k += LANES) {
            const int part = static_cast<int>(least<int64_t>(LANES, width - k));
            vf square[LANES];
            for (int i = 0; i < LANES; ++i) {
                const Element *row = rows + (strip + i) * stride + k;
                square[i] = strip + i >= count ? vf{} : part == LANES ? load(row) : load_part(row, part);
            }
            transpose(square);
            for (int i = 0; i < part; ++i) store(to + (k + i) * PANEL, square[i]);
        }
    }
}

// panels[p][j][i] = rows[j][p * PANEL + i], zero beyond the width.
template <class Element>
static void widen_rows(const Element *rows, int64_t stride, int64_t count, int64_t width, float *panels) {
    for (int64_t j = 0; j < count; ++j) {
        for (int64_t d = 0; d < whole_panels(width); d += LANES) {
            const Element *row = rows + j * stride + d;
            const int64_t left = width - d;
            const vf v = left >= LANES ? load(row) : left > 0 ? load_part(row, static_cast<int>(left)) : vf{};
            store(panels + d / PANEL * PANEL * count + j * PANEL + d % PANEL, v);
        }
    }
}

// y[r][n] = sum_k x[r][k] * panel(k, n) for `rows` rows, N columns and panels of K rows.
static void many_products(const Linear &product, const float *panels, int rows) {
    PanelTile t = {};
    t.ldx = product.ldx, t.depth = t.depth_stored = product.K;
    t.first = t.last = true;
    t.ahead = reinterpret_cast<const uint16_t *>(panels); // nothing is fetched: a stride of zero
    for (; t.n < product.N; t.n += PANEL) {
        t.columns = static_cast<int>(least<int64_t>(PANEL, product.N - t.n));
        t.panel = panels + t.n * product.K;
        panel_rows(product, t, product.x, 0, rows);
    }
}

template <class Element>
static void many_scores(const Attention &a, const Element *keys, int64_t count, int rows, const AttentionScratch &own) {
    turn_rows(keys, a.key_stride, count, a.width, own.wide);
    Linear product = {};
    product.x = own.queries, product.ldx = product.K = a.width;
    product.y = own.scores, product.ldy = own.ld, product.N = count;
    many_products(product, own.wide, rows);
}

template <class Element>
static void many_values(const Attention &a, const Element *values, int64_t count, int rows, const AttentionScratch &own) {
    widen_rows(values, a.value_stride, count, a.value_width, own.wide);
    Linear product = {};
    product.x = own.scores, product.ldx = own.ld, product.K = count;
    product.y = own.sums, product.ldy = product.N = a.value_width;
    many_products(product, own.wide, rows);
}

} // namespace UPCAST_NS
} // namespace upcast
