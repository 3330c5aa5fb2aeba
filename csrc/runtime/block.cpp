#include "runtime/block.hpp"

#include "runtime/system.hpp"
#include "runtime/threads.hpp"

#include <string.h>

namespace upcast {
namespace {

// Floats between the operations of a block, in one allocation.
class Workspace {
  public:
    explicit Workspace(const Block &b) {
        const int64_t heads = b.heads * b.head_width, groups = b.groups * b.head_width;
        const int64_t rows = b.batch * b.time, last = b.last < b.time ? b.batch * b.last : 0;
        const int64_t parts[] = {rows * b.width,  rows * b.width,     rows * b.width,     rows * (heads + 2 * groups),
                                 rows * heads,    rows * groups,      rows * heads,       rows * b.gate.rows,
                                 rows * b.gate.rows, last * b.width, last * b.width};
        float **pointers[] = {&normed, &middle, &branch, &qkv, &queries, &keys, &attended, &gate, &up, &last_x,
                              &last_normed};
        constexpr int count = sizeof parts / sizeof *parts;
        int64_t total = 0;
        for (int64_t part : parts) total += padded(part);
        void *data = allocate_aligned(sizeof(float) * static_cast<size_t>(total + LINE));
        data_ = static_cast<float *>(data);
        int64_t at = 0;
        for (int i = 0; data && i < count; ++i) {
            *pointers[i] = data_ + at;
            at += padded(parts[i]);
        }
    }
    ~Workspace() { free_aligned(data_); }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;
    bool failed() const { return !data_; }

    float *normed, *middle, *branch, *qkv, *queries, *keys, *attended, *gate, *up, *last_x, *last_normed;

  private:
    static constexpr int64_t LINE = 16;
    static int64_t padded(int64_t floats) { return (floats + LINE - 1) / LINE * LINE; }
    float *data_;
};

// Heads of the queries or of the keys of `time` positions, those of one position side by side.
struct Heads {
    float *data;
    int64_t stride, count, time;
};

class Run {
  public:
    Run(const Level &level, const Block &block, int threads)
        : level_(level), b_(block), threads_(threads), x_(block.x), time_(block.time), own_(block) {}

    BlockOutcome run() {
        if (own_.failed()) return BlockOutcome::no_memory;
        const bool over = b_.part == BlockPart::attention;
        const float *input = b_.x, *middle = nullptr;
        if (b_.part != BlockPart::mlp) {
            input = norm(b_.norm_1, b_.x, own_.normed);
            if (!attend(input)) return BlockOutcome::overflow;
            const float *from = b_.part == BlockPart::whole ? x_ : nullptr;
            residual(b_.proj, b_.post_attention, own_.attended, from, over ? b_.out : own_.middle);
            middle = own_.middle;
        }
        if (!over) {
            if (!b_.shared) input = norm(b_.norm_2, b_.parallel || !middle ? x_ : middle, own_.normed);
            else if (!middle) input = norm(b_.norm_1, x_, own_.normed);
            hidden(input);
            residual(b_.down, b_.post_mlp, own_.gate, middle, b_.out);
        }
        return failed_ ? BlockOutcome::no_memory : BlockOutcome::done;
    }

  private:
    // Attention up to its last matrix, left in own_.attended; false where the cache does not take a value. Where only
    // the last positions go on, keys and values are still of all, and x becomes theirs.
    bool attend(const float *&x) {
        const bool all = b_.last == b_.time;
        if (all) project(x);
        else project_keys(x);
        const Heads keys = {own_.qkv + query_width(), qkv_width(), b_.groups, b_.time};
        norm_heads(b_.norm_k, keys);
        rope(keys, own_.keys);
        if (b_.keys && !append()) return false;
        Heads queries = {own_.qkv, qkv_width(), b_.heads, b_.time};
        if (!all) {
            x_ = keep_last(x_, own_.last_x), x = keep_last(x, own_.last_normed);
            time_ = b_.last;
            queries = {own_.attended, query_width(), b_.heads, b_.last}; // which attention reads no more when it writes
            into(part_of(b_.qkv, 0, query_width()), x, queries.data, queries.stride, nullptr);
        }
        norm_heads(b_.norm_q, queries);
        rope(queries, own_.queries);
        attention();
        return true;
    }

    // The rows of the last positions of every sequence, copied to `out`.
    const float *keep_last(const float *rows, float *out) const {
        const int64_t part = b_.last * b_.width, skipped = (b_.time - b_.last) * b_.width;
        for (int64_t i = 0; i < b_.batch && part; ++i)
            memcpy(out + i * part, rows + i * b_.time * b_.width + skipped, sizeof(float) * static_cast<size_t>(part));
        return out;
    }

