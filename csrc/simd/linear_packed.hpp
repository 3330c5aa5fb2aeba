// y = x W^T for packed weights. Each number is added in the order in which `DotTile` adds a float16 one, so that what
// both can hold gives the same bits, alone and in a batch.
//
// One row of x, and where there are registers for it a few: what is unpacked is multiplied at once, escapes put back in
// registers. More: rows of a tile's weights are unpacked into the nearest cache, where what escaped is put back, and then
// multiplied as any floats, their sums in registers. Record by record, so that the processor unpacks the next one
// meanwhile; or chunk by chunk, where several blocks of rows of x meet a chunk, whose sums wait beside it. Many rows: see
// linear_packed_many.hpp.
// The rows of a tile are neighbours, or lie far apart: see linear_far.hpp.
#pragma once

#include "simd/linear_dot.hpp"
#include "simd/linear_far.hpp"
#include "simd/linear_wide.hpp"
#include "simd/packed.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t PACKED_CHUNK = 512;      // numbers of each row of a tile; a divisor of CHAIN
constexpr int64_t PACKED_DEPTH = 512 + 16; // numbers between rows of a chunk: multiples of 4 KiB evict each other
constexpr int64_t PACKED_LINE = 16;        // tiles whose sums wait for one another
// Floats between rows that are unpacked.
constexpr int64_t WIDE_RECORD = RECORD * WIDE_BYTES / 4, WIDE_DEPTH = PACKED_DEPTH * WIDE_BYTES / 4;
// Blocks of x that meet a chunk, at most. Where a stretch of rows is unpacked to half of the bytes, more meet that.
constexpr int64_t PACKED_BLOCKS = LANES == 16 ? 1 : 4;
// Bytes between a record in use and those that are fetched into the nearest cache, and into the second one: unpacking
// leaves too little room in a core's window to wait for either.
constexpr int64_t FETCHED_NEAR = 512, FETCHED_FAR = 2048;

// How many rows of x meet a record's numbers in registers: as many as leave room for these. More of them meet what was
// unpacked in the nearest cache.
constexpr int MEET_IN_REGISTERS = LANES == 16 ? 3 : 1;

// Rows of weights per tile for each number of rows of x: several even for one, since a single sum waits for itself. Four
// by seven leave no register for what unpacks the next record.
constexpr int packed_rows_of(int cols) {
    if (UPCAST_LEVEL == 64 && cols == 1) return 8;
    return LANES == 16 && cols == 7 ? 3 : dot_rows(cols);
}

// Where a tile's rows of weights are: the first is n, each other one `apart` rows after the one before.
struct TileRows {
    int64_t n, apart;
    bool fetch; // false near the end: addresses stay inside the weights
};

// Where the records of a tile are. A value of its own: what the compiler believes to change with every number that is
// stored, it reads again every time.
struct TileRecords {
    HighBytesOf high;
    const uint8_t *first;
    int64_t stride, ahead; // bytes between rows, and to what is being fetched
};

template <int64_t DEPTH> UPCAST_INLINE TileRecords records_of(const Linear &a, const TileRows &tile) {
    // The next chunk, which takes longer to use than to come.
    constexpr int64_t AHEAD = DEPTH == RECORD ? 1024 : DEPTH / RECORD * RECORD_BYTES;
    return {HighBytesOf(a.packed.table), record_of(a.packed, tile.n, 0), tile.apart * a.packed.row_bytes, tile.fetch ? AHEAD : 0};
}

// How far from the last row of weights a tile has to end to fetch ahead.
UPCAST_INLINE int64_t fetched_rows(const Linear &a) {
    constexpr int64_t FETCHED = FETCHED_FAR + 128; // bytes, at most
    return FETCHED / most<int64_t>(1, a.packed.row_bytes) + 2;
}

// After numbers were stored: the compiler would rather keep them all beside it, in registers that it does not have.
#define UPCAST_STORED(array) __asm__("" : "+m"(array))

