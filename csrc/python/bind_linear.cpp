// linear, embedding and grouped_linear for Python: arguments in, checks, kernels with the interpreter released.
#include "python/bind.hpp"
#include "runtime/dispatch.hpp"

namespace upcast {
namespace {

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

} // namespace

// linear(out, x, weight, bias | None, residual | None, transposed, threads)
PyObject *py_linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), w("weight"), bias("bias"), residual("residual");
    int threads;
    if (!take_count("linear", count, 7)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x) || !read_tensor(args[2], w)) return nullptr;
    if (!read_tensor(args[3], bias, true) || !read_tensor(args[4], residual, true)) return nullptr;
    bool transposed;
    if (!read_bool(args[5], transposed) || !read_threads(args[6], threads)) return nullptr;
    if (!check_linear(out, x, w, bias, residual, transposed)) return nullptr;

    EvenRows xs, ys, rs = {};
    long copies = as_rows(x, xs) ? COPY_NOTHING : COPY_FIRST;
    if (residual.present && !as_rows(residual, rs)) copies |= COPY_SECOND;
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

// embedding(out, indices, weight, threads)
PyObject *py_embedding(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), indices("indices"), table("weight");
    int threads;
    if (!take_count("embedding", count, 4)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], indices) || !read_tensor(args[2], table)) return nullptr;
    if (!read_threads(args[3], threads) || !check_embedding(out, indices, table)) return nullptr;
    const Integers rows(indices); // copied before they are checked
    if (!rows.data) return PyErr_NoMemory();
    if (!check_indices(rows.data, indices.count(), table.shape[0])) return nullptr;
    const Embedding call = {table.as<const uint16_t>(), table.strides[0], rows.data, out.as<float>(), indices.count(),
                            table.shape[1], {}};
    const Level &level = current_level();
    {
        const Released released;
        launch_embedding(level, call, threads);
    }
    return finish(Outcome::done);
}

// grouped_linear(out, x, weight, counts, transposed, threads)
PyObject *py_grouped(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), w("weight"), counts("counts");
    int threads;
    if (!take_count("grouped_linear", count, 6)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x)) return nullptr;
    if (!read_tensor(args[2], w) || !read_tensor(args[3], counts)) return nullptr;
    bool transposed;
    if (!read_bool(args[4], transposed) || !read_threads(args[5], threads)) return nullptr;
    if (!check_grouped(out, x, w, counts, transposed)) return nullptr;
    EvenRows xs;
    if (!as_rows(x, xs)) return PyLong_FromLong(COPY_FIRST);
    const Integers rows(counts);
    if (!rows.data) return PyErr_NoMemory();
    if (!check_counts(rows.data, counts.shape[0], x.shape[0])) return nullptr;
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
        outcome = launch_grouped(level, call, rows.data, counts.shape[0], w.strides[0], threads);
    }
    return finish(outcome);
}

} // namespace upcast
