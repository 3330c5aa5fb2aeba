// The Python module upcast.kernels._native: arguments in, checks, kernels with the interpreter released.
#include "dispatch.hpp"
#include "launch.hpp"
#include "python.hpp"
#include "tensor.hpp"
#include "threads.hpp"

#include <stdlib.h>

namespace upcast {
namespace {

// Bits of an operation's result: arguments whose layout it cannot walk. Nothing was done; the caller
// copies them and calls again. Zero means done.
enum Copy : long { COPY_NOTHING = 0, COPY_X = 1, COPY_RESIDUAL = 2 };

constexpr long MOST_THREADS = 1024;

bool take_count(const char *function, Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return true;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, %zd given", function, wanted, given);
    return false;
}

bool read_threads(PyObject *object, int &threads) {
    const long value = PyLong_AsLong(object);
    if (value == -1 && PyErr_Occurred()) return false;
    threads = static_cast<int>(value < 1 ? 1 : value > MOST_THREADS ? MOST_THREADS : value);
    return true;
}

PyObject *finish(Outcome outcome) {
    if (outcome == Outcome::no_memory) return PyErr_NoMemory();
    return PyLong_FromLong(COPY_NOTHING);
}

// Interpreter released for the life of the object.
class Released {
  public:
    Released() : state_(PyEval_SaveThread()) {}
    ~Released() { PyEval_RestoreThread(state_); }
    Released(const Released &) = delete;
    Released &operator=(const Released &) = delete;

  private:
    PyThreadState *state_;
};

bool check_linear(const Tensor &out, const Tensor &x, const Tensor &w, const Tensor &bias, const Tensor &residual,
                  bool transposed) {
    if (!require_type(x, Type::float32) || !require_type(w, Type::float16) || !require_dims(w, 2)) return false;
    if (x.ndim == 0) return require_dims(x, 1);
    const int64_t N = w.shape[transposed ? 1 : 0], K = w.shape[transposed ? 0 : 1];
    if (x.shape[x.ndim - 1] != K) {
        PyErr_Format(error_class(), "x has %lld features and the weight takes %lld; they must agree. Check the shapes.",
                     static_cast<long long>(x.shape[x.ndim - 1]), static_cast<long long>(K));
        return false;
    }
    if (!require_adjacent(w) || !require_type(out, Type::float32) || !require_shape(out, x, N)) return false;
    if (!require_contiguous(out)) return false;
    if (bias.present) {
        if (!require_type(bias, Type::float32) || !require_dims(bias, 1) || !require_contiguous(bias)) return false;
        if (bias.shape[0] != N) {
            PyErr_Format(error_class(), "bias has %lld elements for %lld outputs; they must agree. Check the shapes.",
                         static_cast<long long>(bias.shape[0]), static_cast<long long>(N));
            return false;
        }
    }
    return !residual.present || (require_type(residual, Type::float32) && require_shape(residual, x, N));
}

// linear(out, x, weight, bias | None, residual | None, transposed, threads)
PyObject *py_linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), w("weight"), bias("bias"), residual("residual");
    int threads;
    if (!take_count("linear", count, 7)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x) || !read_tensor(args[2], w)) return nullptr;
    if (!read_tensor(args[3], bias, true) || !read_tensor(args[4], residual, true)) return nullptr;
    const bool transposed = PyObject_IsTrue(args[5]) == 1;
    if (!read_threads(args[6], threads)) return nullptr;
    if (!check_linear(out, x, w, bias, residual, transposed)) return nullptr;

    Rows xs, ys, rs = {};
    long copies = as_rows(x, xs) ? COPY_NOTHING : COPY_X;
    if (residual.present && !as_rows(residual, rs)) copies |= COPY_RESIDUAL;
    if (copies != COPY_NOTHING) return PyLong_FromLong(copies);
    as_rows(out, ys);

    Linear call = {};
    call.x = x.as<const float>();
    call.ldx = xs.stride;
    call.w = w.as<const uint16_t>();
    call.ldw = w.strides[0];
    call.transposed = transposed;
    call.bias = bias.as<const float>();
    call.residual = residual.as<const float>();
    call.ldr = rs.stride;
    call.y = out.as<float>();
    call.ldy = ys.stride;
    call.M = xs.rows;
    call.N = ys.width;
    call.K = xs.width;
    const Level &level = current_level();
    Outcome outcome;
    {
        const Released released;
        outcome = launch_linear(level, call, threads);
    }
    return finish(outcome);
}

