// What a level offers: plain functions over raw pointers, no Python and no torch.
//
// Each operation is cut into numbered tasks that may run in any order and at the same time. Operations
// with two phases need every task of the first to be over before the second starts. Strides count
// elements. Sizes may be zero unless said otherwise; pointers to empty data may be null.
#pragma once

#include <stddef.h>
#include <stdint.h>

// Members used by several levels must leave no copy of their own for the linker to choose among.
#define UPCAST_ALWAYS_INLINE inline __attribute__((always_inline))

namespace upcast {

// Rows of bfloat16 numbers in 12 bits each; the format is told in kernels/packed_matrix.py. Nothing of it is aligned.
// Nor is anything believed: whatever the lists of escapes say, no kernel reads or writes elsewhere.
struct PackedRows {
    const uint8_t *records; // null where the numbers are float16
    int64_t row_bytes;
    const uint8_t *table;                       // 16 high bytes
    const uint8_t *pointers, *columns, *values; // uint32, uint32, uint16; null where nothing escapes
    int64_t escapes;
    int64_t first; // of the rows in use
};

// y[m][n] = sum_k x[m][k] * w(n, k) + bias[n] + residual[m][n]
// w(n, k) is w[n * ldw + k], or w[k * ldw + n] when transposed; of packed rows, number k of row n, or n of row k. bias
// and residual may be null.
struct Linear {
    const float *x;
    int64_t ldx;
    const uint16_t *w;
    int64_t ldw;
    bool transposed;
    const float *bias;
    const float *residual;
    int64_t ldr;
    float *y;
    int64_t ldy;
    int64_t M, N, K;
    PackedRows packed; // in place of w
};

// The instruction sets that there are kernels for; UPCAST_LEVEL has these numbers while one of them is compiled.
enum class Isa { any = 0, x86_64 = 1, x86_64_v3 = 3, x86_64_v4 = 4, x86_64_v4_amx = 5, x86_64_v4_amx_fp16 = 6, aarch64 = 64 };

// How rows of weights come from memory fastest: one after the other, several neighbours at once, or several far apart.
enum class Reading { one_stream, near_streams, far_streams };

enum class Strategy { dot, panel, axpy, tiles, packed };

// How one Linear is carried out: tasks per phase and bytes of shared scratch (64-byte aligned).
struct LinearPlan {
    Strategy strategy;
    int tasks[2];
    int grid_n, grid_m;   // how the tasks divide the output
    int64_t block;        // panel: length of a block of K
    Reading reading;      // dot: set by the caller, who knows the processor
    size_t scratch;
};

// out[i] = table[indices[i]] widened; indices were checked by the caller.
struct Embedding {
    const uint16_t *table;
    int64_t ld;
    const int64_t *indices;
    float *out;
    int64_t count, width;
    PackedRows packed; // in place of table
};

// Numbers to pack, one row after the other, and what examining them counts.
enum class Number { bfloat16, float16, float32 };

struct Numbers {
    const void *data;
    Number type;
    int64_t rows, columns;
};

struct HighBytes {
    int64_t counts[256]; // of all but +0.0
    bool exact;          // each number is a bfloat16
};

// Packed rows to write, and where escapes of rows [begin, end) go: they are counted at pointers + 4 * row, and listed
// as far as there is room.
struct Packing {
    Numbers from;
    const uint8_t *table;
    uint8_t *records;
    uint8_t *pointers; // or null
};

struct EscapeList {
    uint8_t *columns, *values;
    int64_t room, count;
    bool exact;
};

// Packed rows in bfloat16 or float32, `width` numbers each.
struct Unpacking {
    PackedRows packed;
    void *out;
    bool wide;
    int64_t width;
};

// out = (x - mean) / sqrt(variance + eps) * (weight + offset) + bias over each row; without centring the
// mean counts as zero (RMSNorm). weight and bias may be null.
struct Norm {
    const float *x;
    int64_t ld;
    const float *weight, *bias;
    float eps, offset;
    bool centred;
    float *out;
    int64_t rows, width;
};

enum class Activation { silu, gelu, gelu_tanh };

// out = activation(gate) * up
struct Gated {
    const float *gate, *up;
    int64_t ld_gate, ld_up;
    Activation activation;
    float *out;
    int64_t rows, width;
};

// Rotary embedding of the first `turned` (even) of `width` elements of x [batch, heads, time, width];
// out is contiguous. cosine and sine are [batch or 1, time, turned].
struct Rope {
    const float *x;
    int64_t batch_stride, head_stride, time_stride;
    const float *cosine, *sine;
    int64_t angle_batch, angle_time, sine_batch, sine_time;
    bool interleaved;
    float *out;
    int64_t heads, time, width, turned;
};

// Rows of `width` floats, [batch, heads, time], into positions `start` onwards of a cache.
struct Append {
    const float *from;
    int64_t from_batch, from_head, from_time;
    void *to;
    int64_t to_batch, to_head, to_time;
    bool wide; // the cache is float32, otherwise float16
    int64_t heads, time, start, width;
    float limit; // the largest root mean square of a position that a float16 cache takes, over all heads; 0 for any

