// y = x W^T: each output is a dot product of a row of x and a row of weights, widened in registers.
//
// A tile is R rows of weights times COLS rows of x, with its sums in registers. How the weights are read from
// memory is measured per processor, and stands in runtime/tuning.cpp. One row of weights at a time, and nothing prefetched,
// is a single sequential stream, which hardware prefetchers follow well; hints cost AMD's a fifth of the bandwidth.
// AMD's want several streams, far apart: see linear_far.hpp. Intel's follow a stream no further than its page: there
// several rows at once, with hints, are read a third faster. More rows of x
// share each widened weight; there the next tile's weights are fetched meanwhile. Nothing is packed or
// transposed, which is why this beats panels of widened weights for every number of rows of x.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

// Where no instruction widens halves, a stretch of weights is widened once for many rows of x.
constexpr bool WIDEN_ONCE = UPCAST_LEVEL == 1;
constexpr int DOT_COLS = REGISTERS == 32 ? 8 : 4;
// With more rows than one tile holds, seven by four uses the registers best; on aarch64 six by four.
constexpr int DOT_COLS_MANY = UPCAST_LEVEL == 64 ? 6 : REGISTERS == 32 ? 7 : 4;

// Rows of weights per tile for each number of rows of x: as many as the registers hold, with what a product reads.
constexpr int dot_rows(int cols) {
    if (UPCAST_LEVEL == 64) return cols <= 6 ? 4 : 3; // no product reads memory: seven by four need 33 registers
    return REGISTERS == 32 ? (cols <= 7 ? 4 : 3) : (cols <= 3 ? 4 : 3);
}

// Rows of weights at once for one row of x, where the processor likes a single stream; aarch64 needs as many sums in flight as hide the latency of a multiply-add.
constexpr int ONE_STREAM = UPCAST_LEVEL == 64 ? 8 : 1;
// AVX-512 takes two rows of x with single rows of weights up to so many columns.
constexpr int64_t LONG_ROW = 1280;

// Tiles between the weights in use and those being fetched. One row of x is done with a tile sooner than
// memory answers; AVX2 is done with short rows of weights sooner, too.
template <int R, int COLS> UPCAST_INLINE int64_t dot_tiles_ahead(int64_t K) {
    if (UPCAST_LEVEL == 3 && COLS > 1) return 1 + 6 * 1024 / (R * K + 1);
    return COLS == 1 ? 2 : 1;
}

// Rows of weights, as stored or widened.
template <class Element> struct Rows {
    const Element *data;
    int64_t ld;
    const Element *row(int64_t n) const { return data + n * ld; }
};

