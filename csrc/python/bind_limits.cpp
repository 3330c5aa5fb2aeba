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

} // namespace upcast
