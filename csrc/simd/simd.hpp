// Vocabulary of the kernels: one float vector type per instruction set, and how halves enter and leave it.
//
// Everything above this file is written in compiler vector extensions, so a new instruction set needs
// only the block of definitions below. Half vectors never exist: gcc scalarises conversions of _Float16
// vectors, so halves are loaded through the intrinsics named here and live as floats from then on.
#pragma once

#include <stdint.h>
#include <string.h>

#if UPCAST_LEVEL == 6
#define UPCAST_NS level_x86_64_v4_amx_fp16
#define UPCAST_LEVEL_NAME "x86-64-v4-amx-fp16"
#define UPCAST_AMX 1
#define UPCAST_AVX512 1
#elif UPCAST_LEVEL == 5
#define UPCAST_NS level_x86_64_v4_amx
#define UPCAST_LEVEL_NAME "x86-64-v4-amx"
#define UPCAST_AMX 1
#define UPCAST_AVX512 1
#elif UPCAST_LEVEL == 4
#define UPCAST_NS level_x86_64_v4
#define UPCAST_LEVEL_NAME "x86-64-v4"
#define UPCAST_AVX512 1
#endif

#if UPCAST_AVX512
#define UPCAST_LANES 16
#define UPCAST_REGISTERS 32
#include <immintrin.h>
#elif UPCAST_LEVEL == 3
#define UPCAST_NS level_x86_64_v3
#define UPCAST_LEVEL_NAME "x86-64-v3"
#define UPCAST_LANES 8
#define UPCAST_REGISTERS 16
#include <immintrin.h>
#elif UPCAST_LEVEL == 1
#define UPCAST_NS level_x86_64
#define UPCAST_LEVEL_NAME "x86-64"
#define UPCAST_LANES 4
#define UPCAST_REGISTERS 16
#elif UPCAST_LEVEL == 64
#define UPCAST_NS level_aarch64
#define UPCAST_LEVEL_NAME "aarch64"
#define UPCAST_LANES 4
#define UPCAST_REGISTERS 32
#include <arm_neon.h>
#else
#error "UPCAST_LEVEL must be 1, 3, 4, 5 or 6 (x86-64 levels, 5: with AMX, 6: with AMX-FP16) or 64 (aarch64)"
#endif

#define UPCAST_INLINE static inline __attribute__((always_inline))

// Keeps a loaded vector in its register: gcc would rather repeat the load in every instruction using it.
#if defined(__aarch64__)
#define UPCAST_KEEP(v) __asm__("" : "+w"(v))
#else
#define UPCAST_KEEP(v) __asm__("" : "+v"(v))
#endif

// Before a loop over registers: it must be gone before gcc decides that its array lives in memory.
#if defined(__clang__)
#define UPCAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define UPCAST_UNROLL _Pragma("GCC unroll 64")
#endif

// gcc before 12 knows only __builtin_shuffle, clang only __builtin_shufflevector.
#if defined(__clang__)
#define UPCAST_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UPCAST_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif

// No header of the C++ library is included by anything compiled per level: its inline functions would be
// emitted with this level's instructions and the linker could pick them for code of a lower level.
namespace upcast {
namespace UPCAST_NS {

constexpr int LANES = UPCAST_LANES;
constexpr int REGISTERS = UPCAST_REGISTERS;

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef float vf_unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

template <class T> UPCAST_INLINE constexpr T least(T a, T b) { return a < b ? a : b; }
template <class T> UPCAST_INLINE constexpr T most(T a, T b) { return a < b ? b : a; }

// Minus zero, unlike plus zero, changes no value: the compiler drops the subtraction.
UPCAST_INLINE vf splat(float value) { return value - vf{}; }
UPCAST_INLINE vi splat_bits(int32_t bits) { return bits - vi{}; }
UPCAST_INLINE vf load(const float *p) { return *reinterpret_cast<const vf_unaligned *>(p); }
UPCAST_INLINE void store(float *p, vf v) { *reinterpret_cast<vf_unaligned *>(p) = v; }
UPCAST_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
UPCAST_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
UPCAST_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
UPCAST_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }
UPCAST_INLINE void prefetch(const void *p) { __builtin_prefetch(p, 0, 3); }
// Into the second-level cache: what the nearest one has no room for yet.
UPCAST_INLINE void prefetch_far(const void *p) { __builtin_prefetch(p, 0, 2); }

#if UPCAST_AVX512

UPCAST_INLINE vf load_half(const uint16_t *p) {
    // The zeroing form with a full mask is the same instruction; gcc 12 warns about the plain one.
    return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
UPCAST_INLINE void store_half(uint16_t *p, vf v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                        _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
UPCAST_INLINE vf load_part(const float *p, int count) {
    return (vf)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
}
UPCAST_INLINE void store_part(float *p, vf v, int count) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), (__m512)v);
}
UPCAST_INLINE vf load_half_part(const uint16_t *p, int count) {
    const __mmask16 lanes = static_cast<__mmask16>((1u << count) - 1u);
    return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_maskz_loadu_epi16(lanes, p));
}
UPCAST_INLINE vf vsqrt(vf v) { return (vf)_mm512_sqrt_ps((__m512)v); }

#else

UPCAST_INLINE vf load_part(const float *p, int count) {
    vf v = {};
    memcpy(&v, p, sizeof(float) * static_cast<size_t>(count));
    return v;
}
UPCAST_INLINE void store_part(float *p, vf v, int count) {
    memcpy(p, &v, sizeof(float) * static_cast<size_t>(count));
}

#if UPCAST_LEVEL == 3
UPCAST_INLINE vf load_half(const uint16_t *p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
UPCAST_INLINE void store_half(uint16_t *p, vf v) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                     _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
UPCAST_INLINE vf vsqrt(vf v) { return (vf)_mm256_sqrt_ps((__m256)v); }
#elif UPCAST_LEVEL == 64
#if defined(__clang__)
UPCAST_INLINE vf load_half(const uint16_t *p) {
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
#else
// Without intrinsics: gcc takes each for a call that may read memory, and stores all sums of a tile in every step.
typedef uint16_t halves __attribute__((vector_size(8), aligned(2), may_alias));
UPCAST_INLINE vf load_half(const uint16_t *p) {
    vf wide;
    __asm__("fcvtl %0.4s, %1.4h" : "=w"(wide) : "w"(*reinterpret_cast<const halves *>(p)));
    return wide;
}
#endif
UPCAST_INLINE void store_half(uint16_t *p, vf v) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
UPCAST_INLINE vf vsqrt(vf v) { return (vf)vsqrtq_f32((float32x4_t)v); }
#else
// Integer arithmetic only, so that flush-to-zero modes cannot touch subnormal halves.
UPCAST_INLINE vf load_half(const uint16_t *p) {
    const vu half = {p[0], p[1], p[2], p[3]};
    const vu magnitude = half & 0x7fffu;
    const vu normal = (magnitude << 13) + (112u << 23);
    const vu subnormal = (vu)((vf)(magnitude | 0x3f000000u) - 0.5f);
    const vu special = normal + (112u << 23);
    const vu finite = magnitude < 0x400u ? subnormal : normal;
    return (vf)((magnitude >= 0x7c00u ? special : finite) | (half & 0x8000u) << 16);
}
UPCAST_INLINE void store_half(uint16_t *p, vf v) {
    const vu bits = (vu)v;
    const vu magnitude = bits & 0x7fffffffu;
    const vu special = magnitude > 0x7f800000u ? (vu{} + 0x7e00u) | ((magnitude >> 13) & 0x3ffu) : vu{} + 0x7c00u;
    const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u;
    const vu normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const vu finite = magnitude < 0x38800000u ? subnormal : normal;
    const vu half = (magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u);
    for (int i = 0; i < LANES; ++i) p[i] = static_cast<uint16_t>(half[i]);
}
UPCAST_INLINE vf vsqrt(vf v) {
    for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
}
#endif

UPCAST_INLINE vf load_half_part(const uint16_t *p, int count) {
    uint16_t full[LANES] = {};
    memcpy(full, p, sizeof(uint16_t) * static_cast<size_t>(count));
    return load_half(full);
}

#endif

UPCAST_INLINE void store_half_part(uint16_t *p, vf v, int count) {
    uint16_t full[LANES];
    store_half(full, v);
    memcpy(p, full, sizeof(uint16_t) * static_cast<size_t>(count));
}

// One name for both storage types, so that a kernel over a cache is written once.
UPCAST_INLINE vf load(const uint16_t *p) { return load_half(p); }
UPCAST_INLINE vf load_part(const uint16_t *p, int count) { return load_half_part(p, count); }

static void widen_row(const uint16_t *from, float *to, int64_t width) {
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(to + i, load_half(from + i));
    if (i == width) return;
    const int count = static_cast<int>(width - i);
    store_part(to + i, load_half_part(from + i, count), count);
}

// Pairs of vectors seen as blocks of S lanes: `low` keeps the even blocks of both, `high` the odd ones.
// The stages S = 1, 2, 4, ... of these two build the tree of sums below.
template <int S> struct Blocks;
#if UPCAST_LANES == 16
template <> struct Blocks<1> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31); }
};
template <> struct Blocks<2> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31); }
};
template <> struct Blocks<4> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31); }
};
template <> struct Blocks<8> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31); }
};
#elif UPCAST_LANES == 8
template <> struct Blocks<1> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15); }
};
template <> struct Blocks<2> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
};
template <> struct Blocks<4> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }
};
#else
template <> struct Blocks<1> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 4, 2, 6); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 1, 5, 3, 7); }
};
template <> struct Blocks<2> {
    static vf low(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 0, 1, 4, 5); }
    static vf high(vf a, vf b) { return UPCAST_SHUFFLE(a, b, 2, 3, 6, 7); }
};
#endif

