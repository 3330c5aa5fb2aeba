// Whether what a kept step names is still what the model has. Asked once per token of a thousand objects, which takes
// the interpreter as long as three blocks of a small model.
#include "bind.hpp"

namespace upcast {
namespace {

// What was kept, one after another; borrowed references all over.
struct Kept {
    PyObject *list;
    Py_ssize_t at, size;
    bool next_is(PyObject *object) { return at < size && PyList_GetItem(list, at++) == object; }
};

bool same_values(PyObject *dict, Kept &kept) {
    PyObject *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, nullptr, &value);) {
        if (!kept.next_is(value)) return false;
    }
    return true;
}

bool check_list(PyObject *object) {
    if (PyList_Check(object)) return true;
    PyErr_SetString(PyExc_TypeError, "unchanged takes lists");
    return false;
}

} // namespace

// unchanged(kept, dicts, owners, names): whether kept holds the values of all dicts and then owners[i].get(names[i]),
// each the very same object.
PyObject *py_unchanged(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("unchanged", count, 4)) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!check_list(args[i])) return nullptr;
    }
    PyObject *dicts = args[1], *owners = args[2], *names = args[3];
    Kept kept = {args[0], 0, PyList_Size(args[0])};
    for (Py_ssize_t i = 0; i < PyList_Size(dicts); ++i) {
        if (!same_values(PyList_GetItem(dicts, i), kept)) Py_RETURN_FALSE;
    }
    for (Py_ssize_t i = 0; i < PyList_Size(owners); ++i) {
        PyObject *name = PyList_GetItem(names, i);
        if (!name) return nullptr;
        PyObject *value = PyDict_GetItemWithError(PyList_GetItem(owners, i), name);
        if (!value && PyErr_Occurred()) return nullptr;
        if (!kept.next_is(value ? value : Py_None)) Py_RETURN_FALSE;
    }
    return PyBool_FromLong(kept.at == kept.size);
}

} // namespace upcast
