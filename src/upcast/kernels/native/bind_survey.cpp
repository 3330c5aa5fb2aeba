// Numbers looked at, rounded to float16, sampled and compared, for Python.
#include "bind.hpp"
#include "dispatch.hpp"

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

bool check_sample(const Tensor &x, int64_t step, const Tensor &out) {
    if (x.type != Type::float16 && !require_type(x, Type::float32)) return false;
    if (!require_type(out, Type::float32) || !require_dims(out, 1) || !require_contiguous(out)) return false;
    const int64_t last = out.shape[0] - 1;
    if (last < 0 || (step > 0 && x.count() > 0 && last <= (x.count() - 1) / step)) return true;
    PyErr_Format(error_class(), "%lld numbers, each %lld after the other, of %lld; they must lie in the tensor. Take "
                 "fewer, or a smaller step.", static_cast<long long>(out.shape[0]), static_cast<long long>(step),
                 static_cast<long long>(x.count()));
    return false;
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

void sample_floats(const Tensor &x, int64_t step, const Tensor &out) {
    const float *from = x.as<const float>();
    for (int64_t i = 0; i < out.shape[0]; ++i) out.as<float>()[i] = from[offset_of(x, i * step)];
}

void sample_halves(const Tensor &x, int64_t step, const Tensor &out) {
    constexpr int64_t AT_ONCE = 512, FIRST = 0;
    const uint16_t *from = x.as<const uint16_t>();
    uint16_t halves[AT_ONCE];
    for (int64_t begin = 0; begin < out.shape[0]; begin += AT_ONCE) {
        const int64_t count = out.shape[0] - begin < AT_ONCE ? out.shape[0] - begin : AT_ONCE;
        for (int64_t i = 0; i < count; ++i) halves[i] = from[offset_of(x, (begin + i) * step)];
        current_level().embedding({halves, 0, &FIRST, out.as<float>() + begin, 1, count}, 0, 1); // one row, widened
    }
}

bool check_pair(const Tensor &got, const Tensor &want) {
    if (!require_type(got, Type::float32) || !require_contiguous(got)) return false;
    if (!require_type(want, Type::float32) || !require_contiguous(want)) return false;
    if (got.count() == want.count()) return true;
    PyErr_Format(error_class(), "%lld numbers beside %lld; they must be as many. Check the shapes.",
                 static_cast<long long>(got.count()), static_cast<long long>(want.count()));
    return false;
}

} // namespace

// survey(x, rounds, out | None, threads): (largest, max_error, nonfinite, out_of_range, nonzero, flushed)
PyObject *py_survey(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x"), out("out");
    bool rounds;
    int threads;
    if (!take_count("survey", count, 4) || !read_tensor(args[0], x) || !read_bool(args[1], rounds)) return nullptr;
    if (!read_tensor(args[2], out, true) || !read_threads(args[3], threads) || !check_numbers(x, out)) return nullptr;
    const bool wide = x.type == Type::float32;
    const Survey job = {wide ? x.as<const float>() : nullptr, wide ? nullptr : x.as<const uint16_t>(),
                        rounds || out.present, out.present ? out.as<uint16_t>() : nullptr};
    Surveyed found;
    {
        Released released;
        found = launch_survey(current_level(), job, x.count(), threads);
    }
    return Py_BuildValue("(ddLLLL)", static_cast<double>(found.largest), static_cast<double>(found.max_error),
                         static_cast<long long>(found.nonfinite), static_cast<long long>(found.out_of_range),
                         static_cast<long long>(found.nonzero), static_cast<long long>(found.flushed));
}

// sample(x, step, out): every step-th number of x, in row-major order, into out
PyObject *py_sample(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x"), out("out");
    int64_t step;
    if (!take_count("sample", count, 3) || !read_tensor(args[0], x) || !read_integer(args[1], step)) return nullptr;
    if (!read_tensor(args[2], out) || !check_sample(x, step, out)) return nullptr;
    (x.type == Type::float32 ? sample_floats : sample_halves)(x, step, out);
    Py_RETURN_NONE;
}

// apart(got, want, bound): sums of (got - want)^2 and want^2 where got is finite and want's magnitude below the bound
PyObject *py_apart(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor got("got"), want("want");
    float bound;
    if (!take_count("apart", count, 3) || !read_tensor(args[0], got) || !read_tensor(args[1], want)) return nullptr;
    if (!read_float(args[2], bound) || !check_pair(got, want)) return nullptr;
    double off = 0, size = 0;
    for (int64_t i = 0; i < got.count(); ++i) {
        const double a = got.as<const float>()[i], b = want.as<const float>()[i];
        const bool usable = a - a == 0 && b < bound && -b < bound;
        off += usable ? (a - b) * (a - b) : 0, size += usable ? b * b : 0;
    }
    return Py_BuildValue("(dd)", off, size);
}

} // namespace upcast
