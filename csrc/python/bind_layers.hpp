// Layers of blocks and experts as Python passes them: tuples.
#pragma once

#include "python/bind_packed.hpp"
#include "runtime/layers.hpp"

namespace upcast {

// In the order of the enumerations that they name.
constexpr const char *ACTIVATIONS[] = {"silu", "gelu", "gelu_tanh"};
constexpr const char *STORAGES[] = {"float16", "packed"};
constexpr const char *NORMS[] = {"none", "rms", "layer"};

constexpr const char *MATRIX[] = {"weight", "bias", "storage"};
constexpr const char *NORM[] = {"weight", "bias", "kind", "eps", "offset"};
constexpr const char *EXPERT[] = {"gate", "up", "down"};

// These set the error and return false.

// The items of a tuple of `count`; they live as long as it does.
bool read_items(PyObject *tuple, PyObject **items, Py_ssize_t count, const char *what);

bool check_vector(const Tensor &vector, int64_t width);

// An absent weight, where allowed, gives a matrix without rows.
bool read_matrix(PyObject *object, Matrix &matrix, const char *name, bool optional = false);

bool read_norm(PyObject *object, BlockNorm &norm, int64_t width);

bool read_activation(PyObject *object, Activation &activation);

// A name of an enumeration's value, as its number.
template <typename Kind, size_t count>
bool read_kind(PyObject *object, Kind &kind, const char *const (&)[count], const char *message) {
    int64_t value;
    if (!read_integer(object, value)) return false;
    if (value < 0 || value >= static_cast<int64_t>(count)) return refuse(message);
    kind = static_cast<Kind>(value);
    return true;
}

} // namespace upcast
