// Packed bfloat16: a record of 64 numbers into vectors of floats, in their own order, and what escaped put back.
//
// The order of the bytes in a record is that in which interleaving its low and high bytes, lane by lane of 16 bytes,
// leaves pairs of numbers in words of 32 bits: the lower half of a word belongs to one vector of the record, the
// upper half to another. So one shift or one mask widens a vector, whatever its length.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/simd.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t RECORD = 64, RECORD_BYTES = 96, CODE_BYTES = 32;
constexpr int RECORD_VECTORS = 64 / LANES;

UPCAST_INLINE vf lower_half(vu pairs) { return (vf)(pairs << 16); }
UPCAST_INLINE vf upper_half(vu pairs) { return (vf)(pairs & 0xffff0000u); }

#if UPCAST_AVX512

// The forms with a mask: gcc 12 warns about the plain ones.
struct HighBytesOf {
    __m512i table, shifts;
    explicit HighBytesOf(const uint8_t *from)
        : table(_mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i *>(from)))),
          shifts(_mm512_maskz_broadcast_i64x4(0xff, __m256i{})) {
        shifts = _mm512_mask_set1_epi16(shifts, 0xffff0000u, 4);
    }
};

// Two vectors of pairs: numbers 0 to 15 below 16 to 31, and 32 to 47 below 48 to 63.
UPCAST_INLINE void unpack_pairs(const uint8_t *record, const HighBytesOf &high, vu *out) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(record));
    const __m512i low = _mm512_loadu_si512(record + CODE_BYTES);
    const __m512i twice = _mm512_maskz_broadcast_i64x4(0xff, packed);
    const __m512i codes = (__m512i)((vu)_mm512_maskz_srlv_epi16(~0u, twice, high.shifts) & 0x0f0f0f0fu);
    const __m512i bytes = _mm512_maskz_shuffle_epi8(~0ull, high.table, codes);
    out[0] = (vu)_mm512_maskz_unpacklo_epi8(~0ull, low, bytes);
    out[1] = (vu)_mm512_maskz_unpackhi_epi8(~0ull, low, bytes);
}

UPCAST_INLINE void unpack_record(const uint8_t *record, const HighBytesOf &high, vf *out) {
    vu pairs[2];
    unpack_pairs(record, high, pairs);
    out[0] = lower_half(pairs[0]), out[1] = upper_half(pairs[0]), out[2] = lower_half(pairs[1]), out[3] = upper_half(pairs[1]);
}

#elif UPCAST_LEVEL == 3

struct HighBytesOf {
    __m256i table;
    explicit HighBytesOf(const uint8_t *from)
        : table(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)))) {}
};

UPCAST_INLINE void unpack_record(const uint8_t *record, const HighBytesOf &high, vf *out) {
    const __m256i *at = reinterpret_cast<const __m256i *>(record);
    const __m256i packed = _mm256_loadu_si256(at), mask = _mm256_set1_epi8(15);
    UPCAST_UNROLL
    for (int i = 0; i < 2; ++i) {
        const __m256i codes = _mm256_and_si256(i ? _mm256_srli_epi16(packed, 4) : packed, mask);
        const __m256i bytes = _mm256_shuffle_epi8(high.table, codes), low = _mm256_loadu_si256(at + 1 + i);
        const vu first = (vu)_mm256_unpacklo_epi8(low, bytes), second = (vu)_mm256_unpackhi_epi8(low, bytes);
        out[i] = lower_half(first), out[2 + i] = upper_half(first);
        out[4 + i] = lower_half(second), out[6 + i] = upper_half(second);
    }
}

#elif UPCAST_LEVEL == 64

struct HighBytesOf {
    uint8x16_t table;
    explicit HighBytesOf(const uint8_t *from) : table(vld1q_u8(from)) {}
};

UPCAST_INLINE void unpack_record(const uint8_t *record, const HighBytesOf &high, vf *out) {
    UPCAST_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint8x16_t packed = vld1q_u8(record + i % 2 * 16), low = vld1q_u8(record + CODE_BYTES + i * 16);
        const uint8x16_t codes = i < 2 ? vandq_u8(packed, vdupq_n_u8(15)) : vshrq_n_u8(packed, 4);
        const uint8x16_t bytes = vqtbl1q_u8(high.table, codes);
        const vu first = (vu)vzip1q_u8(low, bytes), second = (vu)vzip2q_u8(low, bytes);
        out[i] = lower_half(first), out[4 + i] = upper_half(first);
        out[8 + i] = lower_half(second), out[12 + i] = upper_half(second);
    }
}

#else

struct HighBytesOf {
    const uint8_t *table;
    explicit HighBytesOf(const uint8_t *from) : table(from) {}
};