// Numbers [k, k + count) of the rows of a tile, DEPTH of them after one another; all of their last records, in fact.
template <int R, int64_t DEPTH>
UPCAST_INLINE void widen_rows(const TileRecords &at, int64_t k, int64_t count, float *numbers) {
    const uint8_t *w = at.first + k / RECORD * RECORD_BYTES;
    for (int64_t i = 0; i < count; i += RECORD, w += RECORD_BYTES) {
        UPCAST_UNROLL
        for (int r = 0; r < R; ++r) {
            const uint8_t *record = w + r * at.stride;
            prefetch(record + at.ahead), prefetch(record + at.ahead + 64);
            unpack_wide(record, at.high, numbers + (r * DEPTH + i) * WIDE_BYTES / 4);
        }
    }
}

// Rows of weights that are unpacked before x meets them: a vector of x is loaded once for all of them.
constexpr int rows_at_once(int rows, int cols) { return cols > 1 && rows % 2 == 0 ? 2 : 1; }

// One record of each row of a tile, where nothing escapes, against COLS rows of x.
template <int R, int COLS>
UPCAST_INLINE void add_record(const uint8_t *w, const HighBytesOf &high, int64_t stride, int64_t near, int64_t far,
                              const float *x, int64_t ldx, vf *sums) {
    constexpr int AT_ONCE = rows_at_once(R, COLS);
    UPCAST_UNROLL
    for (int first = 0; first < R; first += AT_ONCE) {
        vf numbers[AT_ONCE][RECORD_VECTORS];
        UPCAST_UNROLL
        for (int r = 0; r < AT_ONCE; ++r) {
            const uint8_t *record = w + (first + r) * stride;
            prefetch_far(record + far), prefetch_far(record + far + 64);
            prefetch(record + near), prefetch(record + near + 64);
            unpack_record(record, high, numbers[r]);
        }
        UPCAST_UNROLL
        for (int v = 0; v < RECORD_VECTORS; ++v) {
            UPCAST_UNROLL
            for (int c = 0; c < COLS; ++c) {
                vf xs = load(x + c * ldx + v * LANES);
                if (AT_ONCE > 1) UPCAST_KEEP(xs);
                UPCAST_UNROLL
                for (int r = 0; r < AT_ONCE; ++r) sums[c * R + first + r] += numbers[r][v] * xs;
            }
        }
    }
}

// What escapes in the rows of a tile.
template <int R> struct TileEscapes {
    Escapes rows[R];

    // The first column of any; most tiles are answered by their pointers alone.
    UPCAST_ALWAYS_INLINE int64_t find(const Linear &a, const TileRows &tile) {
        if (none(a, tile)) {
            for (int r = 0; r < R; ++r) rows[r] = Escapes::none();
            return Escapes::NONE;
        }
        for (int r = 0; r < R; ++r) rows[r] = Escapes::of(a.packed, tile.n + r * tile.apart);
        return soonest();
    }
    UPCAST_INLINE bool none(const Linear &a, const TileRows &tile) {
        if (!a.packed.pointers) return true;
        const uint8_t *at = a.packed.pointers + 4 * (a.packed.first + tile.n);
        uint32_t some = 0;
        UPCAST_UNROLL
        for (int r = 0; r < R; ++r, at += 4 * tile.apart) {
            uint32_t ends[2];
            memcpy(ends, at, sizeof ends);
            some |= ends[0] ^ ends[1];
        }
        return some == 0;
    }
    // The first column of any.
    UPCAST_ALWAYS_INLINE int64_t soonest() const {
        int64_t column = Escapes::NONE;
        for (int r = 0; r < R; ++r) column = least(column, rows[r].next);
        return column;
    }
    // Puts those of columns [k, k + count) in their places; the first column of what is left.
    __attribute__((noinline)) int64_t patch(int64_t k, int64_t count, int64_t depth, float *numbers) {
        for (int r = 0; r < R; ++r) patch_wide(rows[r], k, count, numbers + r * depth);
        return soonest();
    }
};