    UPCAST_ALWAYS_INLINE const float *from_row(int64_t row) const {
        return from + row / time / heads * from_batch + row / time % heads * from_head + row % time * from_time;
    }
    template <class Element> UPCAST_ALWAYS_INLINE Element *to_row(int64_t row) const {
        return static_cast<Element *>(to) + row / time / heads * to_batch + row / time % heads * to_head +
               (start + row % time) * to_time;
    }
};

// Query head h of `kv_heads * group` reads head h / group of the cache, positions 0 .. start + time - 1.
// Query t stands at position start + t. window: positions seen including its own, 0 for all. softcap: 0
// for none. first: the first position that a row of the batch sees, or null for all; each query sees one at
// least. out is contiguous [batch, time, heads, value_width].
struct Attention {
    const float *queries;
    int64_t query_batch, query_head, query_time;
    const void *keys, *values;
    int64_t key_batch, key_head, key_stride, value_batch, value_head, value_stride;
    bool wide; // the caches are float32, otherwise float16
    float *out;
    int64_t batch, kv_heads, group, time, start, width, value_width;
    float scale, softcap;
    int64_t window;
    bool causal;
    const int64_t *first;
};

struct AttentionPlan {
    int64_t rows;     // queries of a unit, at most
    int64_t span;     // positions with a softmax of their own
    int64_t parts;    // of the positions: all of them, or one span each; joined in the second phase
    int units;        // of work in the first phase
    int64_t work;     // multiply-adds
    int64_t own;      // floats of scratch per task of the first phase
    int64_t partials; // floats shared by all tasks
};

// Numbers to look at, float32 or float16, and where they go in float16 (if they are rounded; may be null).
struct Survey {
    const float *wide;
    const uint16_t *halves; // instead
    bool rounds;            // find max_error too; float32 only
    uint16_t *out;
};

// What they are, and what float16 does to them. Adding up is exact, so the cut into tasks changes nothing.
struct Surveyed {
    float largest;   // magnitude of a finite number
    float max_error; // of rounding, over the numbers in range
    int64_t nonfinite, out_of_range, nonzero, flushed;
};

struct Level {
    Isa isa;
    const char *name;
    LinearPlan (*plan_linear)(const Linear &, int threads);
    void (*linear)(const Linear &, const LinearPlan &, void *scratch, int phase, int task);
    // The rest work on any range of their rows (attention_join: of its queries).
    void (*embedding)(const Embedding &, int64_t begin, int64_t end);
    void (*norm)(const Norm &, int64_t begin, int64_t end);
    void (*gated)(const Gated &, int64_t begin, int64_t end);
    void (*rope)(const Rope &, int64_t begin, int64_t end);
    bool (*refuses)(const Append &, int64_t begin, int64_t end); // for positions of all batch entries
    void (*append)(const Append &, int64_t begin, int64_t end);
    AttentionPlan (*plan_attention)(const Attention &, int threads);
    void (*attention)(const Attention &, const AttentionPlan &, float *scratch, float *partials, int unit);
    void (*attention_join)(const Attention &, const AttentionPlan &, float *partials, int64_t begin, int64_t end);
    Surveyed (*survey)(const Survey &, int64_t begin, int64_t end);
    void (*examine)(const Numbers &, int64_t begin, int64_t end, HighBytes &); // adds; of numbers, not of rows
    void (*pack)(const Packing &, int64_t begin, int64_t end, EscapeList &);
    void (*unpack)(const Unpacking &, int64_t begin, int64_t end);
    // What the processor does at most, for benchmarks: simd/limits.hpp.
    int64_t (*multiply_adds)(int64_t rounds);
    int32_t (*read_memory)(const float *data, int64_t count, int64_t streams);
};

// Defined by the levels that were built; which ones is told to dispatch.cpp by UPCAST_HAVE_*.
const Level &kernels_x86_64_v4_amx_fp16();
bool amx_fp16_works(); // tries it, where the processor says that it has it
const Level &kernels_x86_64_v4_amx();
const Level &kernels_x86_64_v4();
const Level &kernels_x86_64_v3();
const Level &kernels_x86_64();
const Level &kernels_aarch64();

} // namespace upcast