// Whatever the shape of the tile, a dot product adds in the same order: lane by lane along K, then the tree of
// `sum_each`. So a row of x gives the same bits alone, in a batch and between drafted tokens.
template <int R, int COLS, bool FETCH> struct DotTile {
    static constexpr int COUNT = R * COLS;
    // Additions in a row to one sum: more would let rounding errors grow beyond those of a blocked product.
    static constexpr int64_t CHAIN = (LANES > 4 ? 256 : 128) * LANES;
    static constexpr int PADDED = (COUNT + LANES - 1) / LANES * LANES;

    template <class Element>
    UPCAST_INLINE void step(const Element *w, int64_t ldw, const float *x, int64_t ldx, vf *sums) {
        if constexpr (R <= COLS) {
            vf wide[R];
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) wide[r] = load(w + r * ldw);
            UPCAST_UNROLL
            for (int c = 0; c < COLS; ++c) {
                vf xs = load(x + c * ldx);
                UPCAST_KEEP(xs);
                UPCAST_UNROLL
                for (int r = 0; r < R; ++r) sums[c * R + r] += wide[r] * xs;
            }
        } else {
            vf xs[COLS];
            UPCAST_UNROLL
            for (int c = 0; c < COLS; ++c) xs[c] = load(x + c * ldx);
            UPCAST_UNROLL
            for (int r = 0; r < R; ++r) {
                vf wide = load(w + r * ldw);
                UPCAST_KEEP(wide);
                UPCAST_UNROLL
                for (int c = 0; c < COLS; ++c) sums[c * R + r] += wide * xs[c];
            }
        }
    }

    // dots[c * R + r] = x[c] . w[r]; `ahead` elements further on lie the weights of a tile to come.
    template <class Element>
    UPCAST_INLINE void run(const Linear &a, const Element *w, int64_t ldw, const float *x, int64_t ahead, float *dots) {
        stretch(a.ldx, least(a.K, CHAIN), w, ldw, x, ahead, dots);
        for (int64_t k = CHAIN; k < a.K; k += CHAIN) {
            float more[PADDED];
            stretch(a.ldx, least(a.K - k, CHAIN), w + k, ldw, x + k, ahead, more);
            for (int i = 0; i < COUNT; ++i) dots[i] += more[i];
        }
    }

    template <class Element>
    static void stretch(int64_t ldx, int64_t K, const Element *w, int64_t ldw, const float *x, int64_t ahead,
                        float *dots) {
        vf sums[PADDED];
        UPCAST_UNROLL
        for (int i = 0; i < PADDED; ++i) sums[i] = vf{};
        int64_t k = 0;
        for (; k + LANES <= K; k += LANES) {
            if (FETCH) {
                UPCAST_UNROLL
                for (int r = 0; r < R; ++r) prefetch(w + r * ldw + k + ahead);
            }
            step(w + k, ldw, x + k, ldx, sums);
        }
        if (k < K) {
            const int count = static_cast<int>(K - k);
            UPCAST_UNROLL
            for (int c = 0; c < COLS; ++c) {
                const vf xs = load_part(x + c * ldx + k, count);
                UPCAST_UNROLL
                for (int r = 0; r < R; ++r) sums[c * R + r] += load_part(w + r * ldw + k, count) * xs;
            }
        }
        if (COUNT == 1) {
            dots[0] = sum(sums[0]);
            return;
        }
        UPCAST_UNROLL
        for (int i = 0; i < PADDED; i += LANES) store(dots + i, sum_each(sums + i));
    }
};

// Sums of a stretch of weights, one row per row of x, until bias and residual join them. A tile's sums
// are copied four at a time, so the rows have room for three more.
constexpr int64_t STRETCH = 48;
typedef float DotSums[DOT_COLS][STRETCH + 3];

template <int R, int COLS, bool FETCH, class Element>
static void dot_tiles(const Linear &a, Rows<Element> w, int64_t begin, int64_t end, int64_t m, DotSums &sums) {
    typedef DotTile<R, COLS, FETCH> Full;
    const int64_t tiles_ahead = dot_tiles_ahead<R, COLS>(a.K);
    float dots[Full::PADDED + 3];
    const float *x = a.x + m * a.ldx;
    int64_t n = begin;
    for (; n + R <= end; n += R) {
        const int64_t ahead = n + (tiles_ahead + 1) * R <= a.N ? tiles_ahead * R * w.ld : 0;
        Full::run(a, w.row(n - begin), w.ld, x, ahead, dots);
        for (int c = 0; c < COLS; ++c) memcpy(&sums[c][n - begin], dots + c * R, sizeof(float) * (R == 1 ? 1 : R <= 4 ? 4 : R));
    }
    if constexpr (R > 1) {
        for (; n < end; ++n) {
            DotTile<1, COLS, false>::run(a, w.row(n - begin), w.ld, x, 0, dots);
            for (int c = 0; c < COLS; ++c) sums[c][n - begin] = dots[c];
        }
    }
}

template <class Element>
using DotTiles = void (*)(const Linear &, Rows<Element>, int64_t begin, int64_t end, int64_t m, DotSums &);

template <int COLS, bool FETCH, class Element> static DotTiles<Element> dot_tiles_for(int cols) {
    if constexpr (COLS == 0) return nullptr;
    else if (cols == COLS) return dot_tiles<dot_rows(COLS), COLS, FETCH, Element>;
    else return dot_tiles_for<COLS - 1, FETCH, Element>(cols);
}

// y[m + c][begin + i] from sums[c * ld + i].
static void finish_dots(const Linear &a, int64_t begin, int64_t count, int64_t m, int cols, const float *sums, int64_t ld) {
    for (int c = 0; c < cols; ++c, sums += ld) {
        float *y = a.y + (m + c) * a.ldy + begin;
        for (int64_t i = 0; i < count; ++i) y[i] = a.bias ? sums[i] + a.bias[begin + i] : sums[i];
        if (!a.residual) continue;
        const float *residual = a.residual + (m + c) * a.ldr + begin;
        for (int64_t i = 0; i < count; ++i) y[i] += residual[i];
    }
}

