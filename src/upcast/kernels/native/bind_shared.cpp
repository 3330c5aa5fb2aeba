// meet: ranks on one host wait for each other, on counters in memory that they share.
#include "bind.hpp"

#include <sched.h>
#include <time.h>

namespace upcast {
namespace {

constexpr int64_t LINE = 8;                   // int64 in a cache line: each rank's counter has one of its own
constexpr int64_t SPIN = INT64_C(50000);      // nanoseconds of spinning, before others may have the core
constexpr int64_t YIELD = INT64_C(2000000);   // and of yielding it, before sleeping
constexpr timespec NAP = {0, 50000};

int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

int64_t first_late(const int64_t *counters, int64_t ranks, int64_t turn) {
    for (int64_t rank = 0; rank < ranks; ++rank)
        if (__atomic_load_n(counters + rank * LINE, __ATOMIC_ACQUIRE) < turn) return rank;
    return -1;
}

// What this rank wrote before is seen by every rank for which it is not late, and the other way round.
int64_t meet(int64_t *counters, int64_t ranks, int64_t rank, int64_t turn, int64_t most) {
    __atomic_store_n(counters + rank * LINE, turn, __ATOMIC_RELEASE);
    const int64_t start = now();
    for (;;) {
        for (int i = 0; i < 32; ++i) {
            if (first_late(counters, ranks, turn) < 0) return -1;
            relax();
        }
        const int64_t waited = now() - start;
        if (waited > most) return first_late(counters, ranks, turn);
        if (waited > YIELD) nanosleep(&NAP, nullptr);
        else if (waited > SPIN) sched_yield();
    }
}

} // namespace

// meet(counters, rank, turn, nanoseconds): -1, or the first rank that was late
PyObject *py_meet(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor counters("counters");
    int64_t rank, turn, most, late;
    if (!take_count("meet", count, 4) || !read_tensor(args[0], counters) || !require_type(counters, Type::int64)) return nullptr;
    if (!require_dims(counters, 2) || !require_contiguous(counters)) return nullptr;
    if (!read_integer(args[1], rank) || !read_integer(args[2], turn) || !read_integer(args[3], most)) return nullptr;
    if (counters.shape[1] != LINE || rank < 0 || rank >= counters.shape[0]) {
        PyErr_Format(error_class(), "counters have %lld columns and %lld rows for rank %lld; a rank has a row of %lld. "
                     "Check the shapes.", static_cast<long long>(counters.shape[1]),
                     static_cast<long long>(counters.shape[0]), static_cast<long long>(rank), static_cast<long long>(LINE));
        return nullptr;
    }
    {
        Released released;
        late = meet(counters.as<int64_t>(), counters.shape[0], rank, turn, most);
    }
    return PyLong_FromLongLong(late);
}

} // namespace upcast
