// What this processor does at most, for benchmarks that say how near a kernel comes: see simd/limits.hpp.
#include "python/bind.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/threads.hpp"

namespace upcast {
namespace {

struct Busy {
    const Level &level;
    int64_t rounds, operations;
};

void busy_task(void *context, int) {
    Busy &busy = *static_cast<Busy *>(context);
    __atomic_add_fetch(&busy.operations, busy.level.multiply_adds(busy.rounds), __ATOMIC_RELAXED);
}

struct Read {
    const Level &level;
    const float *data;
    int64_t count, streams;
    int threads;
    int32_t bits;
};

void read_task(void *context, int index) {
    Read &read = *static_cast<Read *>(context);
    const int64_t begin = read.count * index / read.threads, end = read.count * (index + 1) / read.threads;
    __atomic_or_fetch(&read.bits, read.level.read_memory(read.data + begin, end - begin, read.streams), __ATOMIC_RELAXED);
}

struct Regions {
    int64_t rounds;
    int threads;
    const char *caller;
    int64_t met; // tasks that another thread than the caller's ran
};

thread_local char mark;

void note_thread(void *context, int) {
    Regions &regions = *static_cast<Regions *>(context);
    if (&mark != regions.caller) __atomic_add_fetch(&regions.met, 1, __ATOMIC_RELAXED);
}

void run_regions(void *context) {
    Regions &regions = *static_cast<Regions *>(context);
    for (int64_t i = 0; i < regions.rounds; ++i) parallel(regions.threads, note_thread, &regions);
}

} // namespace

// multiply_adds(rounds, threads): how many floating-point operations that was
PyObject *py_multiply_adds(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int threads;
    Busy busy = {current_level(), 0, 0};
    if (!take_count("multiply_adds", count, 2) || !read_integer(args[0], busy.rounds) || !read_threads(args[1], threads)) {
        return nullptr;
    }
    {
        Released released;
        parallel(threads, busy_task, &busy);
    }
    return PyLong_FromLongLong(busy.operations);
}

// read_memory(x: float32, contiguous; streams per thread, threads)
PyObject *py_read_memory(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x");
    Read read = {current_level(), nullptr, 0, 0, 0, 0};
    if (!take_count("read_memory", count, 3) || !read_tensor(args[0], x) || !require_type(x, Type::float32)) return nullptr;
    if (!read_integer(args[1], read.streams) || !read_threads(args[2], read.threads)) return nullptr;
    if (x.ndim != 1 || (x.shape[0] > 1 && x.strides[0] != 1) || read.streams < 1 || read.streams > 64) {
        PyErr_SetString(error_class(), "read_memory takes a contiguous vector and 1 to 64 streams");
        return nullptr;
    }
    read.data = reinterpret_cast<const float *>(x.data), read.count = x.shape[0];
    {
        Released released;
        parallel(read.threads, read_task, &read);
    }
    return PyLong_FromLong(read.bits);
}

// regions(rounds, threads, together): so many regions of tasks that do nothing, with the pool's threads at hand or not;
// how many tasks ran on other threads than this one
PyObject *py_regions(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Regions regions = {0, 0, &mark, 0};
    bool team;
    if (!take_count("regions", count, 3) || !read_integer(args[0], regions.rounds)) return nullptr;
    if (!read_threads(args[1], regions.threads) || !read_bool(args[2], team)) return nullptr;
    {
        Released released;
        if (team) together(regions.threads, run_regions, &regions);
        else run_regions(&regions);
    }
    return PyLong_FromLongLong(regions.met);
}

} // namespace upcast
