// The kernels of one level without Python: every operation against double precision, over edge sizes or, given
// a number of seconds, over random ones. Inputs sit at the very end of exactly sized allocations, so that a
// sanitizer sees any read beyond them. Exits with 1 at the first disagreement.
#if UPCAST_EMULATE_TILES
#include "emulated_tiles.hpp"
#endif
#include "simd/level.cpp"

#include <initializer_list>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#if UPCAST_AMX && !UPCAST_EMULATE_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace upcast;

namespace {

const Level &LEVEL = UPCAST_NS::LEVEL;
uint64_t state = 88172645463325252u;

uint64_t random_bits() {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}
int64_t below(int64_t limit) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(limit)); }
float uniform() { return static_cast<float>(below(20001) - 10000) / 5000.0f; }

// `count` elements whose last byte is the last of the allocation; of none, nullptr, as in an empty tensor.
template <class T> struct Buffer {
    explicit Buffer(int64_t count) : size(count), data(nullptr) {
        if (count) data = static_cast<T *>(calloc(static_cast<size_t>(count), sizeof(T)));
    }
    ~Buffer() { free(data); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    T &operator[](int64_t i) const { return data[i]; }
    int64_t size;
    T *data;
};

void fill(Buffer<float> &buffer) {
    for (int64_t i = 0; i < buffer.size; ++i) buffer[i] = uniform();
}
void fill(Buffer<uint16_t> &buffer) {
    // Any sign and fraction; exponents from subnormal to 2.
    for (int64_t i = 0; i < buffer.size; ++i) buffer[i] = static_cast<uint16_t>((below(2) << 15) | (below(17) << 10) | below(1024));
}

double half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -size : size;
}

void expect(const char *what, double error, double size, int64_t m, int64_t n, int64_t k) {
    const double relative = size > 0 ? sqrt(error / size) : sqrt(error);
    if (relative <= 2e-6) return;
    printf("%s: relative error %.3g at %lld x %lld x %lld\n", what, relative, static_cast<long long>(m),
           static_cast<long long>(n), static_cast<long long>(k));
    exit(1);
}

void run_linear(const Linear &a, int threads) {
    LinearPlan plan = LEVEL.plan_linear(a, threads);
    plan.reading = static_cast<Reading>(below(3));
    Buffer<char> scratch(static_cast<int64_t>(plan.scratch) + 64);
    char *aligned = scratch.data + (64 - reinterpret_cast<uintptr_t>(scratch.data) % 64) % 64;
    for (int phase = 0; phase < 2; ++phase)
        for (int task = 0; task < plan.tasks[phase]; ++task) LEVEL.linear(a, plan, aligned, phase, task);
}

// y of `a` against sums of double precision.
void check_linear(const Linear &a) {
    double error = 0, size = 0;
    for (int64_t m = 0; m < a.M; ++m) {
        for (int64_t n = 0; n < a.N; ++n) {
            // Squares of the terms, not of their sum, which may be close to zero.
            const double rest[] = {a.bias ? a.bias[n] : 0.0f, a.residual ? a.residual[m * a.ldr + n] : 0.0f};
            double sum = rest[0] + rest[1];
            size += rest[0] * rest[0] + rest[1] * rest[1];
            for (int64_t k = 0; k < a.K; ++k) {
                const double term = a.x[m * a.ldx + k] * half(a.w[a.transposed ? k * a.ldw + n : n * a.ldw + k]);
                sum += term, size += term * term;
            }
            error += pow(a.y[m * a.ldy + n] - sum, 2);
        }
    }
    expect(a.transposed ? "matmul" : "linear", error, size, a.M, a.N, a.K);
}

