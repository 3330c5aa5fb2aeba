#include "block.hpp"

#include "threads.hpp"

#include <stdlib.h>

namespace upcast {
namespace {

// Floats between the operations of a block, in one allocation.
class Workspace {
  public:
    explicit Workspace(const Block &b) : rows_(b.batch * b.time) {
        const int64_t heads = b.heads * b.head_width, groups = b.groups * b.head_width;
        const int64_t parts[] = {b.width, b.width, b.width, heads + 2 * groups, heads, groups, heads,
                                 b.gate.rows, b.gate.rows};
        float **pointers[] = {&normed, &middle, &branch, &qkv, &queries, &keys, &attended, &gate, &up};
        int64_t total = 0;
        for (int64_t part : parts) total += padded(part);
        void *data = nullptr;
        if (posix_memalign(&data, 64, sizeof(float) * static_cast<size_t>(total + LINE)) != 0) data = nullptr;
        data_ = static_cast<float *>(data);
        int64_t at = 0;
        for (int i = 0; data && i < 9; ++i) {
            *pointers[i] = data_ + at;
            at += padded(parts[i]);
        }
    }
    ~Workspace() { free(data_); }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;
    bool failed() const { return !data_; }
    int64_t rows() const { return rows_; }

    float *normed, *middle, *branch, *qkv, *queries, *keys, *attended, *gate, *up;

  private:
    static constexpr int64_t LINE = 16;
    int64_t padded(int64_t width) const { return (rows_ * width + LINE - 1) / LINE * LINE; }
    int64_t rows_;
    float *data_;
};

class Run {
  public:
    Run(const Level &level, const Block &block, int threads)
        : level_(level), b_(block), threads_(threads), own_(block) {}

    BlockOutcome run() {
        if (own_.failed()) return BlockOutcome::no_memory;
        const bool last = b_.part == BlockPart::attention;
        const float *input = b_.x, *middle = nullptr;
        if (b_.part != BlockPart::mlp) {
            input = norm(b_.norm_1, b_.x, own_.normed);
            if (!attend(input)) return BlockOutcome::overflow;
            const float *from = b_.part == BlockPart::whole ? b_.x : nullptr;
            residual(b_.proj, b_.post_attention, own_.attended, from, last ? b_.out : own_.middle);
            middle = own_.middle;
        }
        if (!last) {
            if (!b_.shared) input = norm(b_.norm_2, b_.parallel || !middle ? b_.x : middle, own_.normed);
            else if (!middle) input = norm(b_.norm_1, b_.x, own_.normed);
            hidden(input);
            residual(b_.down, b_.post_mlp, own_.gate, middle, b_.out);
        }
        return failed_ ? BlockOutcome::no_memory : BlockOutcome::done;
    }

  private:
    // Attention up to its last matrix, left in own_.attended; false where the cache does not take a value.
    bool attend(const float *x) {
        project(x);
        norm_heads(b_.norm_q, 0, b_.heads);
        norm_heads(b_.norm_k, b_.heads, b_.groups);
        rope(0, b_.heads, own_.queries);
        rope(b_.heads, b_.groups, own_.keys);
        if (b_.keys && !append()) return false;
        attention();
        return true;
    }

    int64_t qkv_width() const { return (b_.heads + 2 * b_.groups) * b_.head_width; }

    // The rows of x normalised into `out`, or x itself where there is no norm.
    const float *norm(const BlockNorm &norm, const float *x, float *out) {
        if (norm.kind == NormKind::none) return x;
        const Norm call = {x, b_.width, norm.weight, norm.bias, norm.eps, norm.offset, norm.kind == NormKind::layer,
                           out, own_.rows(), b_.width};
        launch_norm(level_, call, threads_);
        return out;
    }

    void linear(const Matrix &m, const float *x, float *y, const float *residual) { into(m, x, y, m.rows, residual); }

    // As `linear`, the rows of y `stride` apart.
    void into(const Matrix &m, const float *x, float *y, int64_t stride, const float *residual) {
        const Linear call = {x, m.columns, m.weight, m.stride, false, m.bias, residual, m.rows, y, stride,
                             own_.rows(), m.rows, m.columns};
        failed_ |= launch_linear(level_, call, threads_) != Outcome::done;
    }

