// Layers as blocks and experts have them: the matrix of a linear one, and a norm.
#pragma once

#include "runtime/launch.hpp"

namespace upcast {

enum class Storage { float16, packed };

// [rows, columns] numbers, rows `stride` apart, or packed.
struct Matrix {
    Storage storage;
    const uint16_t *weight;
    int64_t stride;
    const float *bias;
    int64_t rows, columns;
    PackedRows packed;
    bool present() const { return weight || packed.records; } // where there is such a matrix
};

// Rows of x times the matrix, those of y `stride` apart.
inline Linear product_of(const Matrix &m, const float *x, float *y, int64_t stride, const float *residual, int64_t rows) {
    return {x, m.columns, m.weight, m.stride, false, m.bias, residual, m.rows, y, stride, rows, m.rows, m.columns, m.packed};
}

enum class NormKind { none, rms, layer };

struct BlockNorm {
    NormKind kind;
    const float *weight, *bias;
    float eps, offset;
};

// Rows of `width` floats, normalised into `out`.
inline Norm norm_of(const BlockNorm &norm, const float *x, float *out, int64_t rows, int64_t width) {
    return {x, width, norm.weight, norm.bias, norm.eps, norm.offset, norm.kind == NormKind::layer, out, rows, width};
}

} // namespace upcast
