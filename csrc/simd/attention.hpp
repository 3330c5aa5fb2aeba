// Attention of new queries over a cache: scores, softmax and sums in float32, whatever the cache holds.
//
// A unit is a handful of queries that share one head of the cache, over one part of its positions. Their
// scores over SPAN positions are kept whole, so each span has an ordinary softmax; spans are joined by
// rescaling to the larger maximum. A second phase joins the parts of one query.
#pragma once

#include "simd/exponential.hpp"
#include "runtime/kernels.hpp"
#include "simd/linear_dot.hpp"
#include "simd/rowwise.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t SPAN = 480; // positions; a multiple of STRETCH

// What one unit works in: all queries of the unit, one span of scores, and the running softmax.
struct AttentionScratch {
    float *queries; // [DOT_COLS][width of a key]
    float *scores;  // [DOT_COLS][SPAN]
    float *sums;    // [DOT_COLS][width of a value], of the present span
};

static int64_t attention_units(const Attention &a) { return (a.group * a.time + DOT_COLS - 1) / DOT_COLS; }

// Per query of a unit's part: the weighted sum, the maximum and the total weight.
static int64_t attention_partial(const Attention &a) { return a.value_width + 2; }

static AttentionPlan plan_attention(const Attention &a, int threads) {
    AttentionPlan plan = {};
    const int64_t units = a.batch * a.kv_heads * attention_units(a);
    const int64_t positions = a.start + a.time;
    // Enough units to share evenly; parts shorter than a cache line of scores are not worth joining.
    const int64_t wanted = threads > 1 ? (4 * threads + units - 1) / units : 1;
    plan.parts = most<int64_t>(1, least<int64_t>(wanted, positions / 64));
    plan.units = static_cast<int>(units * plan.parts);
    plan.work = units * DOT_COLS * positions * (a.width + a.value_width);
    plan.own = DOT_COLS * (a.width + SPAN + a.value_width);
    plan.partials = a.batch * a.kv_heads * a.group * a.time * plan.parts * attention_partial(a);
    return plan;
}

// Positions that query `time` of a row of the batch sees.
struct Seen {
    int64_t begin, end;
};

UPCAST_INLINE Seen seen_by(const Attention &a, int64_t row, int64_t time) {
    const int64_t at = a.start + time;
    Seen seen = {0, a.causal ? at + 1 : a.start + a.time};
    if (a.window > 0) seen.begin = most<int64_t>(0, at + 1 - a.window);
    if (a.first) seen.begin = most<int64_t>(seen.begin, a.first[row]);
    return seen;
}

// scores[r][j - begin] = scaled, capped q_r . k_j for j in [begin, end).
template <class Element>
static void attention_scores(const Attention &a, const Element *keys, int64_t begin, int64_t end, int rows,
                             const AttentionScratch &own) {
    Linear product = {};
    product.x = own.queries;
    product.ldx = product.K = a.width;
    DotSums sums;
    for (int64_t n = begin; n < end; n += STRETCH) {
        const int64_t next = least(end, n + STRETCH);
        const Rows<Element> block = {keys + n * a.key_stride, a.key_stride};
        dot_tiles_for<DOT_COLS, false, Element>(rows)(product, block, n, next, 0, sums);
        for (int r = 0; r < rows; ++r) {
            float *scores = own.scores + r * SPAN + (n - begin);
            each_vector(next - n, [&](int64_t i, int count) {
                vf s = load_upto(sums[r] + i, count) * a.scale;
                if (a.softcap > 0) s = a.softcap * vtanh(s / a.softcap);
                store_upto(scores + i, s, count);
            });
        }
    }
}

// Turns the scores of [begin, end) into weights exp(s - maximum), zero where unseen.
UPCAST_INLINE float weigh(float *scores, int64_t begin, int64_t end, Seen seen, float &maximum_seen) {
    const int64_t low = most(begin, seen.begin) - begin, high = least(end, seen.end) - begin;
    for (int64_t i = 0; i < least(low, end - begin); ++i) scores[i] = 0.0f;
    for (int64_t i = most<int64_t>(high, 0); i < end - begin; ++i) scores[i] = 0.0f;
    maximum_seen = -__builtin_inff();
    if (low >= high) return 0.0f;
    vf top = splat(maximum_seen), total = {};
    each_vector(high - low, [&](int64_t i, int count) {
        const vf s = load_upto(scores + low + i, count);
        top = vmax(top, count == LANES ? s : keep_part(s, splat(-__builtin_inff()), count));
    });
    maximum_seen = maximum(top);
    each_vector(high - low, [&](int64_t i, int count) {
        const vf weight = vexp(load_upto(scores + low + i, count) - maximum_seen);
        store_upto(scores + low + i, weight, count);
        total += count == LANES ? weight : keep_part(weight, vf{}, count);
    });
    return sum(total);
}

