// Packed matrices as blobs of bytes: where their parts are, packing, unpacking and looking them through. No Python.
#pragma once

#include "runtime/launch.hpp"

namespace upcast {

// Bytes from the beginning of a blob to its parts, and to its end; kernels/packed_matrix.py has the format.
struct PackedLayout {
    int64_t table, pointers, columns, values, end;
};

constexpr int64_t PACKED_RECORD = 64, PACKED_RECORD_BYTES = 96, PACKED_TABLE = 16;

// The sizes are at least 0 and their products do not overflow.
PackedLayout packed_layout(int64_t rows, int64_t columns, int64_t escapes);
PackedRows packed_rows(const uint8_t *blob, int64_t rows, int64_t columns, int64_t escapes, int64_t begin);

void launch_examine(const Level &level, const Numbers &args, int threads, HighBytes &found);

// The table that belongs to these counts, and how many numbers escape it.
int64_t choose_table(const HighBytes &found, uint8_t *table);

// What came of packing numbers into a blob with room for `escapes`.
enum class Packed { done, no_memory, inexact, other_escapes };
Packed launch_pack(const Level &level, const Numbers &args, const uint8_t *table, int64_t escapes, uint8_t *blob, int threads);

void launch_unpack(const Level &level, const Unpacking &args, int64_t rows, int threads);

// What is wrong with a blob of the right size, and the number that was found.
enum class Damage { none, table, pointers, outside, order };
Damage look_through(const uint8_t *blob, int64_t rows, int64_t columns, int64_t escapes, int64_t &found);

} // namespace upcast