// Copied before they are checked: another thread may write to the tensor meanwhile.
int64_t *copy_integers(const Tensor &tensor) {
    const int64_t count = tensor.count();
    int64_t *copy = static_cast<int64_t *>(malloc(sizeof(int64_t) * static_cast<size_t>(count + 1)));
    if (!copy) {
        PyErr_NoMemory();
        return nullptr;
    }
    const bool wide = tensor.type == Type::int64;
    for (int64_t i = 0; i < count; ++i) copy[i] = wide ? tensor.as<int64_t>()[i] : tensor.as<int32_t>()[i];
    return copy;
}

bool check_embedding(const Tensor &out, const Tensor &indices, const Tensor &table) {
    if (indices.type != Type::int32 && !require_type(indices, Type::int64)) return false;
    if (!require_type(table, Type::float16) || !require_dims(table, 2) || !require_adjacent(table)) return false;
    if (!require_contiguous(indices) || !require_type(out, Type::float32) || !require_contiguous(out)) return false;
    if (!require_dims(out, indices.ndim + 1)) return false;
    if (out.shape[indices.ndim] == table.shape[1] && out.count() == indices.count() * table.shape[1]) return true;
    PyErr_SetString(error_class(), "out does not fit indices and weight; it needs a row per index. Check the shapes.");
    return false;
}

bool check_indices(const int64_t *indices, int64_t count, int64_t rows) {
    for (int64_t i = 0; i < count; ++i) {
        if (indices[i] >= 0 && indices[i] < rows) continue;
        PyErr_Format(PyExc_IndexError, "index %lld is out of range for an embedding of %lld rows",
                     static_cast<long long>(indices[i]), static_cast<long long>(rows));
        return false;
    }
    return true;
}

// embedding(out, indices, weight, threads)
PyObject *py_embedding(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), indices("indices"), table("weight");
    int threads;
    if (!take_count("embedding", count, 4)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], indices) || !read_tensor(args[2], table)) return nullptr;
    if (!read_threads(args[3], threads) || !check_embedding(out, indices, table)) return nullptr;
    int64_t *rows = copy_integers(indices);
    if (!rows) return nullptr;
    if (!check_indices(rows, indices.count(), table.shape[0])) {
        free(rows);
        return nullptr;
    }
    const Embedding call = {table.as<const uint16_t>(), table.strides[0], rows, out.as<float>(), indices.count(),
                            table.shape[1]};
    const Level &level = current_level();
    {
        const Released released;
        launch_embedding(level, call, threads);
    }
    free(rows);
    return finish(Outcome::done);
}

bool check_grouped(const Tensor &out, const Tensor &x, const Tensor &w, const Tensor &counts, bool transposed) {
    if (!require_type(x, Type::float32) || !require_dims(x, 2) || !require_type(w, Type::float16)) return false;
    if (!require_dims(w, 3) || !require_adjacent(w)) return false;
    if (!require_type(counts, Type::int64) || !require_dims(counts, 1) || !require_contiguous(counts)) return false;
    const int64_t N = w.shape[transposed ? 2 : 1], K = w.shape[transposed ? 1 : 2];
    if (x.shape[1] != K || counts.shape[0] != w.shape[0]) {
        PyErr_SetString(error_class(), "x, weight and counts do not fit; they must be (T, K), (E, N, K) and (E,), or "
                                       "(E, K, N) when transposed. Check the shapes.");
        return false;
    }
    return require_type(out, Type::float32) && require_shape(out, x, N) && require_contiguous(out);
}

bool check_counts(const int64_t *counts, int64_t experts, int64_t rows) {
    int64_t left = rows;
    for (int64_t e = 0; e < experts && left >= 0; ++e) left = counts[e] < 0 || counts[e] > left ? -1 : left - counts[e];
    if (left == 0) return true;
    PyErr_Format(error_class(), "counts do not add up to the %lld rows of x; every row belongs to one expert. Check "
                 "the routing.", static_cast<long long>(rows));
    return false;
}

