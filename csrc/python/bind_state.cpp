// Whether what a kept step names is still what the model has. Asked once per token of a thousand objects, which takes
// the interpreter as long as three blocks of a small model.
#include "python/bind.hpp"

namespace upcast {
namespace {

// What was kept, one after another; borrowed references all over.
struct Kept {
    PyObject *list;
    Py_ssize_t at, size;
    bool next_is(PyObject *object) { return at < size && PyList_GetItem(list, at++) == object; }
};

// A list of dictionaries, looked at in order. The weights have pushed them out of the caches, so that nearly all of the
// time goes into waiting for one line after another; hints let many come together. First a dictionary's head, then its
// table, found where CPython has kept it since 3.6: a hint for anything else does no harm.
class Dicts {
  public:
    explicit Dicts(PyObject *list) : size(PyList_Size(list)), list_(list) {}
    const Py_ssize_t size;
    PyObject *heads(Py_ssize_t i) const {
        if (i + 2 * NEAR < size) fetch(at(i + 2 * NEAR), 1);
        return at(i);
    }
    PyObject *tables(Py_ssize_t i) const {
        if (i + NEAR < size) fetch(reinterpret_cast<void *const *>(at(i + NEAR))[TABLE], LINES);
        return heads(i);
    }

  private:
    static constexpr Py_ssize_t NEAR = 8;
    static constexpr int TABLE = 4, LINES = 5;  // of a table, which is enough for a module's own
    PyObject *at(Py_ssize_t i) const { return PyList_GetItem(list_, i); }
    static void fetch(const void *from, int lines) {
        for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char *>(from) + 64 * i);
    }
    PyObject *list_;
};

bool same_values(PyObject *dict, Kept &kept) {
    const Locked mine(dict);
    PyObject *value;
    for (Py_ssize_t position = 0; PyDict_Next(dict, &position, nullptr, &value);) {
        if (!kept.next_is(value)) return false;
    }
    return true;
}

bool check_list(PyObject *object) {
    if (PyList_Check(object)) return true;
    PyErr_SetString(PyExc_TypeError, "unchanged, all_empty and quiet take lists");
    return false;
}

// 1: owners[i].get(names[i]) is the next of kept, for all of them; 0: it is not; -1: an error.
int same_names(const Dicts &owners, PyObject *names, Kept &kept) {
    for (Py_ssize_t i = 0; i < owners.size; ++i) {
        PyObject *name = PyList_GetItem(names, i);
        if (!name) return -1;
        PyObject *value = PyDict_GetItemWithError(owners.tables(i), name);
        if (!value && PyErr_Occurred()) return -1;
        if (!kept.next_is(value ? value : Py_None)) return 0;
    }
    return kept.at == kept.size;
}

// 1: question() is true; 0: it is not; -1: an error.
int ask(PyObject *question) {
    PyObject *answer = PyObject_CallNoArgs(question);
    if (!answer) return -1;
    const int truth = PyObject_IsTrue(answer);
    Py_DECREF(answer);
    return truth;
}

} // namespace

// unchanged(kept, dicts, owners, names): whether kept holds the values of all dicts and then owners[i].get(names[i]),
// each the very same object.
PyObject *py_unchanged(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("unchanged", count, 4)) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!check_list(args[i])) return nullptr;
    }
    PyObject *names = args[3];
    const Dicts dicts(args[1]), owners(args[2]);
    Kept kept = {args[0], 0, PyList_Size(args[0])};
    for (Py_ssize_t i = 0; i < dicts.size; ++i) {
        if (!same_values(dicts.tables(i), kept)) Py_RETURN_FALSE;
    }
    const int same = same_names(owners, names, kept);
    return same < 0 ? nullptr : PyBool_FromLong(same);
}

// quiet(questions, kept, owners, names): whether no question, called, answers true, and owners[i].get(names[i]) is kept[i].
PyObject *py_quiet(PyObject *, PyObject *const *args, Py_ssize_t count) {
    if (!take_count("quiet", count, 4)) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
        if (!check_list(args[i])) return nullptr;
    }
    for (Py_ssize_t i = 0; i < PyList_Size(args[0]); ++i) {
        const int answer = ask(PyList_GetItem(args[0], i));
        if (answer < 0) return nullptr;
        if (answer) Py_RETURN_FALSE;
    }
    Kept kept = {args[1], 0, PyList_Size(args[1])};
    const int same = same_names(Dicts(args[2]), args[3], kept);
    return same < 0 ? nullptr : PyBool_FromLong(same);
}

// all_empty(dicts): whether nothing is in any of them.
PyObject *py_all_empty(PyObject *, PyObject *list) {
    if (!check_list(list)) return nullptr;
    const Dicts dicts(list);
    for (Py_ssize_t i = 0; i < dicts.size; ++i) {
        const Py_ssize_t entries = PyDict_Size(dicts.heads(i));
        if (entries < 0) return nullptr;
        if (entries > 0) Py_RETURN_FALSE;
    }
    Py_RETURN_TRUE;
}

} // namespace upcast
