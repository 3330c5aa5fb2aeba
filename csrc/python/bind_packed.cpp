// Packed matrices for Python: arguments in, checks, kernels with the interpreter released.
#include "python/bind_packed.hpp"
#include "runtime/dispatch.hpp"

#include <stdlib.h>

namespace upcast {
namespace {

bool refuse_size(const Tensor &blob, int64_t rows, int64_t columns, int64_t escapes, double size) {
    PyErr_Format(error_class(), "a packed matrix has %lld bytes; %lld rows of %lld numbers with %lld escapes take %lld. "
                 "Load the file again, or convert the model again.", static_cast<long long>(blob.count()),
                 static_cast<long long>(rows), static_cast<long long>(columns), static_cast<long long>(escapes),
                 size < MOST_ELEMENTS ? static_cast<long long>(packed_layout(rows, columns, escapes).end) : -1LL);
    return false;
}

// The blob has the bytes that its numbers ask for.
bool check_size(const Tensor &blob, int64_t rows, int64_t columns, int64_t escapes) {
    if (!require_type(blob, Type::uint8) || !require_dims(blob, 1) || !require_contiguous(blob)) return false;
    if (rows < 0 || columns < 0 || escapes < 0) return refuse("a packed matrix has a negative size; sizes start from "
                                                              "0. Load the file again.");
    // In double first: products of what a caller passes may overflow.
    const double wide = static_cast<double>(rows) * (static_cast<double>(columns) + PACKED_RECORD) * 1.5;
    const double size = wide + 4.0 * static_cast<double>(rows) + 6.0 * static_cast<double>(escapes);
    const bool fits = size < MOST_ELEMENTS && static_cast<double>(columns) < MOST_ELEMENTS && escapes <= UINT32_MAX &&
                      blob.count() == packed_layout(rows, columns, escapes).end;
    return fits || refuse_size(blob, rows, columns, escapes, size);
}

bool check_operands(const Tensor &out, const Tensor &x, const Tensor &bias, const Tensor &residual, int64_t N, int64_t K) {
    if (!require_type(x, Type::float32)) return false;
    if (x.ndim == 0) return require_dims(x, 1);
    if (x.shape[x.ndim - 1] != K) {
        PyErr_Format(error_class(), "x has %lld features and the weight takes %lld; they must agree. Check the shapes.",
                     static_cast<long long>(x.shape[x.ndim - 1]), static_cast<long long>(K));
        return false;
    }
    if (!require_type(out, Type::float32) || !require_shape(out, x, N) || !require_contiguous(out)) return false;
    if (bias.present) {
        if (!require_type(bias, Type::float32) || !require_dims(bias, 1) || !require_contiguous(bias)) return false;
        if (bias.shape[0] != N) return refuse("bias has not as many elements as there are outputs; they must agree. "
                                              "Check the shapes.");
    }
    return !residual.present || (require_type(residual, Type::float32) && require_shape(residual, x, N));
}

bool read_numbers(const Tensor &x, Numbers &numbers) {
    if (x.type == Type::bfloat16) numbers.type = Number::bfloat16;
    else if (x.type == Type::float16) numbers.type = Number::float16;
    else if (require_type(x, Type::float32)) numbers.type = Number::float32;
    else return false;
    numbers.data = x.data;
    numbers.columns = x.ndim ? x.shape[x.ndim - 1] : 1;
    numbers.rows = 1;
    for (int i = 0; i + 1 < x.ndim; ++i) numbers.rows *= x.shape[i];
    return require_contiguous(x);
}

bool check_counts(const int64_t *counts, int64_t experts, int64_t rows) {
    int64_t left = rows;
    for (int64_t e = 0; e < experts && left >= 0; ++e) left = counts[e] < 0 || counts[e] > left ? -1 : left - counts[e];
    return left == 0 || refuse("counts do not add up to the rows of x; every row belongs to one expert. Check the routing.");
}

} // namespace

bool read_packed(PyObject *object, PackedArgument &m) {
    const Py_ssize_t items = PyTuple_Check(object) ? PyTuple_Size(object) : 0;
    if (items != 6 && items != 7) return refuse("a packed matrix is no tuple (blob, rows, columns, escapes, begin, count); "
                                                "the kernels take one. Check the arguments.");
    int64_t *numbers[] = {&m.rows, &m.columns, &m.escapes, &m.begin, &m.count};
    m.transposed = false;
    if (!read_tensor(PyTuple_GetItem(object, 0), m.blob)) return false;
    for (int i = 0; i < 5; ++i)
        if (!read_integer(PyTuple_GetItem(object, i + 1), *numbers[i])) return false;
    if (items == 7 && !read_bool(PyTuple_GetItem(object, 6), m.transposed)) return false;
    if (!check_size(m.blob, m.rows, m.columns, m.escapes)) return false;
    if (m.begin < 0 || m.count < 0 || m.begin > m.rows || m.count > m.rows - m.begin) {
        return refuse("a packed matrix has rows in use that it does not have; they lie within its rows. Check the range.");
    }
    m.packed = packed_rows(m.blob.as<const uint8_t>(), m.rows, m.columns, m.escapes, m.begin);
    return true;
}

// packed_linear(out, x, matrix, bias | None, residual | None, threads)
PyObject *py_packed_linear(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), bias("bias"), residual("residual");
    PackedArgument m;
    int threads;
    if (!take_count("packed_linear", count, 6)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x) || !read_packed(args[2], m)) return nullptr;
    if (!read_tensor(args[3], bias, true) || !read_tensor(args[4], residual, true)) return nullptr;
    const int64_t N = m.transposed ? m.columns : m.count, K = m.transposed ? m.count : m.columns;
    if (!read_threads(args[5], threads) || !check_operands(out, x, bias, residual, N, K)) return nullptr;

    EvenRows xs, ys, rs = {};
    long copies = as_rows(x, xs) ? COPY_NOTHING : COPY_FIRST;
    if (residual.present && !as_rows(residual, rs)) copies |= COPY_SECOND;
    if (copies != COPY_NOTHING) return PyLong_FromLong(copies);
    as_rows(out, ys);
    const Linear call = {x.as<const float>(), xs.stride, nullptr, 0, m.transposed, bias.as<const float>(),
                         residual.as<const float>(), rs.stride, out.as<float>(), ys.stride, xs.rows, N, K, m.packed};
    const Level &level = current_level();
    Outcome outcome;
    {
        const Released released;
        outcome = launch_linear(level, call, threads);
    }
    return finish(outcome);
}