// grouped_linear(out, x, weight, counts, transposed, threads)
PyObject *py_grouped(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), w("weight"), counts("counts");
    int threads;
    if (!take_count("grouped_linear", count, 6)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x)) return nullptr;
    if (!read_tensor(args[2], w) || !read_tensor(args[3], counts)) return nullptr;
    const bool transposed = PyObject_IsTrue(args[4]) == 1;
    if (!read_threads(args[5], threads) || !check_grouped(out, x, w, counts, transposed)) return nullptr;
    Rows xs;
    if (!as_rows(x, xs)) return PyLong_FromLong(COPY_X);
    int64_t *rows = copy_integers(counts);
    if (!rows) return nullptr;
    if (!check_counts(rows, counts.shape[0], x.shape[0])) {
        free(rows);
        return nullptr;
    }
    Linear call = {};
    call.x = x.as<const float>();
    call.ldx = xs.stride;
    call.w = w.as<const uint16_t>();
    call.ldw = w.strides[1];
    call.transposed = transposed;
    call.y = out.as<float>();
    call.N = call.ldy = out.shape[1];
    call.K = x.shape[1];
    const Level &level = current_level();
    Outcome outcome;
    {
        const Released released;
        outcome = launch_grouped(level, call, rows, counts.shape[0], w.strides[0], threads);
    }
    free(rows);
    return finish(outcome);
}

// setup(error_class, exchange_capsule | None)
PyObject *py_setup(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("setup", count, 2)) return nullptr;
    set_error_class(args[0]);
    set_exchange(nullptr);
    if (args[1] == Py_None) Py_RETURN_FALSE;
    void *pointer = PyCapsule_GetPointer(args[1], "dlpack_exchange_api");
    if (!pointer) return nullptr;
    const dlpack::Exchange *exchange = static_cast<const dlpack::Exchange *>(pointer);
    if (exchange->header.version.major != 1 || !exchange->read) Py_RETURN_FALSE;
    set_exchange(exchange);
    Py_RETURN_TRUE;
}

PyObject *py_attach_pool(PyObject *, PyObject *path) {
    PyObject *bytes = PyUnicode_AsUTF8String(path);
    if (!bytes) return nullptr;
    const bool attached = attach_pool(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    return PyBool_FromLong(attached);
}

PyObject *py_pool(PyObject *, PyObject *) { return PyUnicode_FromString(pool_name()); }

PyObject *py_levels(PyObject *, PyObject *) {
    const Level *levels[MOST_LEVELS];
    const int count = available_levels(levels);
    PyObject *names = PyTuple_New(count);
    for (int i = 0; names && i < count; ++i) PyTuple_SetItem(names, i, PyUnicode_FromString(levels[i]->name));
    return names;
}

PyObject *py_level(PyObject *, PyObject *) { return PyUnicode_FromString(current_level().name); }

PyObject *py_force_level(PyObject *, PyObject *name) {
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (!bytes) return nullptr;
    const bool forced = force_level(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    return PyBool_FromLong(forced);
}

PyObject *py_compiler(PyObject *, PyObject *) {
#if defined(__clang__)
    return PyUnicode_FromString("clang " __clang_version__);
#else
    return PyUnicode_FromString("gcc " __VERSION__);
#endif
}

// METH_FASTCALL functions are stored behind the two-argument type, as the C API prescribes; going through
// void (*)() keeps the compiler from doubting it.
PyCFunction fast(PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef METHODS[] = {
    {"linear", fast(py_linear), METH_FASTCALL, nullptr},
    {"embedding", fast(py_embedding), METH_FASTCALL, nullptr},
    {"grouped_linear", fast(py_grouped), METH_FASTCALL, nullptr},
    {"setup", fast(py_setup), METH_FASTCALL, nullptr},
    {"attach_pool", py_attach_pool, METH_O, nullptr},
    {"pool", py_pool, METH_NOARGS, nullptr},
    {"levels", py_levels, METH_NOARGS, nullptr},
    {"level", py_level, METH_NOARGS, nullptr},
    {"force_level", py_force_level, METH_O, nullptr},
    {"compiler", py_compiler, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

} // namespace
} // namespace upcast

PyMODINIT_FUNC PyInit__native() {
    PyObject *module = PyModule_Create(&upcast::MODULE);
    // Until setup() is called, refusals are plain ValueErrors.
    if (module) upcast::set_error_class(PyExc_ValueError);
    return module;
}