// Lane i of the result is the sum of the lanes of parts[i]; destroys parts.
template <int S = 1> UPCAST_INLINE vf sum_each(vf *parts) {
    constexpr int PAIRS = LANES / S / 2;
    UPCAST_UNROLL
    for (int i = 0; i < PAIRS; ++i) {
        const vf a = parts[2 * i], b = parts[2 * i + 1];
        parts[i] = Blocks<S>::low(a, b) + Blocks<S>::high(a, b);
    }
    if constexpr (PAIRS > 1) return sum_each<2 * S>(parts);
    return parts[0];
}

// rows[i][j] becomes rows[j][i].
template <int S = 1> UPCAST_INLINE void transpose(vf *rows) {
    for (int i = 0; i < LANES; ++i) {
        if (i & S) continue;
        const vf a = rows[i], b = rows[i + S];
        rows[i] = Blocks<S>::low(a, b), rows[i + S] = Blocks<S>::high(a, b);
    }
    if constexpr (2 * S < LANES) transpose<2 * S>(rows);
}

// 0, 1, 2, ...
UPCAST_INLINE vi lane_numbers() {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    return lane;
}

// The first `count` lanes of v, the others from `rest`.
UPCAST_INLINE vf keep_part(vf v, vf rest, int count) { return select(lane_numbers() < count, v, rest); }

// In the order of sum_each, so that a number does not depend on how many others are summed beside it.
template <int S = 1> UPCAST_INLINE float sum(vf v) {
    const vf pairs = Blocks<S>::low(v, v) + Blocks<S>::high(v, v);
    if constexpr (2 * S < LANES) return sum<2 * S>(pairs);
    return pairs[0];
}

UPCAST_INLINE float maximum(vf v) {
    float result = v[0];
    for (int i = 1; i < LANES; ++i) result = v[i] > result ? v[i] : result;
    return result;
}

UPCAST_INLINE int32_t largest_lane(vi v) {
    int32_t result = v[0];
    for (int i = 1; i < LANES; ++i) result = v[i] > result ? v[i] : result;
    return result;
}

} // namespace UPCAST_NS
} // namespace upcast
