// y = x W^T where AMD's processors wait for memory: few rows of x.
//
// A task's rows of weights are cut into equal parts, and a tile takes one row of each: every part is a sequential
// stream of its own. Four of them are read a fifth faster than one with two threads, and half as fast again with
// one thread, in large pages and in small ones; two or eight gain less. The hardware brings the streams near;
// fetching them into the nearest cache shortly before they are used gains another twentieth, and fetching from
// further ahead loses what was gained.
#pragma once

#include "simd/linear_dot.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr bool HAS_FAR_ROWS = UPCAST_LEVEL == 3 || UPCAST_LEVEL == 4;
constexpr int64_t FAR_BLOCKS = 4;    // of x, at most: with more it is not memory that takes the time
constexpr int64_t FAR_AHEAD = 256;   // halves between those in use and those being fetched



static bool reads_far_rows(const Linear &a, const LinearPlan &plan) {
    if (!HAS_FAR_ROWS || plan.reading != Reading::far_streams) return false;
    const int64_t blocks = RowBlocks(a, plan, 0).count;
    return blocks == 1 || (blocks <= FAR_BLOCKS && plan.block == STRETCH);
}

// The parts of a task's weights: the first begins at `begin`, the others `apart` rows after one another.
struct FarRows {
    int64_t begin, apart;
};

// Rows [first, first + count) of every part against COLS rows of x from m on. Sums wait until there is a cache line of
// them: the parts' places in y often lie where a nearest cache keeps but a few lines.
template <int COLS> static void far_tiles(const Linear &a, const FarRows &far, int64_t first, int64_t count, int64_t m) {
    constexpr int R = dot_rows(COLS);
    constexpr int64_t LINE = 16;
    typedef DotTile<R, COLS, true> Tile;
    float dots[Tile::PADDED + 3], sums[R][COLS][LINE];
    // Addresses stay inside the weights.
    const int64_t last_fetching = far.apart - FAR_AHEAD / most<int64_t>(a.K, 1) - 2;
    for (int64_t i = first; i < first + count; i += LINE) {
        const int64_t rows = least(LINE, first + count - i);
        for (int64_t j = 0; j < rows; ++j) {
            const int64_t n = far.begin + i + j, ahead = i + j <= last_fetching ? FAR_AHEAD : 0;
            Tile::run(a, a.w + n * a.ldw, far.apart * a.ldw, a.x + m * a.ldx, ahead, dots);
            for (int c = 0; c < COLS; ++c)
                for (int r = 0; r < R; ++r) sums[r][c][j] = dots[c * R + r];
        }
        for (int r = 0; r < R; ++r) finish_dots(a, far.begin + r * far.apart + i, rows, m, COLS, sums[r][0], LINE);
    }
}

typedef void (*FarTiles)(const Linear &, const FarRows &, int64_t first, int64_t count, int64_t m);

template <int COLS> static FarTiles far_tiles_for(int cols) {
    if constexpr (COLS == 0) return nullptr;
    else return cols == COLS ? far_tiles<COLS> : far_tiles_for<COLS - 1>(cols);
}

// The first block of x reads the parts side by side; the others meet them, piece by piece, in the second-level cache.
static void far_task(const Linear &a, const LinearPlan &plan, int task) {
    const int tn = task % plan.grid_n;
    const int64_t begin = a.N * tn / plan.grid_n, end = a.N * (tn + 1) / plan.grid_n;
    const RowBlocks x(a, plan, task);
    const int cols = static_cast<int>(x.begin(1) - x.first);
    const int64_t parts = dot_rows(cols), apart = (end - begin) / parts, left_over = begin + parts * apart;
    const FarTiles tiles = far_tiles_for<DOT_COLS>(cols);
    const auto near = [&](int64_t n, int64_t next, int64_t block) {
        const Rows<uint16_t> rows = {a.w + n * a.ldw, a.ldw};
        dot_block<false>(a, rows, n, next, x.begin(block), x.begin(block + 1), Reading::one_stream);
    };
    const int64_t step = x.count == 1 ? most<int64_t>(1, apart) : plan.block / DOT_COLS;
    for (int64_t i = 0; i < apart; i += step) {
        const int64_t count = least(step, apart - i);
        tiles(a, FarRows{begin, apart}, i, count, x.first);
        for (int64_t block = 1; block < x.count; ++block)
            for (int64_t n = begin + i; n < left_over; n += apart) near(n, n + count, block);
    }
    for (int64_t block = 0; block < x.count && left_over < end; ++block) near(left_over, end, block);
}

} // namespace UPCAST_NS
} // namespace upcast