// Rows [m, next) of x against weights [begin, end), the rows of w.
template <bool FETCH, class Element>
static void dot_block(const Linear &a, Rows<Element> w, int64_t begin, int64_t end, int64_t m, int64_t next,
                      Reading reading) {
    DotSums sums;
    const int cols = static_cast<int>(next - m);
    const bool short_pair = UPCAST_LEVEL == 4 && cols == 2 && a.K < LONG_ROW; // a third faster by single rows, too
    if (cols == 1 && reading != Reading::near_streams) dot_tiles<ONE_STREAM, 1, false, Element>(a, w, begin, end, m, sums);
    else if (short_pair) dot_tiles<1, 2, false, Element>(a, w, begin, end, m, sums);
    else dot_tiles_for<DOT_COLS, FETCH, Element>(cols)(a, w, begin, end, m, sums);
    finish_dots(a, begin, end - begin, m, cols, sums[0], STRETCH + 3);
}

static LinearPlan plan_dot(const Linear &a, int threads) {
    LinearPlan plan = {};
    plan.strategy = Strategy::dot;
    // Few rows of weights per task would read x too often: then the rows of x are divided as well.
    const int64_t least_rows = a.M <= DOT_COLS ? 1 : STRETCH;
    plan.grid_n = static_cast<int>(least<int64_t>(threads, most<int64_t>(1, a.N / least_rows)));
    plan.grid_m = static_cast<int>(least<int64_t>(threads / plan.grid_n, (a.M + DOT_COLS - 1) / DOT_COLS));
    plan.tasks[0] = plan.grid_n * plan.grid_m;
    // A stretch stays in the second-level cache, next to a block of x, while all of x passes over it.
    constexpr int64_t CACHED = (UPCAST_LEVEL == 3 ? 128 : 64) * 1024, TALLEST_TILES = 12; // halves; a multiple of every tile height
    plan.block = least(STRETCH, most<int64_t>(1, CACHED / (a.K + 1) / TALLEST_TILES) * TALLEST_TILES);
    if (WIDEN_ONCE && a.M > DOT_COLS) plan.scratch = sizeof(float) * static_cast<size_t>(plan.tasks[0] * plan.block * a.K);
    return plan;
}

// The rows of x of a task, in blocks of nearly equal height that tiles take.
struct RowBlocks {
    int64_t first, rows, count;
    RowBlocks(const Linear &a, const LinearPlan &plan, int task) {
        const int64_t tm = task / plan.grid_n;
        first = a.M * tm / plan.grid_m, rows = a.M * (tm + 1) / plan.grid_m - first;
        const int64_t widest = rows <= 2 * DOT_COLS ? DOT_COLS : DOT_COLS_MANY;
        count = (rows + widest - 1) / widest;
    }
    int64_t begin(int64_t block) const { return first + rows * block / count; }
};

static void dot_task(const Linear &a, const LinearPlan &plan, float *scratch, int task) {
    const int tn = task % plan.grid_n;
    const int64_t begin = a.N * tn / plan.grid_n, end = a.N * (tn + 1) / plan.grid_n;
    const RowBlocks x(a, plan, task);
    float *wide = plan.scratch ? scratch + task * plan.block * a.K : nullptr;
    for (int64_t n = begin; n < end; n += plan.block) {
        const int64_t next_n = least(end, n + plan.block);
        const Rows<uint16_t> stored = {a.w + n * a.ldw, a.ldw};
        if (wide)
            for (int64_t i = 0; i < next_n - n; ++i) widen_row(stored.row(i), wide + i * a.K, a.K);
        for (int64_t block = 0; block < x.count; ++block) {
            const int64_t m = x.begin(block), next = x.begin(block + 1);
            if (wide) dot_block<false>(a, Rows<float>{wide, a.K}, n, next_n, m, next, Reading::one_stream);
            else if (block == 0) dot_block<true>(a, stored, n, next_n, m, next, plan.reading);
            else dot_block<false>(a, stored, n, next_n, m, next, Reading::one_stream);
        }
    }
}

} // namespace UPCAST_NS
} // namespace upcast