void test_linear(int64_t M, int64_t N, int64_t K, bool transposed, int threads) {
    const int64_t pad_x = below(3), pad_w = below(3), skip = below(3);
    const int64_t rows = transposed ? K : N, columns = transposed ? N : K;
    Linear a = {};
    Buffer<float> x(M ? (M - 1) * (K + pad_x) + K : 0), y(M * N), bias(N), residual(M * N);
    Buffer<uint16_t> w(skip + (rows ? (rows - 1) * (columns + pad_w) + columns : 0));
    fill(x), fill(w), fill(bias), fill(residual);
    a.x = x.data, a.ldx = K + pad_x, a.w = w.data + skip, a.ldw = columns + pad_w, a.transposed = transposed;
    a.bias = below(2) ? bias.data : nullptr, a.residual = below(2) ? residual.data : nullptr;
    a.y = y.data, a.ldy = a.ldr = N, a.M = M, a.N = N, a.K = K;
    if (M == 0 || N == 0) return;
    run_linear(a, threads);
    check_linear(a);
}

void test_rows(int64_t rows, int64_t width) {
    Buffer<float> x(rows * width), up(rows * width), out(rows * width), weight(width), bias(width);
    fill(x), fill(up), fill(weight), fill(bias);
    const Norm norm = {x.data, width, weight.data, bias.data, 1e-5f, 0.0f, true, out.data, rows, width};
    LEVEL.norm(norm, 0, rows);
    double error = 0, size = 0;
    for (int64_t r = 0; r < rows && width > 1; ++r) {
        double mean = 0, variance = 0;
        for (int64_t i = 0; i < width; ++i) mean += x[r * width + i] / static_cast<double>(width);
        for (int64_t i = 0; i < width; ++i) variance += pow(x[r * width + i] - mean, 2) / static_cast<double>(width);
        for (int64_t i = 0; i < width; ++i) {
            const double exact = (x[r * width + i] - mean) / sqrt(variance + 1e-5f) * weight[i] + bias[i];
            error += pow(out[r * width + i] - exact, 2), size += exact * exact;
        }
    }
    expect("norm", error, size, rows, width, 0);
    for (Activation kind : {Activation::silu, Activation::gelu, Activation::gelu_tanh}) {
        LEVEL.gated({x.data, up.data, width, width, kind, out.data, rows, width}, 0, rows);
        error = size = 0;
        for (int64_t i = 0; i < rows * width; ++i) {
            const double v = x[i], tanh_form = 0.5 * (1 + tanh(sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
            const double gate = kind == Activation::silu ? 1 / (1 + exp(-v)) : kind == Activation::gelu ? 0.5 * erfc(-v / sqrt(2.0)) : tanh_form;
            error += pow(out[i] - v * gate * up[i], 2), size += pow(v * gate * up[i], 2);
        }
        expect("gated", error, size, rows, width, static_cast<int64_t>(kind));
    }
}

// One head per batch entry, over a cache that a test of the append has just filled.
void test_attention(int64_t group, int64_t time, int64_t start, int64_t width, int64_t window, int threads) {
    const int64_t length = start + time, heads = 2;
    Buffer<float> q(heads * group * time * width), kv(heads * length * width), out(q.size);
    Buffer<uint16_t> cache(kv.size);
    fill(q), fill(kv);
    const Append append = {kv.data, heads * length * width, length * width, width, cache.data, heads * length * width,
                           length * width, width, false, heads, length, 0, width, 0};
    if (LEVEL.refuses(append, 0, length)) expect("overflow", 1, 0, heads, length, width);
    double largest = 0; // of the positions' mean squares
    for (int64_t t = 0; t < length; ++t) {
        double squares = 0;
        for (int64_t i = 0; i < heads * width; ++i) squares += pow(kv[i / width * length * width + t * width + i % width], 2);
        largest = fmax(largest, squares / static_cast<double>(heads * width));
    }
    Append limited = append;
    for (double factor : {0.99, 1.01}) {
        limited.limit = static_cast<float>(sqrt(largest) * factor);
        if (LEVEL.refuses(limited, 0, length) != (factor < 1)) expect("limit", 1, 0, heads, length, width);
    }
    LEVEL.append(append, 0, heads * length);
    Attention a = {};
    a.queries = q.data, a.query_head = time * width, a.query_time = width, a.keys = a.values = cache.data;
    a.key_head = a.value_head = length * width, a.key_stride = a.value_stride = width, a.out = out.data, a.batch = 1;
    a.kv_heads = heads, a.group = group, a.time = time, a.start = start, a.width = a.value_width = width;
    a.scale = 0.3f, a.softcap = below(2) ? 4.0f : 0.0f, a.window = window, a.causal = true;
    const AttentionPlan plan = LEVEL.plan_attention(a, threads);
    Buffer<float> own(plan.own), partials(plan.partials);
    for (int unit = 0; unit < plan.units; ++unit) LEVEL.attention(a, plan, own.data, partials.data, unit);
    LEVEL.attention_join(a, plan, partials.data, 0, heads * group * time);
    double error = 0, size = 0;
    for (int64_t h = 0; h < heads * group; ++h) {
        for (int64_t t = 0; t < time; ++t) {
            const uint16_t *kvs = cache.data + h / group * length * width;
            const int64_t end = start + t + 1, begin = window && end > window ? end - window : 0;
            Buffer<double> sums(width);
            double total = 0;
            for (int64_t j = begin; j < end; ++j) {
                double s = 0;
                for (int64_t d = 0; d < width; ++d) s += q[(h * time + t) * width + d] * half(kvs[j * width + d]) * a.scale;
                const double weight = exp(a.softcap > 0 ? a.softcap * tanh(s / a.softcap) : s);
                total += weight;
                for (int64_t d = 0; d < width; ++d) sums[d] += weight * half(kvs[j * width + d]);
            }
            for (int64_t d = 0; d < width; ++d) {
                const double exact = sums[d] / total;
                error += pow(out[(t * heads * group + h) * width + d] - exact, 2), size += exact * exact;
            }
        }
    }
    expect("attention", error / 4, size, time, start, width); // scores of up to 40 magnify rounding errors
}

// Numbers of every size, and some that are none, against the same counts one by one.
void test_survey(int64_t n) {
    Buffer<float> x(n);
    Buffer<uint16_t> out(n);
    Surveyed want = {};
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = static_cast<uint32_t>(random_bits());
        memcpy(&x[i], &bits, sizeof bits);
        if (below(2)) x[i] = ldexpf(uniform(), static_cast<int>(below(50)) - 30);
        const float size = fabsf(x[i]);
        const bool finite = isfinite(x[i]);
        want.largest = finite && size > want.largest ? size : want.largest;
        want.nonfinite += !finite, want.out_of_range += finite && size > 65504.0f;
        want.nonzero += size > 0, want.flushed += size > 0 && size <= 0x1p-25f;
    }
    const Surveyed got = LEVEL.survey({x.data, nullptr, false, nullptr}, 0, n);
    Surveyed rounded = LEVEL.survey({x.data, nullptr, true, out.data}, 0, n);
    for (int64_t i = 0; i < n; ++i) {
        if (fabsf(x[i]) > 65504.0f || x[i] != x[i]) continue;
        const float off = static_cast<float>(fabs(half(out[i]) - x[i]));
        want.max_error = off > want.max_error ? off : want.max_error;
    }
    if (rounded.max_error != want.max_error) expect("rounding error", 1, 0, n, 0, 0);
    rounded.max_error = want.max_error = got.max_error;
    if (memcmp(&got, &want, sizeof got) != 0 || memcmp(&rounded, &want, sizeof got) != 0) expect("survey", 1, 0, n, 0, 0);
    if (LEVEL.survey({nullptr, out.data, false, nullptr}, 0, n).nonfinite < want.nonfinite) expect("halves", 1, 0, n, 0, 0);
}

void test_rope(int64_t time, int64_t width, int64_t turned, bool interleaved) {
    Buffer<float> x(2 * time * width), cosine(time * turned), sine(time * turned), out(x.size);
    fill(x), fill(cosine), fill(sine);
    const Rope rope = {x.data, 0, time * width, width, cosine.data, sine.data, 0, turned, 0, turned, interleaved, out.data, 2, time, width, turned};
    LEVEL.rope(rope, 0, 2 * time);
    double error = 0, size = 0;
    for (int64_t row = 0; row < 2 * time; ++row) {
        for (int64_t i = 0; i < width; ++i) {
            const float *v = x.data + row * width;
            const int64_t half_turn = turned / 2, pair = interleaved ? i ^ 1 : i < half_turn ? i + half_turn : i - half_turn;
            const bool first = interleaved ? i % 2 == 0 : i < half_turn;
            double exact = v[i];
            if (i < turned) {
                const int64_t angle = row % time * turned + i;
                exact = static_cast<double>(v[i]) * cosine[angle] + (first ? -1.0 : 1.0) * v[pair] * sine[angle];
            }
            error += pow(out[row * width + i] - exact, 2), size += exact * exact;
        }
    }
    expect("rope", error, size, time, width, turned);
}

} // namespace

