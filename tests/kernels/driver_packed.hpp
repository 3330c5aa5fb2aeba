// Packed matrices: packing and unpacking bit for bit, products against double precision, and blobs whose lists are any
// bytes at all, which a sanitizer watches.
#include "runtime/packed.cpp"

namespace {

typedef Buffer<uint8_t> Bytes;

float widened(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

// Numbers of about one, some of them of other sizes; `odd` of a thousand have any bits that are a finite number.
void fill_packed(Buffer<uint16_t> &numbers, int64_t odd) {
    for (int64_t i = 0; i < numbers.size; ++i) {
        numbers[i] = static_cast<uint16_t>(below(2) << 15 | (120 + below(8)) << 7 | below(128));
        if (below(1000) < odd) numbers[i] = static_cast<uint16_t>(below(2) << 15 | below(130) << 7 | below(128));
        if (below(50) == 0) numbers[i] = 0;
    }
}

// One matrix of `rows` by `columns` and its blob.
struct PackedParts {
    int64_t rows, columns, escapes;
    Buffer<uint16_t> numbers;
    uint8_t table[PACKED_TABLE];
    Bytes blob;

    PackedParts(int64_t height, int64_t width, int64_t odd)
        : rows(height), columns(width), escapes(0), numbers(height * width), blob(sized(odd)) {
        const int threads = static_cast<int>(1 + below(3));
        if (launch_pack(LEVEL, from(), table, escapes, blob.data, threads) != Packed::done) fail("packing");
        if (escapes && launch_pack(LEVEL, from(), table, escapes - 1, Bytes(packed_layout(rows, columns, escapes - 1).end).data, 1) != Packed::other_escapes) fail("fewer escapes");
        int64_t found;
        if (look_through(blob.data, rows, columns, escapes, found) != Damage::none) fail("looking through");
        Buffer<uint16_t> back(numbers.size);
        launch_unpack(LEVEL, {packed(0), back.data, false, columns}, rows, threads);
        if (numbers.size && memcmp(back.data, numbers.data, static_cast<size_t>(2 * numbers.size)) != 0) fail("unpacking");
        Buffer<float> wide(numbers.size);
        launch_unpack(LEVEL, {packed(0), wide.data, true, columns}, rows, threads);
        for (int64_t i = 0; i < wide.size; ++i)
            if (wide[i] != widened(numbers[i])) fail("unpacking to float32");
    }
    Numbers from() const { return {numbers.data, Number::bfloat16, rows, columns}; }
    PackedRows packed(int64_t begin) const { return packed_rows(blob.data, rows, columns, escapes, begin); }
    void fail(const char *what) const { expect(what, 1, 0, rows, columns, escapes); }

  private:
    int64_t sized(int64_t odd) {
        fill_packed(numbers, odd);
        HighBytes found;
        launch_examine(LEVEL, from(), static_cast<int>(1 + below(3)), found);
        escapes = choose_table(found, table);
        return packed_layout(rows, columns, escapes).end;
    }
};

// float16 numbers that are bfloat16 as well, packed; of none, nothing.
struct PackedHalves {
    int64_t height, width;
    uint8_t table[PACKED_TABLE];
    int64_t escapes;
    Bytes blob;
    PackedRows rows;

    PackedHalves(const uint16_t *halves, int64_t count, int64_t columns)
        : height(halves ? count : 0), width(columns), escapes(counted(halves)),
          blob(packed_layout(height, width, escapes).end), rows(packed_rows(blob.data, height, width, escapes, 0)) {
        if (launch_pack(LEVEL, {halves, Number::float16, height, width}, table, escapes, blob.data, 2) != Packed::done)
            expect("packing float16", 1, 0, height, width, escapes);
        if (!halves) rows = {};
    }

  private:
    int64_t counted(const uint16_t *halves) {
        HighBytes found;
        launch_examine(LEVEL, {halves, Number::float16, height, width}, 2, found);
        return choose_table(found, table);
    }
};

// Rows [begin, begin + N or K) of a matrix.
Linear packed_linear(const PackedParts &parts, int64_t M, int64_t begin, bool transposed, const Buffer<float> &x, const Buffer<float> &y) {
    Linear a = {};
    a.x = x.data, a.y = y.data, a.transposed = transposed, a.M = M, a.packed = parts.packed(begin);
    a.N = transposed ? parts.columns : parts.rows - begin, a.K = transposed ? parts.rows - begin : parts.columns;
    a.ldx = a.K, a.ldy = a.N;
    return a;
}

void test_packed(int64_t M, int64_t rows, int64_t columns, int64_t odd, bool transposed, int threads) {
    const PackedParts parts(rows, columns, odd);
    const int64_t begin = below(rows), left = rows - begin, N = transposed ? columns : left, K = transposed ? left : columns;
    Buffer<float> x(M * K), y(M * N);
    fill(x);
    Linear a = packed_linear(parts, M, begin, transposed, x, y);
    Buffer<float> bias(N), residual(M * N);
    fill(bias), fill(residual);
    a.bias = below(2) ? bias.data : nullptr, a.residual = below(2) ? residual.data : nullptr, a.ldr = N;
    if (M == 0 || N == 0) return;
    run_linear(a, threads);
    double error = 0, size = 0;
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            const double rest[] = {a.bias ? bias[n] : 0.0f, a.residual ? residual[m * N + n] : 0.0f};
            double sum = rest[0] + rest[1];
            size += rest[0] * rest[0] + rest[1] * rest[1];
            for (int64_t k = 0; k < K; ++k) {
                const int64_t at = transposed ? (begin + k) * columns + n : (begin + n) * columns + k;
                const double term = static_cast<double>(x[m * K + k]) * widened(parts.numbers[at]);
                sum += term, size += term * term;
            }
            error += pow(y[m * N + n] - sum, 2);
        }
    }
    expect(transposed ? "packed matmul" : "packed linear", error, size, M, N, K);
    const int64_t row = below(rows);
    Buffer<float> out(columns);
    LEVEL.embedding({nullptr, 0, &row, out.data, 1, columns, parts.packed(0)}, 0, 1);
    for (int64_t i = 0; i < columns; ++i)
        if (out[i] != widened(parts.numbers[row * columns + i])) parts.fail("packed embedding");
}