// packed_embedding(out, indices, matrix, threads)
PyObject *py_packed_embedding(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), indices("indices");
    PackedArgument m;
    int threads;
    if (!take_count("packed_embedding", count, 4)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], indices) || !read_packed(args[2], m)) return nullptr;
    if (!read_threads(args[3], threads)) return nullptr;
    if (indices.type != Type::int32 && !require_type(indices, Type::int64)) return nullptr;
    if (!require_contiguous(indices) || !require_type(out, Type::float32) || !require_contiguous(out)) return nullptr;
    const bool fits = out.ndim == indices.ndim + 1 && out.shape[indices.ndim] == m.columns &&
                      out.count() == indices.count() * m.columns;
    if (!fits && !refuse("out does not fit indices and weight; it needs a row per index. Check the shapes.")) return nullptr;
    const Integers rows(indices);
    if (!rows.data) return PyErr_NoMemory();
    for (int64_t i = 0; i < indices.count(); ++i) {
        if (rows.data[i] >= 0 && rows.data[i] < m.count) continue;
        return PyErr_Format(PyExc_IndexError, "index %lld is out of range for an embedding of %lld rows",
                            static_cast<long long>(rows.data[i]), static_cast<long long>(m.count));
    }
    const Embedding call = {nullptr, 0, rows.data, out.as<float>(), indices.count(), m.columns, m.packed};
    const Level &level = current_level();
    {
        const Released released;
        launch_embedding(level, call, threads);
    }
    return finish(Outcome::done);
}

// packed_grouped(out, x, matrix, counts, transposed, threads)
PyObject *py_packed_grouped(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out"), x("x"), counts("counts");
    PackedArgument m;
    int threads;
    bool transposed;
    if (!take_count("packed_grouped", count, 6)) return nullptr;
    if (!read_tensor(args[0], out) || !read_tensor(args[1], x) || !read_packed(args[2], m)) return nullptr;
    if (!read_tensor(args[3], counts) || !read_bool(args[4], transposed) || !read_threads(args[5], threads)) return nullptr;
    if (!require_type(counts, Type::int64) || !require_dims(counts, 1) || !require_contiguous(counts)) return nullptr;
    const int64_t experts = counts.shape[0], each = experts ? m.count / experts : 0;
    const int64_t N = transposed ? m.columns : each, K = transposed ? each : m.columns;
    if (m.transposed || each * experts != m.count) {
        refuse("a packed matrix has not as many rows for each expert; its rows are divided between them. Check the shapes.");
        return nullptr;
    }
    if (!require_dims(x, 2) || !check_operands(out, x, Tensor("bias"), Tensor("residual"), N, K)) return nullptr;
    EvenRows xs;
    if (!as_rows(x, xs)) return PyLong_FromLong(COPY_FIRST);
    const Integers rows(counts);
    if (!rows.data) return PyErr_NoMemory();
    if (!check_counts(rows.data, experts, x.shape[0])) return nullptr;
    const Linear call = {x.as<const float>(), xs.stride, nullptr, 0, transposed, nullptr, nullptr, 0, out.as<float>(), N,
                         0, N, K, m.packed};
    const Level &level = current_level();
    Outcome outcome;
    {
        const Released released;
        outcome = launch_grouped(level, call, rows.data, experts, each, threads);
    }
    return finish(outcome);
}

