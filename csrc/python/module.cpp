// The Python module upcast.kernels._native: its functions, and what they share.
#include "python/bind.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/tuning.hpp"
#include "runtime/threads.hpp"

namespace upcast {

bool refuse(const char *message) {
    PyErr_SetString(error_class(), message);
    return false;
}

bool take_count(const char *function, Py_ssize_t given, Py_ssize_t wanted) {
    if (given == wanted) return true;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, %zd given", function, wanted, given);
    return false;
}

bool read_integer(PyObject *object, int64_t &value) {
    value = PyLong_AsLongLong(object);
    return value != -1 || !PyErr_Occurred();
}

bool read_threads(PyObject *object, int &threads) {
    constexpr int64_t MOST_THREADS = 1024;
    int64_t value;
    if (!read_integer(object, value)) return false;
    threads = static_cast<int>(value < 1 ? 1 : value > MOST_THREADS ? MOST_THREADS : value);
    return true;
}

bool read_float(PyObject *object, float &value) {
    const double wide = PyFloat_AsDouble(object);
    value = static_cast<float>(wide);
    return wide != -1.0 || !PyErr_Occurred();
}

bool read_bool(PyObject *object, bool &value) {
    const int truth = PyObject_IsTrue(object);
    value = truth == 1;
    return truth != -1;
}

PyObject *finish(Outcome outcome) {
    if (outcome == Outcome::no_memory) return PyErr_NoMemory();
    return PyLong_FromLong(COPY_NOTHING);
}

namespace {

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

constexpr int64_t MOST_ROWS = int64_t(1) << 40;

// tuning() -> (reading, torch_rows) of the level in use
PyObject *py_tuning(PyObject *, PyObject *) {
    const Tuning found = tuning(current_level().isa);
    return Py_BuildValue("(iL)", static_cast<int>(found.reading), static_cast<long long>(found.torch_rows));
}

// tune(reading, torch_rows): what was measured of the level in use; tune(None, 0): what the table has
PyObject *py_tune(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t reading, rows;
    if (!take_count("tune", count, 2)) return nullptr;
    const Isa isa = current_level().isa;
    if (args[0] == Py_None) {
        set_tuning(isa, nullptr);
        Py_RETURN_NONE;
    }
    if (!read_integer(args[0], reading) || !read_integer(args[1], rows)) return nullptr;
    if (reading < 0 || reading > static_cast<int64_t>(Reading::far_streams) || rows < 0 || rows > MOST_ROWS) {
        PyErr_SetString(error_class(), "a reading goes from 0 to 2, and torch_rows from 0 to 2^40. Run upcast tune again.");
        return nullptr;
    }
    const Tuning measured = {static_cast<Reading>(reading), rows};
    set_tuning(isa, &measured);
    Py_RETURN_NONE;
}

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
PyCFunction fast(Fast *function) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef METHODS[] = {
    {"linear", fast(py_linear), METH_FASTCALL, nullptr},
    {"embedding", fast(py_embedding), METH_FASTCALL, nullptr},
    {"grouped_linear", fast(py_grouped), METH_FASTCALL, nullptr},
    {"norm", fast(py_norm), METH_FASTCALL, nullptr},
    {"gated", fast(py_gated), METH_FASTCALL, nullptr},
    {"rope", fast(py_rope), METH_FASTCALL, nullptr},
    {"kv_append", fast(py_kv_append), METH_FASTCALL, nullptr},
    {"attention", fast(py_attention), METH_FASTCALL, nullptr},
    {"block", fast(py_block), METH_FASTCALL, nullptr},
    {"blocks", fast(py_blocks), METH_FASTCALL, nullptr},
    {"mixture", fast(py_mixture), METH_FASTCALL, nullptr},
    {"route", fast(py_route), METH_FASTCALL, nullptr},
    {"block_layout", py_block_layout, METH_NOARGS, nullptr},
    {"survey", fast(py_survey), METH_FASTCALL, nullptr},
    {"look", fast(py_look), METH_FASTCALL, nullptr},
    {"compare", fast(py_compare), METH_FASTCALL, nullptr},
    {"packed_linear", fast(py_packed_linear), METH_FASTCALL, nullptr},
    {"packed_embedding", fast(py_packed_embedding), METH_FASTCALL, nullptr},
    {"packed_grouped", fast(py_packed_grouped), METH_FASTCALL, nullptr},
    {"packed_examine", fast(py_packed_examine), METH_FASTCALL, nullptr},
    {"packed_pack", fast(py_packed_pack), METH_FASTCALL, nullptr},
    {"packed_unpack", fast(py_packed_unpack), METH_FASTCALL, nullptr},
    {"packed_check", py_packed_check, METH_O, nullptr},
    {"digest", fast(py_digest), METH_FASTCALL, nullptr},
    {"unchanged", fast(py_unchanged), METH_FASTCALL, nullptr},
    {"quiet", fast(py_quiet), METH_FASTCALL, nullptr},
    {"all_empty", py_all_empty, METH_O, nullptr},
    {"meet", fast(py_meet), METH_FASTCALL, nullptr},
    {"add_up", fast(py_add_up), METH_FASTCALL, nullptr},
    {"multiply_adds", fast(py_multiply_adds), METH_FASTCALL, nullptr},
    {"read_memory", fast(py_read_memory), METH_FASTCALL, nullptr},
    {"regions", fast(py_regions), METH_FASTCALL, nullptr},
    {"hold_file", fast(py_hold_file), METH_FASTCALL, nullptr},
    {"own", fast(py_own), METH_FASTCALL, nullptr},
    {"drop_part", py_drop_part, METH_O, nullptr},
    {"before_fork", py_before_fork, METH_NOARGS, nullptr},
    {"after_fork", py_after_fork, METH_O, nullptr},
    {"setup", fast(py_setup), METH_FASTCALL, nullptr},
    {"attach_pool", py_attach_pool, METH_O, nullptr},
    {"pool", py_pool, METH_NOARGS, nullptr},
    {"levels", py_levels, METH_NOARGS, nullptr},
    {"level", py_level, METH_NOARGS, nullptr},
    {"tuning", py_tuning, METH_NOARGS, nullptr},
    {"tune", fast(py_tune), METH_FASTCALL, nullptr},
    {"force_level", py_force_level, METH_O, nullptr},
    {"compiler", py_compiler, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

} // namespace
} // namespace upcast

PyMODINIT_FUNC PyInit__native() {
    PyObject *module = PyModule_Create(&upcast::MODULE);
#ifdef Py_GIL_DISABLED
    // What threads share here is written at import, or is one word that is read and written whole (docs/platforms.md).
    if (module) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
    // Until setup() is called, refusals are plain ValueErrors.
    if (module) upcast::set_error_class(PyExc_ValueError);
    return module;
}