// dots[i] = the sum of sums[i], or that more, in the order of DotTile.
template <int COUNT> UPCAST_INLINE void add_dots(const vf *kept, bool first, float *dots) {
    constexpr int PADDED = DotTile<COUNT, 1, false>::PADDED;
    float more[PADDED];
    if constexpr (COUNT == 1) more[0] = sum(kept[0]);
    else {
        vf sums[PADDED]; // zeros that the compiler sees, and drops
        UPCAST_UNROLL
        for (int i = 0; i < PADDED; ++i) sums[i] = i < COUNT ? kept[i] : vf{};
        UPCAST_UNROLL
        for (int i = 0; i < PADDED; i += LANES) store(more + i, sum_each(sums + i));
    }
    for (int i = 0; i < COUNT; ++i) dots[i] = first ? more[i] : dots[i] + more[i];
}

constexpr int64_t PACKED_CHAIN = DotTile<1, 1, false>::CHAIN;

// The rows of x that meet a tile. The last K % RECORD numbers of each stand in `tail`, RECORD apart and followed by zeros.
struct XRows {
    const float *x;
    int64_t ldx;
    const float *tail;
};

// A record with escapes, or one that is not full: k is its first column, `count` its numbers.
template <int R, int COLS>
UPCAST_INLINE void add_odd_record(const uint8_t *w, const HighBytesOf &high, int64_t stride, const float *x, int64_t ldx,
                                  int64_t k, int64_t count, TileEscapes<R> &escapes, vf *sums) {
    UPCAST_UNROLL
    for (int r = 0; r < R; ++r) {
        vf numbers[RECORD_VECTORS];
        unpack_record(w + r * stride, high, numbers);
        escapes.rows[r].put(k, numbers);
        UPCAST_UNROLL
        for (int v = 0; v < RECORD_VECTORS; ++v) {
            const vf there = keep_part(numbers[v], vf{}, static_cast<int>(count) - v * LANES);
            UPCAST_UNROLL
            for (int c = 0; c < COLS; ++c) sums[c * R + r] += there * load(x + c * ldx + v * LANES);
        }
    }
}

// dots[c * R + r] of a tile, whose numbers meet x in registers. Not part of what surrounds it: there the compiler keeps
// in memory what this loop needs in registers.
template <int R, int COLS>
static __attribute__((noinline)) void tile_in_registers(const Linear &a, const TileRows &tile, const XRows &rows, float *dots) {
    const HighBytesOf high(a.packed.table);
    const uint8_t *w = record_of(a.packed, tile.n, 0);
    const int64_t stride = tile.apart * a.packed.row_bytes, ldx = rows.ldx;
    const int64_t near = tile.fetch ? FETCHED_NEAR : 0, far = tile.fetch ? FETCHED_FAR : 0;
    TileEscapes<R> escapes;
    int64_t soonest = escapes.find(a, tile), k = 0;
    const float *x = rows.x;
    do {
        const bool first = k == 0;
        const int64_t end = least(a.K, k + PACKED_CHAIN);
        vf sums[R * COLS];
        UPCAST_UNROLL
        for (int i = 0; i < R * COLS; ++i) sums[i] = vf{};
        while (k < end) {
            const uint8_t *odd = w + (least(end, soonest) - k) / RECORD * RECORD_BYTES;
            k += (odd - w) / RECORD_BYTES * RECORD;
            for (; w != odd; w += RECORD_BYTES, x += RECORD) add_record<R, COLS>(w, high, stride, near, far, x, ldx, sums);
            if (k == end) break;
            const int64_t count = least(RECORD, end - k);
            const bool full = count == RECORD;
            add_odd_record<R, COLS>(w, high, stride, full ? x : rows.tail, full ? ldx : RECORD, k, count, escapes, sums);
            soonest = escapes.soonest();
            k += count, w += RECORD_BYTES, x += RECORD;
        }
        add_dots<R * COLS>(sums, first, dots);
    } while (k < a.K);
}

