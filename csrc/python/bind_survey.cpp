// Numbers looked at, rounded to float16, sampled and compared, for Python.
#include "python/bind.hpp"
#include "runtime/dispatch.hpp"

#include <string.h>

namespace upcast {
namespace {

bool check_numbers(const Tensor &x, const Tensor &out) {
    if (x.type != Type::float16 && !require_type(x, Type::float32)) return false;
    if (!require_contiguous(x)) return false;
    if (!out.present) return true;
    if (!require_type(x, Type::float32) || !require_type(out, Type::float16) || !require_contiguous(out)) return false;
    if (out.count() == x.count()) return true;
    PyErr_Format(error_class(), "out has %lld elements for %lld; they must agree. Check the shapes.",
                 static_cast<long long>(out.count()), static_cast<long long>(x.count()));
    return false;
}

// Which numbers of a tensor are kept for comparison, and where: each `step`-th of x, in row-major order, in a row.
struct Kept {
    int64_t step, count;
    float *numbers;
};

bool check_kept(const Tensor &x, int64_t step, const Tensor &kept, int64_t row, Kept &place) {
    if (x.type != Type::float16 && !require_type(x, Type::float32)) return false;
    if (!require_type(kept, Type::float32) || !require_dims(kept, 2) || !require_contiguous(kept)) return false;
    if (step < 1 || row < 0 || row >= kept.shape[0]) {
        PyErr_Format(error_class(), "each %lld-th number into row %lld of %lld; steps count from 1, and the row must be "
                     "there. Check both.", static_cast<long long>(step), static_cast<long long>(row),
                     static_cast<long long>(kept.shape[0]));
        return false;
    }
    const int64_t there = x.count() > 0 ? (x.count() - 1) / step + 1 : 0, width = kept.shape[1];
    place = {step, there < width ? there : width, kept.as<float>() + row * width};
    return true;
}

// Whether memory holds the numbers side by side, in whatever order: no gaps, and none of them twice.
bool lies_dense(const Tensor &x) {
    if (x.count() == 0) return true;
    int order[Tensor::MOST_DIMS];
    for (int i = 0; i < x.ndim; ++i) {
        int at = i;
        for (; at > 0 && x.strides[order[at - 1]] > x.strides[i]; --at) order[at] = order[at - 1];
        order[at] = i;
    }
    int64_t expected = 1;
    for (int i = 0; i < x.ndim; ++i) {
        if (x.shape[order[i]] == 1) continue;
        if (x.strides[order[i]] != expected) return false;
        expected *= x.shape[order[i]];
    }
    return true;
}

Surveyed look_over(const Tensor &x, const Survey &job, int threads) {
    Released released;
    return launch_survey(current_level(), job, x.count(), threads);
}

Survey reading(const Tensor &x) {
    const bool wide = x.type == Type::float32;
    return {wide ? x.as<const float>() : nullptr, wide ? nullptr : x.as<const uint16_t>(), false, nullptr};
}

// Where the element is that comes at `place` in row-major order.
int64_t offset_of(const Tensor &x, int64_t place) {
    int64_t offset = 0;
    for (int dim = x.ndim - 1; dim > 0; --dim) {
        offset += place % x.shape[dim] * x.strides[dim];
        place /= x.shape[dim];
    }
    return x.ndim > 0 ? offset + place * x.strides[0] : 0;
}

void sample_floats(const Tensor &x, int64_t first, int64_t step, int64_t count, float *out) {
    const float *from = x.as<const float>();
    for (int64_t i = 0; i < count; ++i) out[i] = from[offset_of(x, (first + i) * step)];
}

constexpr int64_t AT_ONCE = 256;

void sample_halves(const Tensor &x, int64_t first, int64_t step, int64_t count, float *out) {
    constexpr int64_t FIRST = 0;
    const uint16_t *from = x.as<const uint16_t>();
    uint16_t halves[AT_ONCE];
    for (int64_t i = 0; i < count; ++i) halves[i] = from[offset_of(x, (first + i) * step)];
    current_level().embedding({halves, 0, &FIRST, out, 1, count, {}}, 0, 1); // one row, widened
}

// Calls use(i, numbers, count) for the numbers of x that `kept` stands for, from the i-th on.
template <class Use> void each_sample(const Tensor &x, const Kept &kept, Use use) {
    float numbers[AT_ONCE];
    for (int64_t begin = 0; begin < kept.count; begin += AT_ONCE) {
        const int64_t count = kept.count - begin < AT_ONCE ? kept.count - begin : AT_ONCE;
        (x.type == Type::float32 ? sample_floats : sample_halves)(x, begin, kept.step, count, numbers);
        use(begin, numbers, count);
    }
}

bool take_sample(PyObject *const *args, Tensor &x, Kept &place) {
    Tensor kept("kept");
    int64_t step, row;
    if (!read_tensor(args[0], x) || !read_integer(args[1], step) || !read_tensor(args[2], kept)) return false;
    return read_integer(args[3], row) && check_kept(x, step, kept, row, place);
}

PyObject *as_tuple(const Surveyed &found) {
    return Py_BuildValue("(ddLLLL)", static_cast<double>(found.largest), static_cast<double>(found.max_error),
                         static_cast<long long>(found.nonfinite), static_cast<long long>(found.out_of_range),
                         static_cast<long long>(found.nonzero), static_cast<long long>(found.flushed));
}

} // namespace

// survey(x, rounds, out | None, threads): (largest, max_error, nonfinite, out_of_range, nonzero, flushed)
PyObject *py_survey(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x"), out("out");
    bool rounds;
    int threads;
    if (!take_count("survey", count, 4) || !read_tensor(args[0], x) || !read_bool(args[1], rounds)) return nullptr;
    if (!read_tensor(args[2], out, true) || !read_threads(args[3], threads) || !check_numbers(x, out)) return nullptr;
    Survey job = reading(x);
    job.rounds = rounds || out.present;
    job.out = out.present ? out.as<uint16_t>() : nullptr;
    return as_tuple(look_over(x, job, threads));
}

// look(x, step, kept, row, threads): as survey, and every step-th number into kept[row]; None if x has gaps
PyObject *py_look(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x");
    Kept kept;
    int threads;
    if (!take_count("look", count, 5) || !take_sample(args, x, kept) || !read_threads(args[4], threads)) return nullptr;
    if (!lies_dense(x)) Py_RETURN_NONE;
    each_sample(x, kept, [&](int64_t begin, const float *numbers, int64_t some) {
        memcpy(kept.numbers + begin, numbers, static_cast<size_t>(some) * sizeof(float));
    });
    return as_tuple(look_over(x, reading(x), threads));
}

// compare(x, step, kept, row, bound, threads): how many of x are not finite, and the sums of (a - b)^2 and b^2 over
// its samples a and kept[row]'s b, where a is finite and b's magnitude below the bound; None if x has gaps
PyObject *py_compare(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x");
    Kept kept;
    float bound;
    int threads;
    if (!take_count("compare", count, 6) || !take_sample(args, x, kept)) return nullptr;
    if (!read_float(args[4], bound) || !read_threads(args[5], threads)) return nullptr;
    if (!lies_dense(x)) Py_RETURN_NONE;
    double off = 0, size = 0;
    each_sample(x, kept, [&](int64_t begin, const float *numbers, int64_t some) {
        for (int64_t i = 0; i < some; ++i) {
            const double a = numbers[i], b = kept.numbers[begin + i];
            const bool usable = a - a == 0 && b < bound && -b < bound;
            off += usable ? (a - b) * (a - b) : 0, size += usable ? b * b : 0;
        }
    });
    return Py_BuildValue("(Ldd)", static_cast<long long>(look_over(x, reading(x), threads).nonfinite), off, size);
}

} // namespace upcast
