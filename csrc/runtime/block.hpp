// One transformer block over the thread pool: norm, attention, residual, norm, MLP, residual.
#pragma once

#include "runtime/layers.hpp"

namespace upcast {

// A block divided between processes runs in parts, whose results the processes add up before anything else: the branch
// of attention or of the MLP alone, or both branches of a parallel block, without residual and without post norms.
enum class BlockPart { whole, attention, mlp, both };

// Sequential: h = x + post_attention(attention(norm_1(x))), out = h + post_mlp(mlp(norm_2(h))).
// Parallel: the MLP reads norm_2(x), or norm_1(x) when shared. x is contiguous [batch, time, width], out is contiguous
// [batch, last, width]: of all positions, or of a whole block's last ones. Keys and values are of all in any case.
struct Block {
    BlockPart part;
    const float *x;
    float *out;
    int64_t batch, time, last, width;
    // key and value are absent where qkv holds all three, one after the other; else qkv is the query's.
    Matrix qkv, key, value, proj, gate, up, down; // up is absent in an MLP without gate
    BlockNorm norm_1, norm_2, post_attention, post_mlp, norm_q, norm_k;
    bool norm_heads; // norm_q and norm_k work on each head, not on all heads of a position at once
    bool parallel, shared;
    Activation activation;
    int64_t heads, groups, head_width;
    const float *cosine, *sine; // [batch, time, turned]; a batch stride of 0 for the same angles in all rows
    int64_t cosine_batch, cosine_stride, sine_batch, sine_stride, turned;
    // Where keys and values are kept; without a cache both are null and attention is over the new positions.
    void *keys, *values;
    int64_t key_batch, key_head, key_stride, value_batch, value_head, value_stride;
    bool wide; // the cache is float32, otherwise float16
    float key_limit, value_limit; // the limits of Append
    int64_t start, write; // the position of the first query, and where the cache takes it
    const int64_t *first; // [batch]: the first position that each row sees; null for all
    float scale, softcap;
    int64_t window;
};

// What follows the last block: its output normalised, and multiplied by a matrix [vocabulary, width].
struct Finish {
    BlockNorm norm;
    Matrix head;
    float *logits; // [rows, vocabulary]
};

// overflow: the float16 cache does not take keys or values; nothing but the cache was written.
enum class BlockOutcome { done, no_memory, overflow };

BlockOutcome launch_block(const Level &level, const Block &block, int threads);

// Blocks of one batch, one after the other; `done` of them were, whatever the outcome. `finish` may be null; it follows
// if all of them were.
BlockOutcome launch_blocks(const Level &level, const Block *blocks, int64_t count, const Finish *finish, int threads,
                           int64_t &done);

} // namespace upcast