// sums[r] = sum_j weights[r][j] * v_j, two vectors of a value at a time.
template <int ROWS, class Element>
static void attention_values(const Attention &a, const Element *values, int64_t count, const AttentionScratch &own) {
    for (int64_t d = 0; d < a.value_width; d += 2 * LANES) {
        const int left = static_cast<int>(least<int64_t>(LANES, a.value_width - d));
        const int right = static_cast<int>(least<int64_t>(LANES, a.value_width - d - LANES));
        vf sums[ROWS][2];
        for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = vf{};
        for (int64_t j = 0; j < count; ++j) {
            const Element *v = values + j * a.value_stride + d;
            const vf v0 = left == LANES ? load(v) : load_part(v, left);
            vf v1 = {};
            if (right > 0) v1 = right == LANES ? load(v + LANES) : load_part(v + LANES, right);
            for (int r = 0; r < ROWS; ++r) {
                const vf weight = splat(own.scores[r * SPAN + j]);
                sums[r][0] += weight * v0;
                sums[r][1] += weight * v1;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            float *out = own.sums + r * a.value_width + d;
            store_upto(out, sums[r][0], left);
            if (right > 0) store_upto(out + LANES, sums[r][1], right);
        }
    }
}

template <class Element>
using AttentionValues = void (*)(const Attention &, const Element *, int64_t, const AttentionScratch &);
template <int ROWS, class Element> static AttentionValues<Element> attention_values_for(int rows) {
    if constexpr (ROWS == 0) return nullptr;
    else if (rows == ROWS) return attention_values<ROWS, Element>;
    else return attention_values_for<ROWS - 1, Element>(rows);
}

// into = into * keep + from * add, for the sums of one query.
UPCAST_INLINE void join_sums(float *into, float keep, const float *from, float add, int64_t width) {
    each_vector(width, [&](int64_t i, int count) {
        store_upto(into + i, load_upto(into + i, count) * keep + load_upto(from + i, count) * add, count);
    });
}

UPCAST_INLINE float exp_scalar(float x) { return vexp(splat(x))[0]; }

// Adds one softmax (sums, maximum, total) to another. A maximum of -inf means that nothing was seen.
UPCAST_INLINE void join_softmax(float *into, const float *sums, float top, float total, int64_t width) {
    float &into_top = into[width], &into_total = into[width + 1];
    if (top == -__builtin_inff() && total == 0.0f) return;
    const bool fresh = into_top == -__builtin_inff() && into_total == 0.0f;
    const float larger = into_top > top ? into_top : top;
    const float keep = fresh ? 0.0f : exp_scalar(into_top - larger), add = exp_scalar(top - larger);
    if (fresh) memset(into, 0, sizeof(float) * static_cast<size_t>(width));
    join_sums(into, keep, sums, add, width);
    into_total = into_total * keep + total * add;
    into_top = larger;
}

template <class Element>
static void attention_part(const Attention &a, const AttentionPlan &plan, AttentionScratch own, float *partials,
                           int index) {
    const int64_t units = attention_units(a);
    const int64_t part = index % plan.parts, unit = index / plan.parts % units, head = index / plan.parts / units;
    const int64_t b = head / a.kv_heads, kv = head % a.kv_heads, total = a.group * a.time;
    const int64_t first = total * unit / units;
    const int rows = static_cast<int>(total * (unit + 1) / units - first);
    const Element *keys = static_cast<const Element *>(a.keys) + b * a.key_batch + kv * a.key_head;
    const Element *values = static_cast<const Element *>(a.values) + b * a.value_batch + kv * a.value_head;

    Seen all = seen_by(a, b, first / a.group);
    all.end = seen_by(a, b, (first + rows - 1) / a.group).end;
    const int64_t length = all.end - all.begin;
    const int64_t begin = all.begin + length * part / plan.parts, end = all.begin + length * (part + 1) / plan.parts;
    float *joined = partials + ((head * total + first) * plan.parts + part) * attention_partial(a);
    const int64_t step = plan.parts * attention_partial(a);
    for (int r = 0; r < rows; ++r) {
        const int64_t time = (first + r) / a.group, h = kv * a.group + (first + r) % a.group;
        const float *q = a.queries + b * a.query_batch + h * a.query_head + time * a.query_time;
        if (a.width) memcpy(own.queries + r * a.width, q, sizeof(float) * static_cast<size_t>(a.width));
        joined[r * step + a.value_width] = -__builtin_inff();
        joined[r * step + a.value_width + 1] = 0.0f;
    }
    for (int64_t n = begin; n < end; n += SPAN) {
        const int64_t next = least(end, n + SPAN);
        float tops[DOT_COLS], totals[DOT_COLS];
        attention_scores(a, keys, n, next, rows, own);
        for (int r = 0; r < rows; ++r) {
            totals[r] = weigh(own.scores + r * SPAN, n, next, seen_by(a, b, (first + r) / a.group), tops[r]);
        }
        attention_values_for<DOT_COLS, Element>(rows)(a, values + n * a.value_stride, next - n, own);
        for (int r = 0; r < rows; ++r) {
            join_softmax(joined + r * step, own.sums + r * a.value_width, tops[r], totals[r], a.value_width);
        }
    }
}

static void attention(const Attention &a, const AttentionPlan &plan, float *scratch, float *partials, int index) {
    AttentionScratch own = {scratch, scratch + DOT_COLS * a.width, scratch + DOT_COLS * (a.width + SPAN)};
    if (a.wide) attention_part<float>(a, plan, own, partials, index);
    else attention_part<uint16_t>(a, plan, own, partials, index);
}

// Queries [begin, end) of all heads: joins their parts and divides by the total weight.
static void attention_join(const Attention &a, const AttentionPlan &plan, float *partials, int64_t begin, int64_t end) {
    const int64_t total = a.group * a.time, size = attention_partial(a);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / total, time = i % total / a.group;
        const int64_t b = head / a.kv_heads, h = head % a.kv_heads * a.group + i % total % a.group;
        float *joined = partials + i * plan.parts * size;
        for (int64_t part = 1; part < plan.parts; ++part) {
            const float *other = joined + part * size;
            join_softmax(joined, other, other[a.value_width], other[a.value_width + 1], a.value_width);
        }
        const float weight = joined[a.value_width + 1];
        float *out = a.out + ((b * a.time + time) * a.kv_heads * a.group + h) * a.value_width;
        each_vector(a.value_width, [&](int64_t d, int count) {
            store_upto(out + d, load_upto(joined + d, count) / weight, count);
        });
    }
}

} // namespace UPCAST_NS
} // namespace upcast