// packed_examine(x, threads) -> (exact, escapes, table)
PyObject *py_packed_examine(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor x("x");
    Numbers numbers;
    int threads;
    if (!take_count("packed_examine", count, 2)) return nullptr;
    if (!read_tensor(args[0], x) || !read_numbers(x, numbers) || !read_threads(args[1], threads)) return nullptr;
    HighBytes found;
    uint8_t table[PACKED_TABLE];
    const Level &level = current_level();
    {
        const Released released;
        launch_examine(level, numbers, threads, found);
    }
    const int64_t escapes = choose_table(found, table);
    return Py_BuildValue("(OLy#)", found.exact ? Py_True : Py_False, static_cast<long long>(escapes),
                         reinterpret_cast<const char *>(table), static_cast<Py_ssize_t>(PACKED_TABLE));
}

// packed_pack(blob, x, table, escapes, threads) -> 0, 1: some number is no bfloat16, 2: other escapes than told. The
// table is bytes.
PyObject *py_packed_pack(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor blob("blob"), x("x");
    Numbers numbers;
    int64_t escapes;
    int threads;
    char *table;
    Py_ssize_t length;
    if (!take_count("packed_pack", count, 5)) return nullptr;
    if (!read_tensor(args[0], blob) || !read_tensor(args[1], x) || !read_numbers(x, numbers)) return nullptr;
    if (PyBytes_AsStringAndSize(args[2], &table, &length) != 0) return nullptr;
    if (!read_integer(args[3], escapes) || !read_threads(args[4], threads)) return nullptr;
    if (length != PACKED_TABLE || table[0] != 0) {
        refuse("a table of another form; it has 16 bytes, the first of them 0. Examine the numbers again.");
        return nullptr;
    }
    if (!check_size(blob, numbers.rows, numbers.columns, escapes)) return nullptr;
    const Level &level = current_level();
    Packed outcome;
    {
        const Released released;
        outcome = launch_pack(level, numbers, reinterpret_cast<const uint8_t *>(table), escapes, blob.as<uint8_t>(), threads);
    }
    if (outcome == Packed::no_memory) return PyErr_NoMemory();
    return PyLong_FromLong(outcome == Packed::inexact ? 1 : outcome == Packed::other_escapes ? 2 : 0);
}

// packed_unpack(out, matrix, threads)
PyObject *py_packed_unpack(PyObject *, PyObject *const *args, Py_ssize_t count) {
    Tensor out("out");
    PackedArgument m;
    int threads;
    if (!take_count("packed_unpack", count, 3)) return nullptr;
    if (!read_tensor(args[0], out) || !read_packed(args[1], m) || !read_threads(args[2], threads)) return nullptr;
    if (out.type != Type::bfloat16 && !require_type(out, Type::float32)) return nullptr;
    if (!require_dims(out, 2) || !require_contiguous(out)) return nullptr;
    if (out.shape[0] != m.count || out.shape[1] != m.columns) {
        refuse("out does not fit the rows of a packed matrix; it has a row for each. Check the shapes.");
        return nullptr;
    }
    const Unpacking call = {m.packed, out.data, out.type == Type::float32, m.columns};
    const Level &level = current_level();
    if (out.count()) {
        const Released released;
        launch_unpack(level, call, m.count, threads);
    }
    return finish(Outcome::done);
}

// packed_check(matrix) -> (what is damaged, the number that was found)
PyObject *py_packed_check(PyObject *, PyObject *matrix) {
    PackedArgument m;
    if (!read_packed(matrix, m)) return nullptr;
    int64_t found = 0;
    Damage damage;
    {
        const Released released;
        damage = look_through(m.blob.as<const uint8_t>(), m.rows, m.columns, m.escapes, found);
    }
    return Py_BuildValue("(iL)", static_cast<int>(damage), static_cast<long long>(found));
}

} // namespace upcast
