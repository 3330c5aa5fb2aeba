// One transformer block against the same in double precision: norms, rope, cache, grouped heads, both residuals.
#include "runtime/block.cpp"
#include "runtime/launch.cpp"
#include "runtime/system.cpp"
#include "runtime/threads.cpp"
#include "runtime/tuning.hpp"

namespace upcast {
Tuning tuning(Isa) { return {static_cast<Reading>(below(3)), 0}; }
} // namespace upcast

namespace {

typedef Buffer<double> Doubles;

// rows of x normalised: centred and with bias for a layer norm.
void exact_norm(const BlockNorm &norm, const Doubles &x, int64_t rows, int64_t width, Doubles &out) {
    for (int64_t r = 0; r < rows; ++r) {
        const double *in = x.data + r * width;
        double mean = 0, square = 0;
        for (int64_t i = 0; norm.kind == NormKind::layer && i < width; ++i) mean += in[i] / static_cast<double>(width);
        for (int64_t i = 0; i < width; ++i) square += (in[i] - mean) * (in[i] - mean) / static_cast<double>(width);
        for (int64_t i = 0; i < width; ++i) {
            const double scaled = (in[i] - mean) / sqrt(square + norm.eps) * (norm.weight[i] + norm.offset);
            out[r * width + i] = norm.kind == NormKind::none ? in[i] : scaled + (norm.bias ? norm.bias[i] : 0.0f);
        }
    }
}

void exact_linear(const Matrix &m, const Doubles &x, int64_t rows, Doubles &y) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < m.rows; ++n) {
            double sum = m.bias ? m.bias[n] : 0.0f;
            for (int64_t k = 0; k < m.columns; ++k) sum += x[r * m.columns + k] * half(m.weight[n * m.stride + k]);
            y[r * m.rows + n] = sum;
        }
    }
}

// Turns the first `turned` elements of every head of row `r`, which stands at position r.
void exact_rope(const Block &b, double *head, int64_t r) {
    for (int64_t i = 0; i < b.turned / 2; ++i) {
        const double c = b.cosine[r * b.cosine_stride + i], s = b.sine[r * b.sine_stride + i];
        const double low = head[i], high = head[i + b.turned / 2];
        head[i] = low * c - high * s, head[i + b.turned / 2] = high * c + low * s;
    }
}

// Without a cache: causal attention over the block's own positions.
void exact_attention(const Block &b, const Doubles &qkv, Doubles &out) {
    const int64_t D = b.head_width, width = (b.heads + 2 * b.groups) * D;
    for (int64_t h = 0; h < b.heads; ++h) {
        const int64_t group = h / (b.heads / b.groups);
        for (int64_t t = 0; t < b.time; ++t) {
            double total = 0;
            Doubles sums(D);
            for (int64_t j = 0; j <= t; ++j) {
                double score = 0;
                for (int64_t d = 0; d < D; ++d) score += qkv[t * width + h * D + d] * qkv[j * width + (b.heads + group) * D + d];
                const double weight = exp(score * b.scale);
                total += weight;
                for (int64_t d = 0; d < D; ++d) sums[d] += weight * qkv[j * width + (b.heads + b.groups + group) * D + d];
            }
            for (int64_t d = 0; d < D; ++d) out[(t * b.heads + h) * D + d] = sums[d] / total;
        }
    }
}

void exact_mlp(const Block &b, const Doubles &x, Doubles &out) {
    Doubles gate(b.time * b.gate.rows), up(b.time * b.gate.rows);
    exact_linear(b.gate, x, b.time, gate);
    if (b.up.weight) exact_linear(b.up, x, b.time, up);
    for (int64_t i = 0; i < gate.size; ++i) gate[i] = gate[i] / (1 + exp(-gate[i])) * (b.up.weight ? up[i] : 1.0);
    exact_linear(b.down, gate, b.time, out);
}

void exact_block(const Block &b, Doubles &out) {
    Doubles x(b.time * b.width), normed(x.size), qkv(b.time * b.qkv.rows), attended(b.time * b.heads * b.head_width);
    Doubles middle(x.size);
    for (int64_t i = 0; i < x.size; ++i) x[i] = b.x[i];
    exact_norm(b.norm_1, x, b.time, b.width, normed);
    exact_linear(b.qkv, normed, b.time, qkv);
    for (int64_t t = 0; t < b.time; ++t)
        for (int64_t h = 0; h < b.heads + b.groups; ++h) exact_rope(b, qkv.data + t * b.qkv.rows + h * b.head_width, t);
    exact_attention(b, qkv, attended);
    exact_linear(b.proj, attended, b.time, middle);
    for (int64_t i = 0; i < x.size; ++i) middle[i] += x[i];
    if (!b.shared) exact_norm(b.norm_2, b.parallel ? x : middle, b.time, b.width, normed);
    exact_mlp(b, normed, out);
    for (int64_t i = 0; i < x.size; ++i) out[i] += middle[i];
}