// dots[c * R + r] of a tile, whose numbers meet x in the nearest cache.
template <int R, int COLS>
static void tile_in_cache(const Linear &a, const TileRows &tile, const XRows &rows, float *dots) {
    const TileRecords at = records_of<RECORD>(a, tile);
    TileEscapes<R> escapes;
    int64_t soonest = escapes.find(a, tile), k = 0;
    do {
        const bool first = k == 0;
        const int64_t end = least(a.K, k + PACKED_CHAIN);
        vf sums[R * COLS];
        UPCAST_UNROLL
        for (int i = 0; i < R * COLS; ++i) sums[i] = vf{};
        for (int64_t count; k < end; k += count) {
            count = least(RECORD, end - k);
            alignas(64) float wide[R * WIDE_RECORD];
            widen_rows<R, RECORD>(at, k, count, wide);
            if (soonest < k + count) soonest = escapes.patch(k, count, WIDE_RECORD, wide);
            UPCAST_STORED(wide);
            add_wide<R, COLS>(wide, WIDE_RECORD, rows.x + k, rows.ldx, count, sums);
        }
        add_dots<R * COLS>(sums, first, dots);
    } while (k < a.K);
}

template <int R, int COLS>
static void packed_chunk(const float *wide, const float *x, int64_t ldx, int64_t count, vf *kept) {
    constexpr int COUNT = R * COLS;
    vf sums[COUNT];
    UPCAST_UNROLL
    for (int i = 0; i < COUNT; ++i) sums[i] = kept[i];
    add_wide<R, COLS>(wide, WIDE_DEPTH, x, ldx, count, sums);
    UPCAST_UNROLL
    for (int i = 0; i < COUNT; ++i) kept[i] = sums[i];
}

template <int R, int COLS> static void packed_dots(vf *kept, bool first, float *dots) { add_dots<R * COLS>(kept, first, dots); }

// What there is for a block of so many rows of x.
struct PackedChunk {
    void (*add)(const float *wide, const float *x, int64_t ldx, int64_t count, vf *kept);
    void (*finish)(vf *kept, bool first, float *dots);
};

template <int R, int COLS> static PackedChunk packed_chunk_for(int64_t cols) {
    if constexpr (COLS == 0) return {};
    else return cols == COLS ? PackedChunk{packed_chunk<R, COLS>, packed_dots<R, COLS>} : packed_chunk_for<R, COLS - 1>(cols);
}

// The same of several blocks.
template <int R> static void packed_blocks(const Linear &a, const RowBlocks &rows, const TileRows &tile, float *dots) {
    constexpr int MOST_SUMS = (R * DOT_COLS + LANES - 1) / LANES * LANES;
    const TileRecords at = records_of<PACKED_CHUNK>(a, tile);
    TileEscapes<R> escapes;
    int64_t soonest = escapes.find(a, tile);
    alignas(64) float wide[R * WIDE_DEPTH];
    vf kept[PACKED_BLOCKS][MOST_SUMS];
    PackedChunk chunks[PACKED_BLOCKS];
    for (int64_t b = 0; b < rows.count; ++b) chunks[b] = packed_chunk_for<R, DOT_COLS>(rows.begin(b + 1) - rows.begin(b));
    int64_t k = 0;
    do {
        const bool first = k == 0;
        const int64_t end = least(a.K, k + PACKED_CHAIN);
        memset(kept, 0, sizeof kept);
        for (; k < end; k += PACKED_CHUNK) {
            const int64_t count = least(PACKED_CHUNK, end - k);
            widen_rows<R, PACKED_DEPTH>(at, k, count, wide);
            if (soonest < k + count) soonest = escapes.patch(k, count, WIDE_DEPTH, wide);
            for (int64_t b = 0; b < rows.count; ++b)
                chunks[b].add(wide, a.x + rows.begin(b) * a.ldx + k, a.ldx, count, kept[b]);
        }
        k = end;
        for (int64_t b = 0; b < rows.count; ++b) chunks[b].finish(kept[b], first, dots + (rows.begin(b) - rows.first) * R);
    } while (k < a.K);
}

// R rows of weights against the blocks of x, the widest of COLS rows.
template <int R, int COLS, bool SEVERAL>
UPCAST_INLINE void packed_tile(const Linear &a, const RowBlocks &blocks, const XRows &rows, const TileRows &tile, float *dots) {
    if constexpr (SEVERAL) packed_blocks<R>(a, blocks, tile, dots);
    else if constexpr (COLS <= MEET_IN_REGISTERS) tile_in_registers<R, COLS>(a, tile, rows, dots);
    else tile_in_cache<R, COLS>(a, tile, rows, dots);
}

