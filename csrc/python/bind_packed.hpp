// Packed matrices as Python passes them.
#pragma once

#include "python/bind.hpp"
#include "runtime/packed.hpp"

namespace upcast {

struct PackedArgument {
    Tensor blob{"blob"};
    int64_t rows, columns, escapes, begin, count;
    bool transposed;
    PackedRows packed;
};

// Reads (blob, rows, columns, escapes, begin, count[, transposed]); refuses a blob of another size, and rows that it
// does not have. What is in the blob was not looked at.
bool read_packed(PyObject *object, PackedArgument &matrix);

} // namespace upcast
