// Compiled without instruction-set flags: a check that itself needs AVX could not say that there is none.
#include "runtime/dispatch.hpp"

#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace upcast {

#if defined(__x86_64__)

// What both the processor and the operating system's register saving support.
struct Features {
    bool v3, v4, amx, amx_fp16;
};

static uint64_t saved_registers() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Linux saves the tiles of a process only after the process has asked for it.
static bool tiles_granted() {
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

static Features detect() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
    const uint32_t osxsave = 1u << 27, avx = 1u << 28, f16c = 1u << 29, fma = 1u << 12;
    const uint32_t base = osxsave | avx | f16c | fma;
    if ((c & base) != base) return {};
    const uint64_t ymm = 0x6, zmm = 0xe6, saved = saved_registers();
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
    const uint32_t last_subleaf = a, avx2 = 1u << 5, avx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; // F, DQ, BW, VL
    Features features = {};
    features.v3 = (saved & ymm) == ymm && (b & avx2) != 0;
    features.v4 = features.v3 && (saved & zmm) == zmm && (b & avx512) == avx512;
    const uint32_t amx = 1u << 22 | 1u << 24; // bfloat16 products, tiles
    const uint64_t tiles = 0x60000;
    features.amx = features.v4 && (saved & tiles) == tiles && (d & amx) == amx && tiles_granted();
    const bool has_more = features.amx && last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d);
    features.amx_fp16 = has_more && (a & 1u << 21) != 0;
    return features;
}

#endif

int available_levels(const Level *levels[MOST_LEVELS]) {
    int count = 0;
#if defined(__x86_64__)
    const Features features = detect();
#ifdef UPCAST_HAVE_X86_64_V4_AMX_FP16
    if (features.amx_fp16 && amx_fp16_works()) levels[count++] = &kernels_x86_64_v4_amx_fp16();
#endif
#ifdef UPCAST_HAVE_X86_64_V4_AMX
    if (features.amx) levels[count++] = &kernels_x86_64_v4_amx();
#endif
#ifdef UPCAST_HAVE_X86_64_V4
    if (features.v4) levels[count++] = &kernels_x86_64_v4();
#endif
#ifdef UPCAST_HAVE_X86_64_V3
    if (features.v3) levels[count++] = &kernels_x86_64_v3();
#endif
    static_cast<void>(features);
    levels[count++] = &kernels_x86_64();
#else
    levels[count++] = &kernels_aarch64();
#endif
    return count;
}

static const Level *best_level() {
    const Level *levels[MOST_LEVELS];
    available_levels(levels);
    return levels[0];
}

// Written by force_level only; a pointer, read and written whole, so that calls in flight keep a level.
static const Level *in_use = nullptr;

const Level &current_level() {
    const Level *level = __atomic_load_n(&in_use, __ATOMIC_ACQUIRE);
    if (level) return *level;
    level = best_level();
    __atomic_store_n(&in_use, level, __ATOMIC_RELEASE);
    return *level;
}

bool force_level(const char *name) {
    const Level *levels[MOST_LEVELS];
    const int count = available_levels(levels);
    for (int i = 0; i < count; ++i) {
        if (strcmp(levels[i]->name, name) != 0) continue;
        __atomic_store_n(&in_use, levels[i], __ATOMIC_RELEASE);
        return true;
    }
    return false;
}

} // namespace upcast
