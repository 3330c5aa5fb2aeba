#include "runtime/packed.hpp"

#include "runtime/system.hpp"
#include "runtime/threads.hpp"

#include <string.h>

namespace upcast {
namespace {

constexpr int MOST_TASKS = 64;
constexpr int64_t NUMBERS_PER_TASK = 64 * 1024;

int packing_tasks(int64_t count, int64_t numbers, int threads) {
    int64_t tasks = numbers / NUMBERS_PER_TASK;
    if (tasks > threads) tasks = threads;
    if (tasks > count) tasks = count;
    if (tasks > MOST_TASKS) tasks = MOST_TASKS;
    return tasks < 1 ? 1 : static_cast<int>(tasks);
}

struct ExamineCall {
    const Level &level;
    const Numbers &args;
    int tasks;
    HighBytes found[MOST_TASKS];
};

void examine_task(void *context, int index) {
    ExamineCall &call = *static_cast<ExamineCall *>(context);
    const int64_t count = call.args.rows * call.args.columns;
    HighBytes found = {{}, true}; // on this thread's stack: neighbours would share cache lines
    call.level.examine(call.args, count * index / call.tasks, count * (index + 1) / call.tasks, found);
    call.found[index] = found;
}

// Each task lists the escapes of its rows in a part of its own, until it is known where they go.
struct PackCall {
    const Level &level;
    const Packing &args;
    uint8_t *lists;
    int64_t most; // escapes of a task, that there is room for
    int tasks;
    EscapeList escapes[MOST_TASKS];
};

constexpr int64_t ESCAPE_BYTES = 6;

void pack_task(void *context, int index) {
    PackCall &call = *static_cast<PackCall *>(context);
    uint8_t *list = call.lists ? call.lists + index * call.most * ESCAPE_BYTES : nullptr;
    EscapeList escapes = {list, list + 4 * call.most, call.most, 0, true};
    const int64_t rows = call.args.from.rows;
    call.level.pack(call.args, rows * index / call.tasks, rows * (index + 1) / call.tasks, escapes);
    call.escapes[index] = escapes;
}

uint32_t read_32(const uint8_t *from, int64_t index) {
    uint32_t value;
    memcpy(&value, from + 4 * index, sizeof value);
    return value;
}

// What was found in each row becomes what was found before it.
void add_up(uint8_t *pointers, int64_t rows) {
    uint32_t total = 0;
    for (int64_t row = 0; row <= rows; ++row) {
        const uint32_t found = row < rows ? read_32(pointers, row) : 0;
        memcpy(pointers + 4 * row, &total, sizeof total);
        total += found;
    }
}

Packed gather(const PackCall &call, int64_t escapes, uint8_t *columns, uint8_t *values) {
    int64_t total = 0;
    for (int i = 0; i < call.tasks; ++i) {
        if (!call.escapes[i].exact) return Packed::inexact;
        total += call.escapes[i].count;
    }
    if (total != escapes) return Packed::other_escapes; // each has all of its own then: it had room for so many
    for (int i = 0; i < call.tasks; ++i) {
        const EscapeList &list = call.escapes[i];
        if (list.count == 0) continue;
        memcpy(columns, list.columns, static_cast<size_t>(4 * list.count)), columns += 4 * list.count;
        memcpy(values, list.values, static_cast<size_t>(2 * list.count)), values += 2 * list.count;
    }
    return Packed::done;
}

struct UnpackCall {
    const Level &level;
    const Unpacking &args;
    int64_t rows;
    int tasks;
};

void unpack_task(void *context, int index) {
    const UnpackCall &call = *static_cast<const UnpackCall *>(context);
    call.level.unpack(call.args, call.rows * index / call.tasks, call.rows * (index + 1) / call.tasks);
}

} // namespace

PackedLayout packed_layout(int64_t rows, int64_t columns, int64_t escapes) {
    const int64_t records = (columns + PACKED_RECORD - 1) / PACKED_RECORD;
    const int64_t table = rows * records * PACKED_RECORD_BYTES, pointers = table + PACKED_TABLE;
    if (escapes == 0) return {table, pointers, pointers, pointers, pointers};
    const int64_t listed = pointers + 4 * (rows + 1), values = listed + 4 * escapes;
    return {table, pointers, listed, values, values + 2 * escapes};
}

PackedRows packed_rows(const uint8_t *blob, int64_t rows, int64_t columns, int64_t escapes, int64_t begin) {
    const PackedLayout at = packed_layout(rows, columns, escapes);
    const int64_t row_bytes = (columns + PACKED_RECORD - 1) / PACKED_RECORD * PACKED_RECORD_BYTES;
    PackedRows packed = {blob, row_bytes, blob + at.table, nullptr, nullptr, nullptr, escapes, begin};
    if (escapes) packed.pointers = blob + at.pointers, packed.columns = blob + at.columns, packed.values = blob + at.values;
    return packed;
}

void launch_examine(const Level &level, const Numbers &args, int threads, HighBytes &found) {
    const int64_t count = args.rows * args.columns;
    ExamineCall call = {level, args, packing_tasks(count, count, threads), {}};
    parallel(call.tasks, examine_task, &call);
    found = call.found[0];
    for (int i = 1; i < call.tasks; ++i) {
        found.exact = found.exact && call.found[i].exact;
        for (int byte = 0; byte < 256; ++byte) found.counts[byte] += call.found[i].counts[byte];
    }
}

int64_t choose_table(const HighBytes &found, uint8_t *table) {
    HighBytes left = found;
    memset(table, 0, PACKED_TABLE);
    for (int code = 1; code < PACKED_TABLE; ++code) {
        int best = 0;
        for (int byte = 1; byte < 256; ++byte) best = left.counts[byte] > left.counts[best] ? byte : best;
        if (left.counts[best] == 0) break;
        table[code] = static_cast<uint8_t>(best);
        left.counts[best] = 0;
    }
    int64_t escapes = 0;
    for (int64_t count : left.counts) escapes += count;
    return escapes;
}

Packed launch_pack(const Level &level, const Numbers &args, const uint8_t *table, int64_t escapes, uint8_t *blob, int threads) {
    const PackedLayout at = packed_layout(args.rows, args.columns, escapes);
    memcpy(blob + at.table, table, PACKED_TABLE);
    const Packing packing = {args, table, blob, escapes ? blob + at.pointers : nullptr};
    PackCall call = {level, packing, nullptr, 0, packing_tasks(args.rows, args.rows * args.columns, threads), {}};
    const int64_t own = (args.rows + call.tasks - 1) / call.tasks * args.columns; // numbers of a task, at most
    call.most = escapes < own ? escapes : own;
    if (escapes) {
        call.lists = static_cast<uint8_t *>(allocate_aligned(static_cast<size_t>(call.tasks * call.most * ESCAPE_BYTES + 1)));
        if (!call.lists) return Packed::no_memory;
    }
    parallel(call.tasks, pack_task, &call);
    const Packed outcome = gather(call, escapes, blob + at.columns, blob + at.values);
    if (escapes) add_up(blob + at.pointers, args.rows);
    free_aligned(call.lists);
    return outcome;
}

void launch_unpack(const Level &level, const Unpacking &args, int64_t rows, int threads) {
    UnpackCall call = {level, args, rows, packing_tasks(rows, rows * args.width, threads)};
    parallel(call.tasks, unpack_task, &call);
}

Damage look_through(const uint8_t *blob, int64_t rows, int64_t columns, int64_t escapes, int64_t &found) {
    const PackedLayout at = packed_layout(rows, columns, escapes);
    if ((found = blob[at.table]) != 0) return Damage::table;
    if (escapes == 0) return Damage::none;
    const uint8_t *pointers = blob + at.pointers, *places = blob + at.columns;
    bool ordered = read_32(pointers, 0) == 0 && read_32(pointers, rows) == escapes;
    for (int64_t row = 0; ordered && row < rows; ++row) ordered = read_32(pointers, row) <= read_32(pointers, row + 1);
    if (!ordered) return Damage::pointers;
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = read_32(pointers, row), end = read_32(pointers, row + 1), before = -1; i < end; ++i) {
            if ((found = read_32(places, i)) >= columns) return Damage::outside;
            if (found <= before) return Damage::order;
            before = found;
        }
    }
    return Damage::none;
}

} // namespace upcast
