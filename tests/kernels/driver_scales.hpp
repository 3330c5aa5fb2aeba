// Rows of x of every size against weights of every size, each number of y with a bound of its own: what one row loses does
// not hide behind another. And what AMX multiplies as float16.

namespace {

enum class Weights { usual, subnormal, largest, infinite };
enum class Rows { plain, usual, outlier, subnormal, infinite, none };

// One product and all that it reads.
struct Scaled {
    Buffer<float> x, y, bias, residual;
    Buffer<uint16_t> w;
    Linear a;

    Scaled(int64_t M, int64_t N, int64_t K, bool transposed)
        : x(M * K), y(M * N), bias(N), residual(M * N), w(N * K), a() {
        fill(x), fill(w), fill(bias), fill(residual);
        a.x = x.data, a.ldx = K, a.w = w.data, a.ldw = transposed ? N : K, a.transposed = transposed;
        a.y = y.data, a.ldy = a.ldr = N, a.M = M, a.N = N, a.K = K;
    }
    // Rows of 2^-120 to 2^100, one of zeros, and every third with numbers far smaller than its largest.
    void scale(Rows rows) {
        if (rows == Rows::plain) return;
        const int sizes[] = {-120, 100, 0, -60, -112, 37, -125};
        for (int64_t m = 0; m < a.M; ++m)
            for (int64_t k = 0; k < a.K; ++k)
                x[m * a.K + k] *= m == 3 ? 0.0f : ldexpf(1, sizes[m % 7] - static_cast<int>(m % 3 ? 0 : below(18)));
        float *const odd = x.data + a.M / 2 * a.K;
        for (int64_t k = 0; rows == Rows::outlier && k < a.K; ++k) odd[k] = uniform();
        if (rows == Rows::outlier) odd[a.K / 3] = 0x1p40f;
        for (int64_t k = 0; rows == Rows::subnormal && k < a.K; ++k) odd[k] = ldexpf(uniform(), -130);
        if (rows == Rows::infinite) odd[a.K / 3] = -INFINITY;
        if (rows == Rows::none) odd[a.K / 3] = NAN;
    }
    void weigh(Weights weights) {
        for (int64_t i = 0; i < w.size; ++i) {
            if (weights == Weights::subnormal) w[i] &= 0x83ff;
            if (weights == Weights::largest) w[i] = static_cast<uint16_t>((w[i] & 0x8000) | 0x7bff);
        }
        if (weights == Weights::infinite) w[w.size / 2] = 0x7c00, w[w.size / 3] = 0xfe00;
    }
    // No weight for column k of x.
    void ignore(int64_t k) {
        for (int64_t n = 0; n < a.N; ++n) w[a.transposed ? k * a.ldw + n : n * a.ldw + k] = 0;
    }
    void check() const {
        for (int64_t m = 0; m < a.M; ++m) {
            for (int64_t n = 0; n < a.N; ++n) {
                const double rest[] = {a.bias ? a.bias[n] : 0.0f, a.residual ? a.residual[m * a.ldr + n] : 0.0f};
                double sum = rest[0] + rest[1], size = fabs(rest[0]) + fabs(rest[1]);
                for (int64_t k = 0; k < a.K; ++k) {
                    const uint16_t bits = a.w[a.transposed ? k * a.ldw + n : n * a.ldw + k];
                    const double weight = bits == 0x7c00 ? INFINITY : bits == 0xfe00 ? NAN : half(bits);
                    const double term = a.x[m * a.ldx + k] * weight;
                    sum += term, size += fabs(term);
                }
                const double got = a.y[m * a.ldy + n], slack = ldexp(static_cast<double>(a.K), -149);
                const bool same = isfinite(sum) ? fabs(got - sum) <= 2e-6 * size + slack : isnan(sum) ? isnan(got) : got == sum;
                if (!same) expect("rows of another size", 1, 0, m, n, a.K);
            }
        }
    }
};

void test_scales(int64_t M, int64_t N, int64_t K, bool transposed, Weights weights, Rows rows) {
    Scaled product(M, N, K, transposed);
    product.scale(rows), product.weigh(weights);
    if (rows == Rows::outlier) product.ignore(K / 3);
    Linear &a = product.a;
    if (below(3) == 0) a.bias = product.bias.data;
    if (below(3) == 0) a.residual = product.residual.data;
    run_linear(a, static_cast<int>(1 + below(3)));
    product.check();
}

void test_scales_edges() {
    for (bool transposed : {false, true}) {
        for (Weights weights : {Weights::usual, Weights::subnormal, Weights::largest, Weights::infinite})
            for (Rows rows : {Rows::plain, Rows::usual, Rows::outlier, Rows::subnormal, Rows::infinite, Rows::none})
                for (int64_t M : {1, 5, 23, 49}) test_scales(M, 45, 71, transposed, weights, rows);
        test_scales(131, 37, 1100, transposed, Weights::usual, Rows::usual);
        test_scales(22, 17, 2083, transposed, Weights::subnormal, Rows::usual);
    }
}

void test_scales_random() {
    const Weights weights = static_cast<Weights>(below(4));
    test_scales(1 + below(70), 1 + below(90), 1 + below(400), below(2), weights, static_cast<Rows>(below(6)));
}

#if UPCAST_LEVEL == 6
// The instruction is tried before it is used, and one that does something else is found out.
void test_first_product() {
    if (!amx_fp16_works()) expect("the first product", 1, 0, 0, 0, 0);
#if UPCAST_EMULATE_TILES
    emulated::flushes_halves = true;
    if (amx_fp16_works()) expect("a first product without subnormal halves", 1, 0, 0, 0, 0);
    emulated::flushes_halves = false;
#endif
}

#if UPCAST_EMULATE_TILES
void expect_products(const Linear &a, long halves, long bfloat16) {
    emulated::half_products = emulated::products = 0;
    run_linear(a, 1);
    if (emulated::half_products == halves && emulated::products == bfloat16) return;
    printf("products of tiles: %ld and %ld\n", emulated::half_products, emulated::products), exit(1);
}

// Float16 weights take two products of float16 tiles whatever their size and that of x; packed ones three of bfloat16; and
// rows of x that two halves do not hold take none.
void test_half_products(bool transposed) {
    constexpr int64_t M = 40, N = 64, K = 96;
    constexpr long TILES = (M + 15) / 16 * N / 16 * K / 32;
    for (Weights weights : {Weights::usual, Weights::subnormal, Weights::largest}) {
        Scaled product(M, N, K, transposed);
        product.scale(Rows::usual), product.weigh(weights);
        expect_products(product.a, 2 * TILES, 0);
        product.check();
    }
    for (Rows rows : {Rows::outlier, Rows::subnormal, Rows::infinite}) {
        Scaled product(M, N, K, transposed);
        product.scale(rows), product.ignore(K / 3);
        expect_products(product.a, 0, 0);
        product.check();
    }
    if (transposed) return;
    Scaled product(M, N, K, false);
    for (int64_t i = 0; i < product.w.size; ++i) product.w[i] &= 0xfff8;
    const PackedHalves packed(product.w.data, N, K);
    product.a.packed = packed.rows;
    expect_products(product.a, 0, 3 * TILES);
    product.check();
}
#endif
#endif

} // namespace