    // The queries, keys and values of a position, side by side.
    void project(const float *x) {
        float *keys = own_.qkv + b_.heads * b_.head_width, *values = keys + b_.groups * b_.head_width;
        into(b_.qkv, x, own_.qkv, qkv_width(), nullptr);
        if (!b_.key.weight) return;
        into(b_.key, x, keys, qkv_width(), nullptr);
        into(b_.value, x, values, qkv_width(), nullptr);
    }

    // out = from + post(matrix x); the residual is added after the sum over K, which keeps its accuracy. Without a norm
    // `from` may be null.
    void residual(const Matrix &matrix, const BlockNorm &post, const float *x, const float *from, float *out) {
        if (post.kind == NormKind::none) return linear(matrix, x, out, from);
        linear(matrix, x, own_.branch, nullptr);
        norm(post, own_.branch, own_.branch);
        for (int64_t i = 0; i < own_.rows() * b_.width; ++i) out[i] = own_.branch[i] + from[i];
    }

    // Normalises `count` heads from `first` on of every position, in place.
    void norm_heads(const BlockNorm &norm, int64_t first, int64_t count) {
        if (norm.kind == NormKind::none) return;
        const int64_t width = b_.norm_heads ? b_.head_width : count * b_.head_width;
        for (int64_t row = 0; row < own_.rows(); ++row) {
            float *x = own_.qkv + row * qkv_width() + first * b_.head_width;
            const Norm call = {x, width, norm.weight, norm.bias, norm.eps, norm.offset, norm.kind == NormKind::layer,
                               x, b_.norm_heads ? count : 1, width};
            level_.norm(call, 0, call.rows);
        }
    }

    void rope(int64_t first, int64_t count, float *out) {
        const Rope call = {own_.qkv + first * b_.head_width, b_.time * qkv_width(), b_.head_width, qkv_width(),
                           b_.cosine, b_.sine, b_.cosine_batch, b_.cosine_stride, b_.sine_batch, b_.sine_stride, false,
                           out, count, b_.time, b_.head_width, b_.turned};
        launch_rope(level_, call, own_.rows() * count, threads_);
    }

    const float *new_values() const { return own_.qkv + (b_.heads + b_.groups) * b_.head_width; }

    bool append() {
        const int64_t rows = own_.rows() * b_.groups, head = b_.time * b_.head_width;
        const Append keys = {own_.keys, b_.groups * head, head, b_.head_width, b_.keys, b_.key_batch, b_.key_head,
                             b_.key_stride, b_.wide, b_.groups, b_.time, b_.write, b_.head_width};
        const Append values = {new_values(), b_.time * qkv_width(), b_.head_width, qkv_width(), b_.values,
                               b_.value_batch, b_.value_head, b_.value_stride, b_.wide, b_.groups, b_.time, b_.write,
                               b_.head_width};
        return launch_append(level_, keys, rows, threads_) && launch_append(level_, values, rows, threads_);
    }

    void attention() {
        const int64_t head = b_.time * b_.head_width;
        Attention call = {};
        call.queries = own_.queries;
        call.query_batch = b_.heads * head;
        call.query_head = head;
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
        call.time = b_.time;
        call.start = b_.start;
        call.width = call.value_width = b_.head_width;
        call.scale = b_.scale;
        call.softcap = b_.softcap;
        call.window = b_.window;
        call.causal = true;
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
        linear(b_.gate, x, own_.gate, nullptr);
        if (b_.up.weight) linear(b_.up, x, own_.up, nullptr);
        else for (int64_t i = 0; i < b_.gate.rows; ++i) own_.up[i] = 1.0f;
        const Gated call = {own_.gate, own_.up, b_.gate.rows, b_.up.weight ? b_.gate.rows : 0, b_.activation,
                            own_.gate, own_.rows(), b_.gate.rows};
        launch_gated(level_, call, threads_);
    }

    const Level &level_;
    const Block &b_;
    const int threads_;
    Workspace own_;
    bool failed_ = false;
};

struct Call {
    Run run;
    BlockOutcome outcome;
};

void run_call(void *context) {
    Call &call = *static_cast<Call *>(context);
    call.outcome = call.run.run();
}

} // namespace

BlockOutcome launch_block(const Level &level, const Block &block, int threads) {
    if (block.batch * block.time == 0) return BlockOutcome::done;
    Call call = {Run(level, block, threads), BlockOutcome::done};
    together(threads, run_call, &call);
    return call.outcome;
}

} // namespace upcast