#include "driver_packed.hpp"
#include "driver_scales.hpp"
#include "driver_block.hpp"
#include "runtime/digest.hpp"

namespace {

// The same bytes have one checksum at any address and with any threads; with one bit changed, another.
void test_digest(int64_t bytes) {
    Buffer<char> data(bytes), moved(bytes + 1);
    for (int64_t i = 0; i < bytes; ++i) data[i] = moved[i + 1] = static_cast<char>(random_bits());
    const auto digest = [](const char *at, int64_t size, int threads) {
        Pieces pieces;
        const bool added = pieces.add(at, size) && pieces.add(nullptr, 0);
        return added ? pieces.digest(threads) : 0;
    };
    const uint64_t want = digest(data.data, bytes, 1);
    if (digest(moved.data + 1, bytes, 3) != want) expect("the same bytes", 1, 0, bytes, 0, 0);
    if (bytes) data[below(bytes)] ^= static_cast<char>(1 << below(8));
    if (bytes && digest(data.data, bytes, 2) == want) expect("a bit that differs", 1, 0, bytes, 0, 0);
}

struct Seen {
    pthread_t threads[2];
    int slow; // the task that is held up
};

void note_thread(void *context, int index) {
    Seen &seen = *static_cast<Seen *>(context);
    seen.threads[index] = pthread_self();
    const timespec moment = {0, 20 * MILLISECOND};
    if (index == seen.slow) nanosleep(&moment, nullptr);
}

bool together(int slow) {
    Seen seen = {{}, slow};
    parallel(2, note_thread, &seen);
    return !pthread_equal(seen.threads[0], seen.threads[1]);
}

// A thread that is held up for milliseconds sends the others home, for a while.
void test_pause() {
    if (!dlopen("libgomp.so.1", RTLD_LAZY) || !attach_pool("libgomp.so.1")) return;
    // Other programs may hold up either thread at any time: what matters is that both states are reached.
    const timespec pause = {0, 2 * SHORTEST_PAUSE};
    bool alone = false, back = false;
    for (int i = 0; i < 20 && !alone; ++i) together(1), alone = !together(-1);
    for (int i = 0; i < 40 && !back; ++i) nanosleep(&pause, nullptr), back = together(-1);
    if (!alone || !back) expect(alone ? "two threads again" : "one thread while another is starved", 1, 0, 0, 0, 0);
}

#if UPCAST_EMULATE_TILES && UPCAST_LEVEL == 5
// Weights that were bfloat16 take three products of tiles where others take five, and add up to the same.
void test_second_pieces(bool transposed) {
    long counts[2];
    for (int digits : {7, 10}) {
        const int64_t M = 40, N = 64, K = 96;
        Buffer<float> x(M * K), y(M * N);
        Buffer<uint16_t> w(N * K);
        fill(x), fill(w);
        for (int64_t i = 0; i < w.size; ++i) w[i] = static_cast<uint16_t>(w[i] >> (10 - digits) << (10 - digits));
        Linear a = {};
        a.x = x.data, a.ldx = K, a.w = w.data, a.ldw = transposed ? N : K, a.transposed = transposed;
        a.y = y.data, a.ldy = N, a.M = M, a.N = N, a.K = K;
        emulated::products = 0;
        run_linear(a, 1);
        counts[digits == 10] = emulated::products;
        check_linear(a);
    }
    if (5 * counts[0] != 3 * counts[1]) printf("second pieces: %ld and %ld products\n", counts[0], counts[1]), exit(1);
}
#endif

void test_edges() {
#if UPCAST_EMULATE_TILES && UPCAST_LEVEL == 5
    test_second_pieces(false), test_second_pieces(true);
#endif
#if UPCAST_LEVEL == 6
    test_first_product();
#if UPCAST_EMULATE_TILES
    test_half_products(false), test_half_products(true);
#endif
#endif
    const int64_t sizes[] = {1, 2, 7, 15, 16, 17, 31, 33, 129};
    for (int64_t M : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 33, 65})
        for (int64_t N : sizes)
            for (int64_t K : {0, 1, 7, 8, 31, 33, 129, 300})
                for (int threads : {1, 3}) test_linear(M, N, K, false, threads), test_linear(M, N, K, true, threads);
    // More than a block of K and of rows of x.
    for (bool transposed : {false, true}) test_linear(140, 70, 40, transposed, 2), test_linear(33, 35, 2100, transposed, 1);
    test_blocks(), test_pause(), test_packed_edges(), test_scales_edges();
    test_linear(3, 5, 9001, false, 2), test_linear(3, 5, 9001, true, 2), test_linear(1, 5, 9001, true, 2);
    for (int64_t n : sizes) test_survey(n), test_digest(n);
    for (int64_t bytes : {int64_t(0), int64_t(64), PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 77}) test_digest(bytes);
    for (int64_t width : sizes) test_rows(3, width), test_rope(3, width, width / 2 * 2, false), test_rope(3, width, width / 4 * 2, true);
    for (int64_t width : {1, 16, 31, 64})
        for (int64_t time : {1, 5, 20, 45}) test_attention(3, time, 230, width, 0, 2), test_attention(1, time, 700, width, 33, 4);
}

