// Attention of new queries over a cache: scores, softmax and sums in float32, whatever the cache holds.
//
// A unit is a group of queries that share one head of the cache. Their scores over a span of positions are kept
// whole, so each span has an ordinary softmax; spans are joined, from the first to the last, by rescaling to the larger
// maximum. Where there are few units each span is a task of its own, and a second phase joins them in the same order.
// Spans are counted from the first position that a row of the batch sees, and are equally long for up to FEW queries:
// so neither the other rows, nor padding, nor the number of threads or of drafted tokens changes a bit of a result.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/attention_few.hpp"
#include "simd/attention_many.hpp"
#include "simd/exponential.hpp"
#include "simd/rowwise.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t FEW = 8; // new positions
constexpr int64_t SPAN_OF_FEW = 96;
// Floats that parts may take, all together.
constexpr int64_t MOST_PARTIALS = 4 << 20;

// Per query of a unit's part: the weighted sum, the maximum and the total weight.
static int64_t attention_partial(const Attention &a) { return a.value_width + 2; }

// Queries of one unit, at most.
static int64_t attention_rows(const Attention &a, int threads) {
    const int64_t total = a.group * a.time;
    if (a.time <= FEW || total < FEWEST_OF_MANY) return DOT_COLS;
    const int64_t fair = total * a.batch * a.kv_heads / (4 * threads) / TILE_ROWS * TILE_ROWS;
    return least(MANY_ROWS, most(FEWEST_OF_MANY, fair));
}

static int64_t attention_units(const Attention &a, const AttentionPlan &plan) {
    return (a.group * a.time + plan.rows - 1) / plan.rows;
}

static AttentionPlan plan_attention(const Attention &a, int threads) {
    AttentionPlan plan = {};
    plan.rows = attention_rows(a, threads);
    const bool many = plan.rows > DOT_COLS;
    plan.span = many ? SPAN_OF_MANY : SPAN_OF_FEW;
    const int64_t units = a.batch * a.kv_heads * attention_units(a, plan);
    const int64_t positions = a.start + a.time;
    const int64_t seen = a.window > 0 ? least(positions, a.window + a.time + plan.span) : positions;
    const int64_t spans = most<int64_t>(1, (seen + plan.span - 1) / plan.span);
    const int64_t partials = a.batch * a.kv_heads * a.group * a.time * attention_partial(a);
    // Few units are not shared evenly by the threads.
    plan.parts = threads > 1 && units < 4 * threads && partials * spans <= MOST_PARTIALS ? spans : 1;
    plan.units = static_cast<int>(units * plan.parts);
    plan.work = units * plan.rows * positions * (a.width + a.value_width);
    plan.own = plan.rows * (a.width + plan.span + X_PAD + a.value_width) + (many ? many_wide(a) : 0);
    plan.partials = partials * plan.parts;
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

// The scores of `count` positions, scaled and capped.
static void scale_scores(const Attention &a, int64_t count, int rows, const AttentionScratch &own) {
    for (int r = 0; r < rows; ++r) {
        each_vector(count, [&](int64_t i, int part) {
            float *scores = own.scores + r * own.ld + i;
            vf s = load_upto(scores, part) * a.scale;
            if (a.softcap > 0) s = a.softcap * vtanh(s / a.softcap);
            store_upto(scores, s, part);
        });
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
static void attention_part(const Attention &a, const AttentionPlan &plan, const AttentionScratch &own, float *partials,
                           int index) {
    const bool many = plan.rows > DOT_COLS;
    const int64_t units = attention_units(a, plan);
    const int64_t part = index % plan.parts, unit = index / plan.parts % units, head = index / plan.parts / units;
    const int64_t b = head / a.kv_heads, kv = head % a.kv_heads, total = a.group * a.time;
    const int64_t first = total * unit / units;
    const int rows = static_cast<int>(total * (unit + 1) / units - first);
    const Element *keys = static_cast<const Element *>(a.keys) + b * a.key_batch + kv * a.key_head;
    const Element *values = static_cast<const Element *>(a.values) + b * a.value_batch + kv * a.value_head;

    const int64_t origin = a.first ? a.first[b] : 0;
    const int64_t last = seen_by(a, b, (first + rows - 1) / a.group).end;
    const int64_t earliest = seen_by(a, b, first / a.group).begin;
    int64_t begin = earliest - (earliest - origin) % plan.span, end = last;
    if (plan.parts > 1) begin += part * plan.span, end = least(last, begin + plan.span);
    float *joined = partials + ((head * total + first) * plan.parts + part) * attention_partial(a);
    const int64_t step = plan.parts * attention_partial(a);
    for (int r = 0; r < rows; ++r) {
        const int64_t time = (first + r) / a.group, h = kv * a.group + (first + r) % a.group;
        const float *q = a.queries + b * a.query_batch + h * a.query_head + time * a.query_time;
        if (a.width) memcpy(own.queries + r * a.width, q, sizeof(float) * static_cast<size_t>(a.width));
        joined[r * step + a.value_width] = -__builtin_inff();
        joined[r * step + a.value_width + 1] = 0.0f;
    }
    for (int64_t n = begin; n < end; n += plan.span) {
        const int64_t next = least(end, n + plan.span);
        float tops[MANY_ROWS], totals[MANY_ROWS];
        const Soon<Element> values_soon = {values + n * a.value_stride, a.value_stride, a.value_width};
        if (many) many_scores(a, keys + n * a.key_stride, next - n, rows, own);
        else few_scores(a, keys + n * a.key_stride, next - n, rows, own, values_soon);
        scale_scores(a, next - n, rows, own);
        for (int r = 0; r < rows; ++r) {
            totals[r] = weigh(own.scores + r * own.ld, n, next, seen_by(a, b, (first + r) / a.group), tops[r]);
        }
        // What no query of the unit sees is not read: it need not be finite.
        const int64_t from = least(next, most(n, earliest));
        AttentionScratch weights = own;
        weights.scores += from - n;
        const bool more = next + (next - from) <= last;
        const Soon<Element> keys_soon = {more ? keys + next * a.key_stride : nullptr, a.key_stride, a.width};
        if (many) many_values(a, values + from * a.value_stride, next - from, rows, weights);
        else few_values(a, values + from * a.value_stride, next - from, rows, weights, keys_soon);
        for (int r = 0; r < rows; ++r) {
            join_softmax(joined + r * step, own.sums + r * a.value_width, tops[r], totals[r], a.value_width);
        }
    }
}

static void attention(const Attention &a, const AttentionPlan &plan, float *scratch, float *partials, int index) {
    AttentionScratch own = {};
    own.ld = plan.span + X_PAD;
    own.queries = scratch, own.scores = own.queries + plan.rows * a.width;
    own.sums = own.scores + plan.rows * own.ld, own.wide = own.sums + plan.rows * a.value_width;
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