// Rows [begin, end) of weights: their sums go to y a cache line at a time.
template <int COLS, bool SEVERAL>
static void packed_few_rows(const Linear &a, const RowBlocks &x, int64_t begin, int64_t end, Reading reading) {
    constexpr int HEIGHT = SEVERAL ? dot_rows(COLS) : packed_rows_of(COLS), MOST_ROWS = SEVERAL ? PACKED_BLOCKS * COLS : COLS;
    float dots[HEIGHT * MOST_ROWS + LANES], sums[HEIGHT * MOST_ROWS * PACKED_LINE], tail[COLS * RECORD] = {};
    const int64_t rest = a.K % RECORD;
    const XRows meeting = {a.x + x.first * a.ldx, a.ldx, tail};
    for (int c = 0; c < COLS && !SEVERAL && rest; ++c)
        memcpy(tail + c * RECORD, meeting.x + c * a.ldx + a.K - rest, sizeof(float) * static_cast<size_t>(rest));
    const int64_t rows = SEVERAL ? x.rows : COLS, count = (end - begin) / HEIGHT;
    const bool far = reading == Reading::far_streams;
    const int64_t apart = far ? count : 1, step = far ? 1 : HEIGHT;
    // sums[(r * rows + m) * LINE + j] where rows lie apart, else sums[m * LINE * HEIGHT + j * HEIGHT + r].
    const int64_t by_r = far ? rows * PACKED_LINE : 1, by_m = far ? PACKED_LINE : PACKED_LINE * HEIGHT, by_j = far ? 1 : HEIGHT;
    const int64_t last = begin + (far ? (HEIGHT - 1) * count : 0);
    const int64_t fetching = reading == Reading::one_stream ? -1 : a.N - HEIGHT - fetched_rows(a);
    for (int64_t i = 0; i < count; i += PACKED_LINE) {
        const int64_t line = least(PACKED_LINE, count - i);
        for (int64_t j = 0; j < line; ++j) {
            const int64_t n = begin + (i + j) * step;
            const TileRows tile = {n, apart, last - begin + n <= fetching};
            packed_tile<HEIGHT, COLS, SEVERAL>(a, x, meeting, tile, dots);
            float *to = sums + j * by_j;
            for (int64_t m = 0; m < rows; ++m)
                for (int r = 0; r < HEIGHT; ++r) to[r * by_r + m * by_m] = dots[m * HEIGHT + r];
        }
        for (int64_t r = 0; far && r < HEIGHT; ++r)
            finish_dots(a, begin + r * apart + i, line, x.first, static_cast<int>(rows), sums + r * by_r, by_m);
        if (!far) finish_dots(a, begin + i * HEIGHT, line * HEIGHT, x.first, static_cast<int>(rows), sums, by_m);
    }
    for (int64_t n = begin + count * HEIGHT; n < end; ++n) {
        packed_tile<1, COLS, SEVERAL>(a, x, meeting, TileRows{n, 0, false}, dots);
        finish_dots(a, n, 1, x.first, static_cast<int>(rows), dots, 1);
    }
}

typedef void (*PackedRowsOf)(const Linear &, const RowBlocks &, int64_t begin, int64_t end, Reading);

template <int COLS> static PackedRowsOf packed_few_rows_for(int64_t cols, [[maybe_unused]] bool several) {
    if constexpr (COLS == 0) return nullptr;
    else if (cols != COLS) return packed_few_rows_for<COLS - 1>(cols, several);
    else if constexpr (PACKED_BLOCKS == 1) return packed_few_rows<COLS, false>;
    else return several ? packed_few_rows<COLS, true> : packed_few_rows<COLS, false>;
}

// The widest block of the task's rows of x.
static int64_t widest_block(const RowBlocks &x) {
    int64_t widest = 0;
    for (int64_t b = 0; b < x.count; ++b) widest = most(widest, x.begin(b + 1) - x.begin(b));
    return widest;
}

} // namespace UPCAST_NS
} // namespace upcast
