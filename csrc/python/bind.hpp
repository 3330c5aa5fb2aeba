// The Python functions of the module, and what they share.
#pragma once

#include "runtime/launch.hpp"
#include "python/python.hpp"
#include "python/tensor.hpp"

#include <stdlib.h>

namespace upcast {

// Bits of an operation's result: arguments whose layout it cannot walk. Nothing was done; the caller
// copies them and calls again. Zero means done.
enum Copy : long { COPY_NOTHING = 0, COPY_FIRST = 1, COPY_SECOND = 2 };

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

// Nobody else changes `object` during the life of this one. Where there is a GIL, that is what it is for.
class Locked {
  public:
    Locked(const Locked &) = delete;
    Locked &operator=(const Locked &) = delete;
#ifdef Py_GIL_DISABLED
    explicit Locked(PyObject *object) { PyCriticalSection_Begin(&section_, object); }
    ~Locked() { PyCriticalSection_End(&section_); }

  private:
    PyCriticalSection section_;
#else
    explicit Locked(PyObject *) {}
    ~Locked() {}
#endif
};

// A copy of integers, int64 or int32, that another thread may write to meanwhile; without memory `data` is null.
struct Integers {
    int64_t *data;
    explicit Integers(const Tensor &from) : data(static_cast<int64_t *>(malloc(sizeof(int64_t) * static_cast<size_t>(from.count() + 1)))) {
        const bool wide = from.type == Type::int64;
        for (int64_t i = 0; data && i < from.count(); ++i) data[i] = wide ? from.as<int64_t>()[i] : from.as<int32_t>()[i];
    }
    ~Integers() { free(data); }
    Integers(const Integers &) = delete;
    Integers &operator=(const Integers &) = delete;
};

// These set the error and return false.
bool refuse(const char *message);
bool take_count(const char *function, Py_ssize_t given, Py_ssize_t wanted);
bool read_threads(PyObject *object, int &threads);
bool read_float(PyObject *object, float &value);
bool read_integer(PyObject *object, int64_t &value);
bool read_bool(PyObject *object, bool &value);

PyObject *finish(Outcome outcome);

typedef PyObject *Fast(PyObject *self, PyObject *const *args, Py_ssize_t count);
Fast py_linear, py_embedding, py_grouped;                       // bind_linear.cpp
Fast py_norm, py_gated, py_rope, py_kv_append, py_attention;    // bind_fused.cpp
Fast py_block, py_blocks;                                       // bind_block.cpp
Fast py_mixture, py_route;                                      // bind_mixture.cpp
PyObject *py_block_layout(PyObject *self, PyObject *none);
Fast py_survey, py_look, py_compare;                             // bind_survey.cpp
Fast py_unchanged, py_quiet;                                    // bind_state.cpp
PyObject *py_all_empty(PyObject *self, PyObject *dicts);
Fast py_meet, py_add_up;                                        // bind_shared.cpp
Fast py_hold_file, py_own;                                      // bind_files.cpp
PyObject *py_drop_part(PyObject *self, PyObject *part);
PyObject *py_before_fork(PyObject *self, PyObject *none);
PyObject *py_after_fork(PyObject *self, PyObject *is_child);
Fast py_packed_linear, py_packed_embedding, py_packed_grouped;   // bind_packed.cpp
Fast py_packed_examine, py_packed_pack, py_packed_unpack;
PyObject *py_packed_check(PyObject *self, PyObject *matrix);
Fast py_digest;                                                 // bind_digest.cpp
Fast py_multiply_adds, py_read_memory, py_regions;              // bind_limits.cpp

} // namespace upcast
