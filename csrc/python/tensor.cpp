#include "python/tensor.hpp"

#include <string.h>

namespace upcast {
namespace {

// Set once while the package is imported.
PyObject *error = nullptr;
const dlpack::Exchange *exchange = nullptr;

const char *type_name(Type type) {
    switch (type) {
    case Type::float16: return "float16";
    case Type::float32: return "float32";
    case Type::int32: return "int32";
    case Type::int64: return "int64";
    case Type::bfloat16: return "bfloat16";
    case Type::uint8: return "uint8";
    case Type::other: break;
    }
    return "another dtype";
}

int64_t type_bytes(Type type) {
    switch (type) {
    case Type::uint8: return 1;
    case Type::float16:
    case Type::bfloat16: return 2;
    case Type::float32:
    case Type::int32: return 4;
    case Type::int64: return 8;
    case Type::other: break;
    }
    return 1;
}

Type type_of(const dlpack::DataType &dtype) {
    if (dtype.lanes != 1) return Type::other;
    if (dtype.code == dlpack::FLOAT && dtype.bits == 16) return Type::float16;
    if (dtype.code == dlpack::FLOAT && dtype.bits == 32) return Type::float32;
    if (dtype.code == dlpack::INT && dtype.bits == 32) return Type::int32;
    if (dtype.code == dlpack::INT && dtype.bits == 64) return Type::int64;
    if (dtype.code == dlpack::BFLOAT && dtype.bits == 16) return Type::bfloat16;
    if (dtype.code == dlpack::UINT && dtype.bits == 8) return Type::uint8;
    return Type::other;
}

Type type_called(const char *name) {
    const Type types[] = {Type::float16, Type::float32, Type::int32, Type::int64, Type::bfloat16, Type::uint8};
    for (Type type : types) {
        if (strcmp(name, type_name(type)) == 0) return type;
    }
    return Type::other;
}

bool refuse_device(const Tensor &tensor) {
    PyErr_Format(error, "%s is on another device; the native kernels run on the CPU. Move it there.", tensor.name);
    return false;
}

bool refuse_dims(const Tensor &tensor, int ndim) {
    PyErr_Format(error, "%s has %d dimensions; the kernels take up to %d. Reshape it.", tensor.name, ndim,
                 Tensor::MOST_DIMS);
    return false;
}

bool read_exchange(PyObject *object, Tensor &tensor) {
    dlpack::Tensor view;
    if (exchange->read(object, &view) != 0) {
        PyErr_Clear();
        PyErr_Format(PyExc_TypeError, "%s gives no access to its data; a torch tensor with storage is needed. "
                     "Pass a plain tensor.", tensor.name);
        return false;
    }
    if (view.device.type != dlpack::CPU) return refuse_device(tensor);
    if (view.ndim > Tensor::MOST_DIMS) return refuse_dims(tensor, view.ndim);
    tensor.ndim = view.ndim;
    tensor.type = type_of(view.dtype);
    tensor.data = static_cast<char *>(view.data) + view.byte_offset;
    if (!view.data) tensor.data = nullptr;
    for (int i = 0; i < view.ndim; ++i) {
        tensor.shape[i] = view.shape[i];
        tensor.strides[i] = view.strides[i];
    }
    return true;
}

bool read_integers(PyObject *tuple, int64_t *into, int count) {
    for (int i = 0; i < count; ++i) {
        into[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, i));
        if (into[i] == -1 && PyErr_Occurred()) return false;
    }
    return true;
}

bool read_tuple(PyObject *object, Tensor &tensor) {
    PyObject *address, *shape, *strides, *owner = nullptr; // the owner only keeps the memory alive
    const char *dtype, *device;
    if (!PyArg_ParseTuple(object, "O!ssO!O!|O", &PyLong_Type, &address, &dtype, &device, &PyTuple_Type, &shape,
                          &PyTuple_Type, &strides, &owner)) {
        return false;
    }
    if (strcmp(device, "cpu") != 0) return refuse_device(tensor);
    const Py_ssize_t ndim = PyTuple_Size(shape);
    if (ndim > Tensor::MOST_DIMS) return refuse_dims(tensor, static_cast<int>(ndim));
    if (PyTuple_Size(strides) != ndim) {
        PyErr_Format(PyExc_TypeError, "%s: shape and strides differ in length", tensor.name);
        return false;
    }
    tensor.ndim = static_cast<int>(ndim);
    tensor.type = type_called(dtype);
    tensor.data = static_cast<char *>(PyLong_AsVoidPtr(address));
    if (PyErr_Occurred()) return false;
    return read_integers(shape, tensor.shape, tensor.ndim) && read_integers(strides, tensor.strides, tensor.ndim);
}

// What both routes must deliver before anything may be dereferenced. An empty tensor may have sizes of any length beside
// its 0; products of them with those of others must not overflow.
bool check_memory(const Tensor &tensor) {
    double elements = 1;
    for (int i = 0; i < tensor.ndim; ++i) {
        if (tensor.shape[i] > 0) elements *= static_cast<double>(tensor.shape[i]);
        if (tensor.shape[i] >= 0 && tensor.strides[i] >= 0) continue;
        PyErr_Format(error, "%s has a negative size or stride; the kernels take neither. Copy it.", tensor.name);
        return false;
    }
    if (elements > MOST_ELEMENTS) {
        PyErr_Format(error, "%s has sizes beyond any memory; the kernels take products of sizes up to 2^46. Check its "
                     "shape.", tensor.name);
        return false;
    }
    if (tensor.count() == 0) return true;
    if (!tensor.data) {
        PyErr_Format(error, "%s has no memory; the kernels need materialised tensors. Load it first.", tensor.name);
        return false;
    }
    if (reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(type_bytes(tensor.type)) == 0) return true;
    PyErr_Format(error, "%s starts between two elements; the kernels need addresses that are a multiple of the "
                 "element size. Clone it.", tensor.name);
    return false;
}

} // namespace

