#include "runtime/tuning.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace upcast {

namespace {

enum class Family { any, intel, apple, other };

struct Row {
    Family family;
    Isa isa;
    Tuning tuning;
};

// The first row that fits counts. What each reading is: simd/linear_dot.hpp, simd/linear_far.hpp.
constexpr Row TABLE[] = {
    {Family::intel, Isa::any, {Reading::near_streams, 0}},    // measured on Intel's with AMX
    {Family::apple, Isa::any, {Reading::one_stream, 16}},     // not measured: Accelerate has a matrix unit to itself
    {Family::any, Isa::x86_64_v3, {Reading::far_streams, 0}}, // on Zen 3
    {Family::any, Isa::x86_64_v4, {Reading::far_streams, 0}}, // on Zen 4: an eighth; on Zen 5 nothing to a tenth
    {Family::any, Isa::any, {Reading::one_stream, 0}},
};

Family ask() {
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d)) return Family::other;
    if (b == 0x756e6547) return Family::intel; // "Genu" of GenuineIntel
#elif defined(__APPLE__)
    return Family::apple;
#endif
    return Family::other;
}

Family family() {
    // Asked once: a virtual machine answers cpuid in microseconds. An int: clang has no atomics of enumerations.
    static int known = static_cast<int>(Family::any);
    int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (found == static_cast<int>(Family::any)) __atomic_store_n(&known, found = static_cast<int>(ask()), __ATOMIC_RELAXED);
    return static_cast<Family>(found);
}

// What was measured here, of one instruction set: that in use. One word, since a kernel may read while it is set.
// From the lowest bit on: whether there is anything, 7 bits of the instruction set, 8 of the reading, torch_rows.
uint64_t measured = 0;

uint64_t as_word(Isa isa, const Tuning &tuning) {
    return 1 | static_cast<uint64_t>(isa) << 1 | static_cast<uint64_t>(tuning.reading) << 8 |
           static_cast<uint64_t>(tuning.torch_rows) << 16;
}

} // namespace

void set_tuning(Isa isa, const Tuning *tuning) {
    __atomic_store_n(&measured, tuning ? as_word(isa, *tuning) : 0, __ATOMIC_RELAXED);
}

Tuning tuning(Isa isa) {
    const uint64_t word = __atomic_load_n(&measured, __ATOMIC_RELAXED);
    if (word & 1 && (word >> 1 & 127) == static_cast<uint64_t>(isa)) {
        return {static_cast<Reading>(word >> 8 & 255), static_cast<int64_t>(word >> 16)};
    }
    const Family here = family();
    const Row *row = TABLE;
    while ((row->family != Family::any && row->family != here) || (row->isa != Isa::any && row->isa != isa)) ++row;
    return row->tuning;
}

} // namespace upcast
