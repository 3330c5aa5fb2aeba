// A checksum of the bytes of many tensors: whether memory that anyone may have written to is what it was.
//
// The inner loop is that of wyhash and rapidhash: a 64 x 64 -> 128 bit product takes in 16 bytes. It keeps its operands
// (rapidhash's protected form), so that no value of one wipes out what came before. Four products run side by side,
// which is faster than memory. A piece's place and length count, whichever thread reads it.
#pragma once
#include "runtime/threads.hpp"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace upcast {
namespace {

constexpr int64_t PIECE = 1 << 18; // bytes
constexpr int64_t AHEAD = 2048;    // bytes: the processor's own reading ahead stops at each page
constexpr int LANES = 4;
constexpr uint64_t SECRET[LANES] = {UINT64_C(0x9e3779b97f4a7c15), UINT64_C(0xbf58476d1ce4e5b9),
                                    UINT64_C(0x94d049bb133111eb), UINT64_C(0xd6e8feb86659fd93)};

uint64_t mix(uint64_t a, uint64_t b) {
    __extension__ typedef unsigned __int128 Wide;
    const Wide product = static_cast<Wide>(a) * b;
    return a ^ static_cast<uint64_t>(product) ^ b ^ static_cast<uint64_t>(product >> 64);
}

uint64_t word(const char *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

uint64_t digest_bytes(const char *data, int64_t bytes, uint64_t seed) {
    constexpr int64_t STRIPE = 16 * LANES;
    uint64_t lanes[LANES];
    for (int i = 0; i < LANES; ++i) lanes[i] = mix(seed ^ SECRET[i], static_cast<uint64_t>(bytes) ^ SECRET[3 - i]);
    char rest[STRIPE] = {};
    int64_t at = 0;
    const auto take = [&](const char *stripe) {
        for (int i = 0; i < LANES; ++i)
            lanes[i] = mix(word(stripe + 16 * i) ^ SECRET[i], word(stripe + 16 * i + 8) ^ lanes[i]);
    };
    for (; at + STRIPE <= bytes; at += STRIPE) {
        __builtin_prefetch(data + at + AHEAD);
        take(data + at);
    }
    if (at < bytes) {
        memcpy(rest, data + at, static_cast<size_t>(bytes - at));
        take(rest);
    }
    uint64_t result = SECRET[0];
    for (int i = 0; i < LANES; ++i) result = mix(result ^ lanes[i], SECRET[i] + static_cast<uint64_t>(i));
    return result;
}

struct Piece {
    const char *data;
    int64_t bytes;
    uint64_t digest;
};

// Rows of adjacent bytes, cut to pieces. Grows as needed; without exceptions, and without libstdc++.
class Pieces {
  public:
    Pieces() = default;
    ~Pieces() { free(pieces_); }
    Pieces(const Pieces &) = delete;
    Pieces &operator=(const Pieces &) = delete;

    bool add(const char *row, int64_t bytes) {
        for (int64_t begin = 0; begin < bytes; begin += PIECE)
            if (!push({row + begin, bytes - begin < PIECE ? bytes - begin : PIECE, 0})) return false;
        return true;
    }

    uint64_t digest(int threads) {
        tasks_ = count_ < threads ? static_cast<int>(count_) : threads;
        if (tasks_ > 0) parallel(tasks_, task, this);
        uint64_t result = digest_bytes(nullptr, 0, static_cast<uint64_t>(count_));
        for (int64_t i = 0; i < count_; ++i) result = mix(result ^ SECRET[1], pieces_[i].digest ^ SECRET[2]);
        return result;
    }

  private:
    bool push(const Piece &piece) {
        if (count_ == room_) {
            const int64_t room = 2 * room_ + 64;
            void *larger = realloc(pieces_, static_cast<size_t>(room) * sizeof(Piece));
            if (!larger) return false;
            pieces_ = static_cast<Piece *>(larger), room_ = room;
        }
        pieces_[count_++] = piece;
        return true;
    }

    static void task(void *context, int index) {
        const Pieces &all = *static_cast<Pieces *>(context);
        for (int64_t i = index; i < all.count_; i += all.tasks_) { // side by side, as the threads go through memory
            Piece &piece = all.pieces_[i];
            piece.digest = digest_bytes(piece.data, piece.bytes, static_cast<uint64_t>(i));
        }
    }

    Piece *pieces_ = nullptr;
    int64_t count_ = 0, room_ = 0;
    int tasks_ = 0;
};

} // namespace
} // namespace upcast