    // How many rows are worked on.
    int64_t rows() const { return b_.batch * time_; }
    int64_t query_width() const { return b_.heads * b_.head_width; }
    int64_t qkv_width() const { return (b_.heads + 2 * b_.groups) * b_.head_width; }

    // The rows of x normalised into `out`, or x itself where there is no norm.
    const float *norm(const BlockNorm &norm, const float *x, float *out) {
        if (norm.kind == NormKind::none) return x;
        launch_norm(level_, norm_of(norm, x, out, rows(), b_.width), threads_);
        return out;
    }

    void linear(const Matrix &m, const float *x, float *y, const float *residual) { into(m, x, y, m.rows, residual); }

    // As `linear`, the rows of y `stride` apart.
    void into(const Matrix &m, const float *x, float *y, int64_t stride, const float *residual) {
        failed_ |= launch_linear(level_, product_of(m, x, y, stride, residual, rows()), threads_) != Outcome::done;
    }

    // The queries, keys and values of a position, side by side.
    void project(const float *x) {
        into(b_.qkv, x, own_.qkv, qkv_width(), nullptr);
        if (b_.key.present()) project_keys(x);
    }

    // The keys and values where `project` puts them.
    void project_keys(const float *x) {
        float *keys = own_.qkv + query_width();
        if (!b_.key.present()) {
            return into(part_of(b_.qkv, query_width(), qkv_width()), x, keys, qkv_width(), nullptr);
        }
        into(b_.key, x, keys, qkv_width(), nullptr);
        into(b_.value, x, keys + b_.groups * b_.head_width, qkv_width(), nullptr);
    }

    static Matrix part_of(Matrix m, int64_t begin, int64_t end) {
        if (m.weight) m.weight += begin * m.stride;
        m.packed.first += begin, m.rows = end - begin;
        if (m.bias) m.bias += begin;
        return m;
    }

    // out = from + post(matrix x); the residual is added after the sum over K, which keeps its accuracy. Without a norm
    // `from` may be null.
    void residual(const Matrix &matrix, const BlockNorm &post, const float *x, const float *from, float *out) {
        if (post.kind == NormKind::none) return linear(matrix, x, out, from);
        linear(matrix, x, own_.branch, nullptr);
        norm(post, own_.branch, own_.branch);
        for (int64_t i = 0; i < rows() * b_.width; ++i) out[i] = own_.branch[i] + from[i];
    }

    // Normalises the heads of every position, in place.
    void norm_heads(const BlockNorm &norm, const Heads &heads) {
        if (norm.kind == NormKind::none) return;
        const int64_t width = b_.norm_heads ? b_.head_width : heads.count * b_.head_width;
        for (int64_t row = 0; row < b_.batch * heads.time; ++row) {
            float *x = heads.data + row * heads.stride;
            const Norm call = {x, width, norm.weight, norm.bias, norm.eps, norm.offset, norm.kind == NormKind::layer,
                               x, b_.norm_heads ? heads.count : 1, width};
            level_.norm(call, 0, call.rows);
        }
    }

    void rope(const Heads &heads, float *out) {
        const int64_t first = b_.time - heads.time;
        const Rope call = {heads.data, heads.time * heads.stride, b_.head_width, heads.stride,
                           b_.cosine + first * b_.cosine_stride, b_.sine + first * b_.sine_stride,
                           b_.cosine_batch, b_.cosine_stride, b_.sine_batch, b_.sine_stride, false,
                           out, heads.count, heads.time, b_.head_width, b_.turned};
        launch_rope(level_, call, b_.batch * heads.time * heads.count, threads_);
    }

    const float *new_values() const { return own_.qkv + (b_.heads + b_.groups) * b_.head_width; }

    bool append() {
        const int64_t heads = rows() * b_.groups, head = b_.time * b_.head_width;
        const Append keys = {own_.keys, b_.groups * head, head, b_.head_width, b_.keys, b_.key_batch, b_.key_head,
                             b_.key_stride, b_.wide, b_.groups, b_.time, b_.write, b_.head_width, b_.key_limit};
        const Append values = {new_values(), b_.time * qkv_width(), b_.head_width, qkv_width(), b_.values,
                               b_.value_batch, b_.value_head, b_.value_stride, b_.wide, b_.groups, b_.time, b_.write,
                               b_.head_width, b_.value_limit};
        return launch_append(level_, keys, heads, threads_) && launch_append(level_, values, heads, threads_);
    }