void test_random() {
    for (int i = 0; i < 8; ++i) test_linear(below(70), below(150), below(400), below(2), static_cast<int>(1 + below(5)));
    test_packed_random(), test_scales_random();
    test_rows(below(5), 1 + below(300));
    test_survey(below(3000)), test_digest(below(3000));
    const int64_t width = 1 + below(90);
    test_block(1 + below(30), 1 + below(70), 1 + below(3), 1 + below(90), static_cast<int>(1 + below(3)));
    test_rope(below(20), width, below(width + 1) / 2 * 2, below(2));
    test_attention(1 + below(5), 1 + below(50), below(600), width, below(2) * (1 + below(50)), static_cast<int>(1 + below(4)));
}

} // namespace

int main(int count, char **arguments) {
#if defined(__x86_64__)
#if UPCAST_AMX && !UPCAST_EMULATE_TILES
    if (syscall(SYS_arch_prctl, 0x1023L, 18L) != 0) return printf("skipped: no AMX here\n"), 0; // as in dispatch.cpp
    uint32_t a = 0, b, c, d;
    if (UPCAST_LEVEL == 6 && (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & 1u << 21))) return printf("skipped: no AMX-FP16 here\n"), 0;
#endif
    if (UPCAST_LEVEL >= 4 && !__builtin_cpu_supports("avx512vl")) return printf("skipped: no AVX-512 here\n"), 0;
    if (UPCAST_LEVEL == 3 && !__builtin_cpu_supports("avx2")) return printf("skipped: no AVX2 here\n"), 0;
#endif
    const time_t end = time(nullptr) + (count > 1 ? atoi(arguments[1]) : 0);
    long rounds = 0;
    if (count < 2) test_edges();
    else state ^= static_cast<uint64_t>(time(nullptr)) << 20;
    for (; time(nullptr) < end; ++rounds) test_random();
    printf("%s: all agree, %ld random rounds\n", LEVEL.name, rounds);
    return 0;
}
