// The part of DLPack's C exchange interface (version 1.x) that reading a tensor needs, declared from its
// published binary layout: torch offers it as torch.Tensor.__dlpack_c_exchange_api__, without headers.
#pragma once

#include <stdint.h>

namespace upcast {
namespace dlpack {

constexpr int32_t CPU = 1;
enum Code : uint8_t { INT = 0, UINT = 1, FLOAT = 2, BFLOAT = 4 };

struct Device {
    int32_t type, index;
};

struct DataType {
    uint8_t code, bits;
    uint16_t lanes;
};

struct Tensor {
    void *data;
    Device device;
    int32_t ndim;
    DataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct Version {
    uint32_t major, minor;
};

struct ExchangeHeader {
    Version version;
    ExchangeHeader *previous;
};

// Fills `out` with a view of a Python object that lives at least as long as the caller's reference to it.
// Returns 0, or -1 with a Python error set.
typedef int (*ReadTensor)(void *object, Tensor *out);

struct Exchange {
    ExchangeHeader header;
    void *allocate, *export_managed, *import_managed;
    ReadTensor read;
    void *current_stream;
};

} // namespace dlpack
} // namespace upcast