int64_t Tensor::count() const {
    int64_t product = 1;
    for (int i = 0; i < ndim; ++i) product *= shape[i];
    return product;
}

void set_error_class(PyObject *error_type) {
    Py_XINCREF(error_type);
    Py_XDECREF(error);
    error = error_type;
}

PyObject *error_class() { return error; }

void set_exchange(const dlpack::Exchange *found) { exchange = found; }

bool read_tensor(PyObject *object, Tensor &tensor, bool optional) {
    if (optional && object == Py_None) return true;
    tensor.present = true;
    if (PyTuple_Check(object)) return read_tuple(object, tensor) && check_memory(tensor);
    if (exchange) return read_exchange(object, tensor) && check_memory(tensor);
    PyErr_Format(PyExc_TypeError, "%s is not described; this torch has no exchange interface, so tensors come as "
                 "tuples", tensor.name);
    return false;
}

bool require_type(const Tensor &tensor, Type type) {
    if (tensor.type == type) return true;
    PyErr_Format(error, "%s is %s; the native kernels take %s here. Convert it.", tensor.name,
                 type_name(tensor.type), type_name(type));
    return false;
}

bool require_dims(const Tensor &tensor, int ndim) {
    if (tensor.ndim == ndim) return true;
    PyErr_Format(error, "%s has %d dimensions; it must have %d. Reshape it.", tensor.name, tensor.ndim, ndim);
    return false;
}

bool require_contiguous(const Tensor &tensor) {
    int64_t expected = 1;
    for (int i = tensor.ndim - 1; i >= 0; --i) {
        if (tensor.shape[i] != 1 && tensor.strides[i] != expected && tensor.count() != 0) {
            PyErr_Format(error, "%s is not contiguous; the kernels need it to be. Call .contiguous().", tensor.name);
            return false;
        }
        expected *= tensor.shape[i];
    }
    return true;
}

bool require_adjacent(const Tensor &tensor) {
    const int last = tensor.ndim - 1;
    if (tensor.count() == 0) return true;
    bool apart = tensor.shape[last] <= 1 || tensor.strides[last] == 1;
    for (int i = 0; i < last; ++i) {
        apart = apart && (tensor.shape[i] <= 1 || tensor.strides[i] >= tensor.shape[last]);
    }
    if (apart) return true;
    PyErr_Format(error, "%s has rows whose elements are not adjacent or that overlap; the kernels read weights in "
                 "place. Call .contiguous() once, or use the transposed operation.", tensor.name);
    return false;
}

bool require_shape(const Tensor &tensor, const Tensor &like, int64_t width) {
    bool same = tensor.ndim == like.ndim && tensor.shape[tensor.ndim - 1] == width;
    for (int i = 0; same && i < like.ndim - 1; ++i) same = tensor.shape[i] == like.shape[i];
    if (same) return true;
    PyErr_Format(error, "%s does not fit %s; its shape must be that of %s with a last dimension of %lld. Check the "
                 "shapes.", tensor.name, like.name, like.name, static_cast<long long>(width));
    return false;
}

bool as_rows(const Tensor &tensor, EvenRows &rows) {
    const int last = tensor.ndim - 1;
    rows = {1, tensor.shape[last], tensor.shape[last]};
    if (tensor.shape[last] > 1 && tensor.strides[last] != 1) return false;
    bool counted = false;
    for (int i = last - 1; i >= 0; --i) {
        if (tensor.shape[i] == 1) continue;
        if (counted && tensor.strides[i] != rows.rows * rows.stride) return false;
        if (!counted) rows.stride = tensor.strides[i];
        rows.rows *= tensor.shape[i];
        counted = true;
    }
    return true;
}

} // namespace upcast
