// Python tensors as checked views: nothing here is dereferenced before its shape, dtype and device are known.
#pragma once

#include "python/dlpack.hpp"
#include "python/python.hpp"

#include <stdint.h>

namespace upcast {

enum class Type { other, float16, float32, int32, int64, bfloat16, uint8 };

// More than any memory holds. Of what multiplies up to it no offset in bytes overflows.
constexpr double MOST_ELEMENTS = static_cast<double>(int64_t(1) << 46);

struct Tensor {
    static constexpr int MOST_DIMS = 8;
    const char *name; // in error messages
    bool present = false;
    char *data = nullptr;
    Type type = Type::other;
    int ndim = 0;
    int64_t shape[MOST_DIMS], strides[MOST_DIMS];

    explicit Tensor(const char *called) : name(called) {}
    int64_t count() const;
    template <class T> T *as() const { return reinterpret_cast<T *>(data); }
};

// A tensor seen as `rows` rows of `width` adjacent elements, `stride` elements apart.
struct EvenRows {
    int64_t rows, width, stride;
};

// The exception class for every refusal, and torch's exchange interface (null: tensors come as tuples).
void set_error_class(PyObject *error);
PyObject *error_class();
void set_exchange(const dlpack::Exchange *exchange);

// Reads a tensor, or a tuple (address, dtype, device, shape, strides) where torch has no exchange
// interface. Refuses other devices. None gives an absent tensor if `optional`.
bool read_tensor(PyObject *object, Tensor &tensor, bool optional = false);

// The refusals below set the error and return false.
bool require_type(const Tensor &tensor, Type type);
bool require_dims(const Tensor &tensor, int ndim);
bool require_contiguous(const Tensor &tensor);
// Weights are never copied: rows may be apart, but the elements of a row must be adjacent.
bool require_adjacent(const Tensor &tensor);
// All leading dimensions of `tensor` must be those of `like`, and the last `width`.
bool require_shape(const Tensor &tensor, const Tensor &like, int64_t width);

// False, without an error, where the layout is not that of evenly spaced rows: the caller copies.
bool as_rows(const Tensor &tensor, EvenRows &rows);

} // namespace upcast
