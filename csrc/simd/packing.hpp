// Numbers into packed rows, and back: see packed.hpp for the format.
#pragma once

#include "runtime/kernels.hpp"
#include "simd/packed.hpp"

namespace upcast {
namespace UPCAST_NS {

constexpr int64_t PIECE_NUMBERS = 4096; // looked at at once, in the nearest cache

static bool narrow(const float *from, int64_t count, uint16_t *bits) {
    uint32_t rest = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t number;
        memcpy(&number, from + i, sizeof number);
        rest |= number & 0xffffu;
        bits[i] = static_cast<uint16_t>(number >> 16);
    }
    return rest == 0;
}

// A NaN becomes a quiet one, as the processor's own conversion has it.
static bool narrow(const uint16_t *from, int64_t count, uint16_t *bits) {
    float wide[RECORD];
    bool exact = true;
    for (int64_t i = 0; i < count; i += RECORD) {
        const int64_t some = least(RECORD, count - i);
        widen_row(from + i, wide, some);
        exact &= narrow(wide, some, bits + i);
    }
    for (int64_t i = 0; i < count; ++i)
        if ((from[i] & 0x7fff) > 0x7c00) bits[i] |= 0x40;
    return exact;
}

// Numbers [begin, begin + count) as bfloat16, at `bits` if they are not that already; whether all are.
static bool bits_of(const Numbers &from, int64_t begin, int64_t count, uint16_t *room, const uint16_t *&bits) {
    bits = room;
    if (from.type == Number::float32) return narrow(static_cast<const float *>(from.data) + begin, count, room);
    const uint16_t *stored = static_cast<const uint16_t *>(from.data) + begin;
    if (from.type == Number::float16) return narrow(stored, count, room);
    bits = stored;
    return true;
}

static void examine(const Numbers &from, int64_t begin, int64_t end, HighBytes &found) {
    uint16_t room[PIECE_NUMBERS];
    uint32_t counts[4][256]; // four, since the same byte often comes twice in a row
    for (int64_t at = begin; at < end; at += PIECE_NUMBERS) {
        const int64_t count = least(PIECE_NUMBERS, end - at);
        const uint16_t *bits;
        found.exact &= bits_of(from, at, count, room, bits);
        memset(counts, 0, sizeof counts);
        int64_t i = 0;
        for (; i + 4 <= count; i += 4)
            for (int64_t j = 0; j < 4; ++j) ++counts[j][bits[i + j] >> 8];
        for (; i < count; ++i) ++counts[0][bits[i] >> 8];
        uint32_t zeros = 0;
        for (i = 0; i < count; ++i) zeros += bits[i] == 0;
        for (int byte = 0; byte < 256; ++byte)
            found.counts[byte] += counts[0][byte] + counts[1][byte] + counts[2][byte] + counts[3][byte];
        found.counts[0] -= zeros;
    }
}

// The code of each high byte that the table has; 0 for the others.
struct Codes {
    uint8_t of[256];
    explicit Codes(const uint8_t *table) {
        memset(of, 0, sizeof of);
        for (int code = 15; code > 0; --code) of[table[code]] = static_cast<uint8_t>(code);
    }
};

// One more number that the table does not have, in this column.
static void list_escape(EscapeList &escapes, int64_t column, uint16_t bits) {
    if (escapes.count < escapes.room) {
        const uint32_t place = static_cast<uint32_t>(column);
        memcpy(escapes.columns + 4 * escapes.count, &place, sizeof place);
        memcpy(escapes.values + 2 * escapes.count, &bits, sizeof bits);
    }
    ++escapes.count;
}

// 64 numbers of a row, from `column` on.
static void pack_record(const uint16_t *bits, const Codes &codes, int64_t column, uint8_t *record, EscapeList &escapes) {
    uint8_t code[RECORD], high[RECORD], *low = record + CODE_BYTES;
    for (int half = 0; half < 2; ++half) {
        // Words of two bytes, of one vector and of the next; four words are neighbours.
        uint16_t low_words[16], high_words[16];
        for (int n = 0; n < 16; ++n) {
            const uint16_t first = bits[32 * half + n], second = bits[32 * half + 16 + n];
            low_words[n] = static_cast<uint16_t>((first & 0xff) | second << 8);
            high_words[n] = static_cast<uint16_t>(first >> 8 | (second & 0xff00));
        }
        for (int lane = 0; lane < 4; ++lane) {
            memcpy(low + 16 * lane + 8 * half, low_words + 4 * lane, 8);
            memcpy(high + 16 * lane + 8 * half, high_words + 4 * lane, 8);
        }
    }
    for (int byte = 0; byte < RECORD; ++byte) code[byte] = codes.of[high[byte]];
    uint8_t absent = 0, zero = 0;
    for (int byte = 0; byte < RECORD; ++byte) absent |= code[byte] == 0;
    for (int n = 0; n < RECORD; ++n) zero |= bits[n] == 0;
    if (absent || zero) {
        for (int n = 0; n < RECORD; ++n) {
            const int byte = n % 16 / 4 * 16 + n / 32 * 8 + n % 4 * 2 + n / 16 % 2;
            if (bits[n] == 0) code[byte] = 0;
            else if (code[byte] == 0) low[byte] = 0, list_escape(escapes, column + n, bits[n]);
        }
    }
    for (int byte = 0; byte < CODE_BYTES; ++byte)
        record[byte] = static_cast<uint8_t>(code[byte] | code[byte + CODE_BYTES] << 4);
}

static void pack_row(const Packing &a, const Codes &codes, int64_t row, EscapeList &escapes) {
    const int64_t columns = a.from.columns, all = (columns + RECORD - 1) / RECORD;
    uint8_t *record = a.records + row * all * RECORD_BYTES;
    for (int64_t k = 0; k < columns; k += RECORD, record += RECORD_BYTES) {
        const int64_t count = least(RECORD, columns - k);
        uint16_t room[RECORD];
        const uint16_t *bits;
        escapes.exact &= bits_of(a.from, row * columns + k, count, room, bits);
        if (count < RECORD) {
            uint16_t padded[RECORD] = {};
            memcpy(padded, bits, sizeof(uint16_t) * static_cast<size_t>(count));
            pack_record(padded, codes, k, record, escapes);
        } else {
            pack_record(bits, codes, k, record, escapes);
        }
    }
}

static void pack(const Packing &a, int64_t begin, int64_t end, EscapeList &escapes) {
    const Codes codes(a.table);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t before = escapes.count;
        pack_row(a, codes, row, escapes);
        const uint32_t found = static_cast<uint32_t>(escapes.count - before);
        if (a.pointers) memcpy(a.pointers + 4 * row, &found, sizeof found);
    }
}

static void unpack(const Unpacking &a, int64_t begin, int64_t end) {
    float wide[PIECE_NUMBERS];
    for (int64_t row = begin; row < end; ++row) {
        if (a.wide) {
            widen_packed(a.packed, row, 0, a.width, static_cast<float *>(a.out) + row * a.width);
            continue;
        }
        uint16_t *out = static_cast<uint16_t *>(a.out) + row * a.width;
        for (int64_t k = 0; k < a.width; k += PIECE_NUMBERS) {
            const int64_t count = least(PIECE_NUMBERS, a.width - k);
            widen_packed(a.packed, row, k, count, wide);
            narrow(wide, count, out + k);
        }
    }
}

} // namespace UPCAST_NS
} // namespace upcast