    void attention() {
        const int64_t head = b_.time * b_.head_width, query_head = time_ * b_.head_width;
        Attention call = {};
        call.queries = own_.queries;
        call.query_batch = b_.heads * query_head;
        call.query_head = query_head;
        call.query_time = b_.head_width;
        call.keys = own_.keys;
        call.values = new_values();
        call.key_batch = b_.groups * head;
        call.key_head = head;
        call.key_stride = b_.head_width;
        call.value_batch = b_.time * qkv_width();
        call.value_head = b_.head_width;
        call.value_stride = qkv_width();
        call.wide = true;
        if (b_.keys) use_cache(call);
        call.out = own_.attended;
        call.batch = b_.batch;
        call.kv_heads = b_.groups;
        call.group = b_.heads / b_.groups;
        call.time = time_;
        call.start = b_.start + b_.time - time_;
        call.width = call.value_width = b_.head_width;
        call.scale = b_.scale;
        call.softcap = b_.softcap;
        call.window = b_.window;
        call.causal = true;
        call.first = b_.first;
        failed_ |= launch_attention(level_, call, threads_) != Outcome::done;
    }

    void use_cache(Attention &call) const {
        call.keys = b_.keys;
        call.values = b_.values;
        call.key_batch = b_.key_batch;
        call.key_head = b_.key_head;
        call.key_stride = b_.key_stride;
        call.value_batch = b_.value_batch;
        call.value_head = b_.value_head;
        call.value_stride = b_.value_stride;
        call.wide = b_.wide;
    }

    // The MLP up to its last matrix, left in own_.gate. Without a gate every activation is multiplied by one.
    void hidden(const float *x) {
        const int64_t width = b_.gate.rows;
        const bool gates = b_.up.present();
        for (int64_t i = 0; i < width && !gates; ++i) own_.up[i] = 1.0f;
        const Linear gate = product_of(b_.gate, x, own_.gate, width, nullptr, rows());
        const Linear up = product_of(b_.up, x, own_.up, width, nullptr, rows());
        const Gated call = {own_.gate, own_.up, width, gates ? width : 0, b_.activation, own_.gate, rows(), width};
        failed_ |= launch_hidden(level_, gate, gates ? &up : nullptr, call, threads_) != Outcome::done;
    }

    const Level &level_;
    const Block &b_;
    const int threads_;
    const float *x_; // the rows that are worked on, `time_` positions of every sequence
    int64_t time_;
    Workspace own_;
    bool failed_ = false;
};

struct Call {
    const Level &level;
    const Block *blocks;
    int64_t count;
    const Finish *finish;
    int threads;
    int64_t done;
    BlockOutcome outcome;
};

BlockOutcome give_logits(const Level &level, const Block &last, const Finish &finish, int threads) {
    const int64_t rows = last.batch * last.last, width = last.width;
    float *normed = last.out;
    void *room = nullptr;
    if (finish.norm.kind != NormKind::none) {
        room = allocate_aligned(sizeof(float) * static_cast<size_t>(rows * width));
        if (!room) return BlockOutcome::no_memory;
        normed = static_cast<float *>(room);
        launch_norm(level, norm_of(finish.norm, last.out, normed, rows, width), threads);
    }
    const Linear product = product_of(finish.head, normed, finish.logits, finish.head.rows, nullptr, rows);
    const Outcome outcome = launch_linear(level, product, threads);
    free_aligned(room);
    return outcome == Outcome::done ? BlockOutcome::done : BlockOutcome::no_memory;
}

void run_call(void *context) {
    Call &call = *static_cast<Call *>(context);
    for (; call.done < call.count; ++call.done) {
        call.outcome = Run(call.level, call.blocks[call.done], call.threads).run();
        if (call.outcome != BlockOutcome::done) return;
    }
    if (call.finish) call.outcome = give_logits(call.level, call.blocks[call.count - 1], *call.finish, call.threads);
}

} // namespace

BlockOutcome launch_block(const Level &level, const Block &block, int threads) {
    int64_t done;
    return launch_blocks(level, &block, 1, nullptr, threads, done);
}

BlockOutcome launch_blocks(const Level &level, const Block *blocks, int64_t count, const Finish *finish, int threads,
                           int64_t &done) {
    done = count;
    if (count == 0 || blocks->batch * blocks->last == 0) return BlockOutcome::done;
    Call call = {level, blocks, count, finish, threads, 0, BlockOutcome::done};
    together(threads, run_call, &call);
    done = call.done;
    return call.outcome;
}

} // namespace upcast