void expect_same(const char *what, const Buffer<float> &x, const float *y, int64_t M, int64_t N, int64_t K) {
    if (memcmp(x.data, y, sizeof(float) * static_cast<size_t>(x.size)) != 0) expect(what, 1, 0, M, N, K);
}

// What float16 holds as well gives the bits of a float16 product, whatever the number of rows; tiles add otherwise.
void test_same_bits(int64_t M, int64_t N, int64_t K) {
    Buffer<uint16_t> w(N * K);
    Buffer<float> x(M * K), y(M * N), other(M * N), alone(N);
    fill(w), fill(x);
    for (int64_t i = 0; i < w.size; ++i) w[i] &= 0xfff8;
    const PackedHalves packed(w.data, N, K);
    Linear a = {};
    a.x = x.data, a.ldx = K, a.w = w.data, a.ldw = K, a.y = y.data, a.ldy = N, a.M = M, a.N = N, a.K = K;
    Linear b = a;
    b.y = other.data, b.packed = packed.rows;
    run_linear(a, 1), run_linear(b, 2);
    if (LEVEL.plan_linear(a, 1).strategy == Strategy::tiles) return;
    expect_same("bits of packed and float16", y, other.data, M, N, K);
    for (b.M = 1, b.y = alone.data; b.x < x.data + x.size; b.x += K) {
        run_linear(b, 1);
        expect_same("bits of a packed row alone", alone, other.data + (b.x - x.data) / K * N, M, N, K);
    }
}