// The parts of a block, in exactly sized allocations.
struct BlockParts {
    Buffer<float> x, out, norm, bias, cosine, sine;
    Buffer<uint16_t> qkv, proj, gate, up, down, keys, values;
    BlockParts(int64_t time, int64_t width, int64_t heads, int64_t groups, int64_t head, int64_t hidden, bool packed)
        : x(time * width), out(time * width), norm(width), bias(width), cosine(time * head), sine(time * head),
          qkv((heads + 2 * groups) * head * width), proj(width * heads * head), gate(hidden * width), up(hidden * width),
          down(width * hidden), keys(groups * time * head), values(groups * time * head) {
        fill(x), fill(norm), fill(bias), fill(cosine), fill(sine);
        for (Buffer<uint16_t> *each : {&qkv, &proj, &gate, &up, &down}) {
            fill(*each);
            // Weights of about a tenth keep the scores where exp is well conditioned; smaller ones are what escapes.
            for (int64_t i = 0; i < each->size; ++i)
                each->data[i] = static_cast<uint16_t>((each->data[i] & (packed ? 0x83f8 : 0x83ff)) | (below(40) ? 11 : below(11)) << 10);
        }
    }
};

// Rows [begin, begin + rows) of a matrix.
Matrix part_of(Matrix m, int64_t begin, int64_t rows) {
    if (m.weight) m.weight += begin * m.stride;
    m.packed.first += begin, m.rows = rows;
    return m;
}

PackedHalves packed_twin(const Matrix &m, bool wanted) { return {wanted ? m.weight : nullptr, m.rows, m.columns}; }

void use(Matrix &m, const PackedHalves &packed) {
    if (packed.rows.records) m.storage = Storage::packed, m.weight = nullptr, m.packed = packed.rows;
}

void test_block(int64_t time, int64_t width, int64_t groups, int64_t hidden, int threads) {
    const int64_t heads = groups * (1 + below(3)), head = 2 + 2 * below(9);
    const bool packed = below(2);
    BlockParts parts(time, width, heads, groups, head, hidden, packed);
    Block b = {};
    b.x = parts.x.data, b.out = parts.out.data, b.batch = 1, b.time = time, b.width = width;
    b.last = 1 + below(time); // positions
    b.qkv = {Storage::float16, parts.qkv.data, width, nullptr, (heads + 2 * groups) * head, width, {}};
    b.proj = {Storage::float16, parts.proj.data, heads * head, parts.bias.data, width, heads * head, {}};
    b.gate = {Storage::float16, parts.gate.data, width, nullptr, hidden, width, {}};
    b.down = {Storage::float16, parts.down.data, hidden, nullptr, width, hidden, {}};
    if (below(2)) b.up = {Storage::float16, parts.up.data, width, nullptr, hidden, width, {}};
    b.norm_1 = {below(2) ? NormKind::rms : NormKind::layer, parts.norm.data, nullptr, 1e-5f, 1.0f};
    b.norm_2 = b.norm_1;
    if (b.norm_1.kind == NormKind::layer) b.norm_2.bias = parts.bias.data;
    b.parallel = below(2), b.shared = b.parallel && below(2), b.activation = Activation::silu;
    b.heads = heads, b.groups = groups, b.head_width = head, b.turned = head;
    b.cosine = parts.cosine.data, b.sine = parts.sine.data, b.cosine_stride = b.sine_stride = head;
    // LitGPT's tables hold every angle twice.
    for (Buffer<float> *table : {&parts.cosine, &parts.sine})
        for (int64_t i = 0; i < table->size; ++i) table->data[i] = table->data[i / head * head + i % head % (head / 2)];
    b.scale = 0.2f;
    Doubles exact(time * width);
    exact_block(b, exact);
    const PackedHalves qkv = packed_twin(b.qkv, packed), proj = packed_twin(b.proj, packed), gate = packed_twin(b.gate, packed);
    const PackedHalves up = packed_twin(b.up, packed), down = packed_twin(b.down, packed);
    use(b.qkv, qkv), use(b.proj, proj), use(b.gate, gate), use(b.up, up), use(b.down, down);
    for (const bool cached : {false, true}) {
        if (below(2)) { // the same rows as three matrices
            b.key = part_of(b.qkv, heads * head, groups * head);
            b.value = part_of(b.qkv, (heads + groups) * head, groups * head);
            b.qkv.rows = heads * head;
        }
        if (cached) { // float16: less exact, but every access of the cache is checked
            b.keys = parts.keys.data, b.values = parts.values.data;
            b.key_head = b.value_head = time * head, b.key_stride = b.value_stride = head;
            b.key_batch = b.value_batch = groups * time * head;
        }
        if (launch_block(LEVEL, b, threads) != BlockOutcome::done) expect("block outcome", 1, 0, time, width, hidden);
        double error = 0, size = 0;
        const int64_t skipped = (time - b.last) * width;
        for (int64_t i = 0; i < b.last * width; ++i) {
            const double want = exact[skipped + i];
            error += pow(b.out[i] - want, 2), size += want * want;
        }
        expect(cached ? "block over a cache" : "block", cached ? error / 1e6 : error, size, time, width, hidden);
    }
}

void test_blocks() {
    for (int64_t time : {1, 3, 24})
        for (int64_t width : {7, 32, 65})
            for (int64_t groups : {1, 2}) test_block(time, width, groups, 2 * width + 3, static_cast<int>(1 + below(3)));
}

} // namespace