// Nothing looks bytes up here: one number at a time.
UPCAST_INLINE void unpack_record(const uint8_t *record, const HighBytesOf &high, vf *out) {
    for (int half = 0; half < 2; ++half) {
        for (int byte = 0; byte < 32; ++byte) {
            const int lane = byte / 16 + 2 * half, within = byte % 16;
            const int vector = within / 8 * 2 + within % 2, number = 16 * vector + 4 * lane + within % 8 / 2;
            const uint32_t code = record[byte] >> (4 * half) & 15u, low = record[CODE_BYTES + 32 * half + byte];
            const uint32_t bits = static_cast<uint32_t>(high.table[code]) << 24 | low << 16;
            memcpy(reinterpret_cast<char *>(out) + 4 * number, &bits, sizeof bits);
        }
    }
}

#endif

UPCAST_INLINE int64_t read_32(const uint8_t *from, int64_t index) {
    uint32_t value;
    memcpy(&value, from + 4 * index, sizeof value);
    return value;
}

// The escapes of one row, taken in the order of their columns.
struct Escapes {
    static constexpr int64_t NONE = INT64_MAX;
    const uint8_t *columns, *values;
    int64_t at, end, next; // next: the column of the one at `at`

    UPCAST_INLINE Escapes none() { return {nullptr, nullptr, 0, 0, NONE}; }
    UPCAST_INLINE Escapes of(const PackedRows &a, int64_t row) {
        Escapes e = {a.columns, a.values, 0, 0, NONE};
        if (!a.pointers) return e;
        e.at = least(a.escapes, read_32(a.pointers, a.first + row));
        e.end = least(a.escapes, read_32(a.pointers, a.first + row + 1));
        e.look();
        return e;
    }
    UPCAST_ALWAYS_INLINE void look() { next = at < end ? read_32(columns, at) : NONE; }
    // On to those from column k on.
    void skip(int64_t k) {
        int64_t beyond = end;
        while (at < beyond) {
            const int64_t middle = at + (beyond - at) / 2;
            if (read_32(columns, middle) < k) at = middle + 1;
            else beyond = middle;
        }
        look();
    }
    UPCAST_ALWAYS_INLINE float value() const {
        const uint32_t bits = static_cast<uint32_t>(values[2 * at] | values[2 * at + 1] << 8) << 16;
        float number;
        memcpy(&number, &bits, sizeof number);
        return number;
    }
    // Puts those of the record that begins with column k into it.
    UPCAST_ALWAYS_INLINE void put(int64_t k, vf *numbers) {
        for (; next < k + RECORD; ++at, look()) {
            const int column = static_cast<int>(next - k); // below 0 only in a list that is out of order
            const vf number = splat(value());
            UPCAST_UNROLL
            for (int v = 0; v < RECORD_VECTORS; ++v) numbers[v] = select(lane_numbers() == column - v * LANES, number, numbers[v]);
        }
    }
    // Puts those of [k, k + count) into out, which holds these columns.
    void patch(int64_t k, int64_t count, float *out) {
        for (; next < k + count; ++at, look()) {
            if (next < k) continue; // only in a list that is out of order
            out[next - k] = value();
        }
    }
};

UPCAST_INLINE const uint8_t *record_of(const PackedRows &a, int64_t row, int64_t k) {
    return a.records + (a.first + row) * a.row_bytes + k / RECORD * RECORD_BYTES;
}

// `count` numbers from the beginning of a record on, as stored.
UPCAST_INLINE void unpack_some(const uint8_t *record, const HighBytesOf &high, int64_t count, float *out) {
    for (; count >= RECORD; count -= RECORD, record += RECORD_BYTES, out += RECORD) {
        vf numbers[RECORD_VECTORS];
        unpack_record(record, high, numbers);
        UPCAST_UNROLL
        for (int i = 0; i < RECORD_VECTORS; ++i) store(out + i * LANES, numbers[i]);
    }
    if (count <= 0) return;
    vf numbers[RECORD_VECTORS];
    unpack_record(record, high, numbers);
    memcpy(out, numbers, sizeof(float) * static_cast<size_t>(count));
}

// Numbers [k, k + count) of a row; k begins a record.
static void widen_packed(const PackedRows &a, int64_t row, int64_t k, int64_t count, float *out) {
    unpack_some(record_of(a, row, k), HighBytesOf(a.table), count, out);
    if (!a.pointers) return;
    Escapes escapes = Escapes::of(a, row);
    if (k) escapes.skip(k);
    escapes.patch(k, count, out);
}

} // namespace UPCAST_NS
} // namespace upcast
