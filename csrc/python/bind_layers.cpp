#include "python/bind_layers.hpp"

namespace upcast {

bool read_items(PyObject *tuple, PyObject **items, Py_ssize_t count, const char *what) {
    const bool fits = PyTuple_Check(tuple) && PyTuple_Size(tuple) == count;
    if (!fits) {
        PyErr_Format(error_class(), "%s is no tuple of %zd items, as the kernel takes it. Check the arguments.", what, count);
        return false;
    }
    for (Py_ssize_t i = 0; i < count; ++i) items[i] = PyTuple_GetItem(tuple, i);
    return true;
}

bool check_vector(const Tensor &vector, int64_t width) {
    if (!vector.present) return true;
    if (!require_type(vector, Type::float32) || !require_dims(vector, 1) || !require_contiguous(vector)) return false;
    return vector.shape[0] == width || refuse("a vector of the block has another length than its matrix or norm; "
                                              "they must agree. Check the shapes.");
}

bool read_activation(PyObject *object, Activation &activation) {
    return read_kind(object, activation, ACTIVATIONS, "unknown activation; use silu, gelu or gelu_tanh.");
}

namespace {

bool read_packed_weight(PyObject *object, Matrix &matrix) {
    PackedArgument weight;
    if (!read_packed(object, weight)) return false;
    if (weight.transposed) return refuse("a packed matrix of the block is a transpose; the kernel takes rows. Use the "
                                         "layers one by one.");
    matrix.packed = weight.packed;
    matrix.rows = weight.count;
    matrix.columns = weight.columns;
    return true;
}

bool read_half_weight(const Tensor &weight, Matrix &matrix) {
    if (!require_type(weight, Type::float16) || !require_dims(weight, 2) || !require_adjacent(weight)) return false;
    matrix.weight = weight.as<const uint16_t>();
    matrix.stride = weight.strides[0];
    matrix.rows = weight.shape[0];
    matrix.columns = weight.shape[1];
    return true;
}

} // namespace

bool read_matrix(PyObject *object, Matrix &matrix, const char *name, bool optional) {
    PyObject *items[3];
    Tensor weight(name), bias("bias");
    if (!read_items(object, items, 3, "a matrix of the block")) return false;
    if (!read_tensor(items[1], bias, true)) return false;
    if (!read_kind(items[2], matrix.storage, STORAGES, "unknown storage; a matrix is float16 or packed.")) return false;
    if (optional && items[0] == Py_None) return true;
    if (matrix.storage == Storage::packed) {
        if (!read_packed_weight(items[0], matrix)) return false;
    } else if (!read_tensor(items[0], weight) || !read_half_weight(weight, matrix)) {
        return false;
    }
    matrix.bias = bias.as<const float>();
    return check_vector(bias, matrix.rows);
}

bool read_norm(PyObject *object, BlockNorm &norm, int64_t width) {
    PyObject *items[5];
    Tensor weight("norm weight"), bias("norm bias");
    if (!read_items(object, items, 5, "a norm of the block")) return false;
    if (!read_tensor(items[0], weight, true) || !read_tensor(items[1], bias, true)) return false;
    if (!read_kind(items[2], norm.kind, NORMS, "unknown norm; a block has none, RMSNorm or LayerNorm. Use one.")) return false;
    if (!read_float(items[3], norm.eps) || !read_float(items[4], norm.offset)) return false;
    norm.weight = weight.as<const float>();
    norm.bias = bias.as<const float>();
    return check_vector(weight, width) && check_vector(bias, width);
}

} // namespace upcast