// Rows of weights and of x that are tiny as a whole, and numbers that are not finite: each number of y has its own bound.
void test_unusual(int64_t M, int64_t N, int64_t K, int tiny, bool infinite) {
    Buffer<uint16_t> w(N * K);
    Buffer<float> x(M * K), y(M * N);
    fill_packed(w, 0), fill(x);
    for (int64_t k = 0; k < K; ++k) w[(N / 2) * K + k] = static_cast<uint16_t>(w[(N / 2) * K + k] - (w[(N / 2) * K + k] ? tiny << 7 : 0));
    for (int64_t k = 0; k < K; ++k) x[(M / 2) * K + k] = static_cast<float>(ldexp(x[(M / 2) * K + k], -tiny / 2));
    if (infinite) w[K + K / 3] = 0x7f80;
    HighBytes found;
    uint8_t table[PACKED_TABLE];
    launch_examine(LEVEL, {w.data, Number::bfloat16, N, K}, 1, found);
    const int64_t escapes = choose_table(found, table);
    const Bytes blob(packed_layout(N, K, escapes).end);
    if (launch_pack(LEVEL, {w.data, Number::bfloat16, N, K}, table, escapes, blob.data, 1) != Packed::done) expect("packing", 1, 0, M, N, K);
    Linear a = {};
    a.x = x.data, a.ldx = K, a.y = y.data, a.ldy = N, a.M = M, a.N = N, a.K = K, a.packed = packed_rows(blob.data, N, K, escapes, 0);
    run_linear(a, 2);
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < K; ++k) {
                const double term = static_cast<double>(x[m * K + k]) * widened(w[n * K + k]);
                sum += term, size += fabs(term);
            }
            const bool same = isfinite(sum) ? fabs(y[m * N + n] - sum) <= 2e-6 * size + 2e-38 : !isfinite(y[m * N + n]);
            if (!same) expect("packed rows of another size", 1, 0, M, N, K);
        }
    }
}

// Whatever the bytes are, nothing outside of the blob and the output is touched.
void test_hostile(int64_t M, int64_t rows, int64_t columns, int threads) {
    PackedParts parts(rows, columns, 300);
    const PackedLayout at = packed_layout(rows, columns, parts.escapes);
    for (int64_t i = below(2) ? 0 : at.pointers; i < at.end; ++i)
        if (below(3) == 0) parts.blob[i] = static_cast<uint8_t>(below(4) ? below(3) : below(256));
    int64_t found;
    look_through(parts.blob.data, rows, columns, parts.escapes, found);
    Buffer<uint16_t> back(rows * columns);
    launch_unpack(LEVEL, {parts.packed(0), back.data, false, columns}, rows, threads);
    for (bool transposed : {false, true}) {
        Buffer<float> x(M * (transposed ? rows : columns)), y(M * (transposed ? columns : rows));
        run_linear(packed_linear(parts, M, 0, transposed, x, y), threads);
    }
}

void test_packed_edges() {
    for (int64_t M : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 33})
        for (int64_t rows : {1, 3, 31, 70})
            for (int64_t columns : {1, 15, 64, 65, 129, 200, 600})
                for (bool transposed : {false, true}) test_packed(M, rows, columns, below(2) * 50, transposed, static_cast<int>(1 + below(3)));
    // Sums of several pieces of K, and more rows than are widened at once.
    for (int64_t M : {1, 2, 3, 5, 8, 9, 40}) test_packed(M, 9, 9001, 1, false, 2), test_packed(M, 300, 130, 2, true, 2);
    test_packed(36, 120, 4100, 1, false, 1), test_packed(40, 70, 8192, 0, false, 2), test_packed(3, 2100, 70, 1, true, 1);
    for (int64_t M : {1, 2, 3, 4, 5, 6, 7, 8, 9, 21, 40})
        for (int64_t K : {1, 63, 64, 200, 577}) test_same_bits(M, 1 + below(70), K);
    for (int64_t M : {1, 4, 8, 33}) test_same_bits(M, 31, 4097);
    for (int64_t M : {1, 5, 36})
        for (int tiny : {0, 40, 70, 100}) test_unusual(M, 45, 300, tiny, false), test_unusual(M, 45, 300, tiny, true);
    for (int64_t M : {1, 2, 4, 7, 16, 40})
        for (int64_t columns : {1, 64, 100, 700}) test_hostile(M, 13, columns, 2), test_hostile(M, 40, columns, 1);
}

void test_packed_random() {
    test_packed(below(70), 1 + below(150), 1 + below(700), below(3) * 40, below(2), static_cast<int>(1 + below(5)));
    test_same_bits(1 + below(50), 1 + below(90), 1 + below(700));
    test_hostile(1 + below(20), 1 + below(60), 1 + below(400), static_cast<int>(1 + below(3)));
}

} // namespace
