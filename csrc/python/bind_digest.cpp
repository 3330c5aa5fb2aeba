// A checksum of the bytes of many tensors, for Python: see runtime/digest.hpp.
#include "python/bind.hpp"
#include "runtime/digest.hpp"

namespace upcast {
namespace {

// Adds the rows of a float16 or float32 tensor, in whatever order memory has them. A row of the last dimension must
// be adjacent; dimensions that lie densely behind one another are one row.
bool add_tensor(const Tensor &x, Pieces &pieces) {
    const int64_t size = x.type == Type::float16 ? 2 : 4;
    int inner = x.ndim;
    int64_t width = 1;
    for (; inner > 0 && (x.shape[inner - 1] == 1 || x.strides[inner - 1] == width); --inner) width *= x.shape[inner - 1];
    int64_t rows = 1;
    for (int dim = 0; dim < inner; ++dim) rows *= x.shape[dim];
    for (int64_t row = 0; row < rows; ++row) {
        int64_t offset = 0, place = row;
        for (int dim = inner - 1; dim >= 0; --dim) {
            offset += place % x.shape[dim] * x.strides[dim];
            place /= x.shape[dim];
        }
        if (!pieces.add(x.data + size * offset, size * width)) return false;
    }
    return true;
}

} // namespace

// digest(tensors: list, threads): 64 bits
PyObject *py_digest(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int threads;
    if (!take_count("digest", count, 2) || !read_threads(args[1], threads)) return nullptr;
    if (!PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "digest takes a list of tensors");
        return nullptr;
    }
    Pieces pieces;
    for (Py_ssize_t i = 0; i < PyList_Size(args[0]); ++i) {
        Tensor x("a tensor");
        if (!read_tensor(PyList_GetItem(args[0], i), x)) return nullptr;
        if (x.type != Type::float16 && !require_type(x, Type::float32)) return nullptr;
        if (x.count() != 0 && !add_tensor(x, pieces)) return PyErr_NoMemory();
    }
    uint64_t result;
    {
        Released released;
        result = pieces.digest(threads);
    }
    return PyLong_FromUnsignedLongLong(result);
}

} // namespace upcast
