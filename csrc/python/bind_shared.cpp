// Ranks on one host wait for each other on counters in memory that they share, and add up what each has put there.
#include "python/bind.hpp"
#include "runtime/system.hpp"

#include <string.h>

namespace upcast {
namespace {

constexpr int64_t LINE = 8;                   // int64 in a cache line: each rank's counter has one of its own
constexpr int64_t SPIN = INT64_C(50000);      // nanoseconds of spinning, before others may have the core
constexpr int64_t YIELD = INT64_C(2000000);   // and of yielding it, before sleeping
constexpr int64_t NAP = INT64_C(50000);

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
    const int64_t start = nanoseconds();
    for (;;) {
        for (int i = 0; i < 32; ++i) {
            if (first_late(counters, ranks, turn) < 0) return -1;
            relax();
        }
        const int64_t waited = nanoseconds() - start;
        if (waited > most) return first_late(counters, ranks, turn);
        if (waited > YIELD) nap(NAP);
        else if (waited > SPIN) yield_core();
    }
}

bool check_rank(const Tensor &counters, int64_t rank) {
    if (!require_type(counters, Type::int64) || !require_dims(counters, 2) || !require_contiguous(counters)) return false;
    if (counters.shape[1] == LINE && rank >= 0 && rank < counters.shape[0]) return true;
    PyErr_Format(error_class(), "counters have %lld columns and %lld rows for rank %lld; a rank has a row of %lld. "
                 "Check the shapes.", static_cast<long long>(counters.shape[1]),
                 static_cast<long long>(counters.shape[0]), static_cast<long long>(rank), static_cast<long long>(LINE));
    return false;
}

bool check_places(const Tensor &x, const Tensor &places, const Tensor &counters) {
    if (!require_type(x, Type::float32) || !require_contiguous(x)) return false;
    if (!require_type(places, Type::float32) || !require_dims(places, 2) || !require_contiguous(places)) return false;
    if (places.shape[0] == counters.shape[0] && x.count() <= places.shape[1]) return true;
    PyErr_Format(error_class(), "%lld numbers for %lld places of %lld, and %lld ranks; each rank has a place, and the "
                 "numbers fit into it. Check the shapes.", static_cast<long long>(x.count()),
                 static_cast<long long>(places.shape[0]), static_cast<long long>(places.shape[1]),
                 static_cast<long long>(counters.shape[0]));
    return false;
}

void add_rows(const float *rows, int64_t count, int64_t stride, int64_t width, float *sum) {
    if (width == 0) return;
    memcpy(sum, rows, sizeof(float) * static_cast<size_t>(width));
    for (int64_t row = 1; row < count; ++row) {
        const float *each = rows + row * stride;
        for (int64_t i = 0; i < width; ++i) sum[i] += each[i];
    }
}

} // namespace

// meet(counters, rank, turn, nanoseconds): -1, or the first rank that was late
PyObject *py_meet(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor counters("counters");
    int64_t rank, turn, most, late;
    if (!take_count("meet", count, 4) || !read_tensor(args[0], counters)) return nullptr;
    if (!read_integer(args[1], rank) || !read_integer(args[2], turn) || !read_integer(args[3], most)) return nullptr;
    if (!check_rank(counters, rank)) return nullptr;
    {
        Released released;
        late = meet(counters.as<int64_t>(), counters.shape[0], rank, turn, most);
    }
    return PyLong_FromLongLong(late);
}

// add_up(x, places, counters, rank, turn, nanoseconds): as meet, with x in this rank's place before and, unless a rank
// was late, the sum of all places in x after, added in the order of ranks
PyObject *py_add_up(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x"), places("places"), counters("counters");
    int64_t rank, turn, most, late;
    if (!take_count("add_up", count, 6) || !read_tensor(args[0], x) || !read_tensor(args[1], places)) return nullptr;
    if (!read_tensor(args[2], counters) || !read_integer(args[3], rank) || !read_integer(args[4], turn)) return nullptr;
    if (!read_integer(args[5], most) || !check_rank(counters, rank) || !check_places(x, places, counters)) return nullptr;
    {
        Released released;
        const int64_t width = x.count(), stride = places.shape[1], ranks = counters.shape[0];
        if (width) memcpy(places.as<float>() + rank * stride, x.data, sizeof(float) * static_cast<size_t>(width));
        late = meet(counters.as<int64_t>(), ranks, rank, turn, most);
        if (late < 0) add_rows(places.as<const float>(), ranks, stride, width, x.as<float>());
    }
    return PyLong_FromLongLong(late);
}

} // namespace upcast
