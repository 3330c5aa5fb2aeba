// A mixture of experts over the thread pool: the experts that were chosen, each with the rows that chose it.
#pragma once

#include "runtime/layers.hpp"

namespace upcast {

// down(activation(gate x) * up x), for the rows whose choices are [begin, end).
struct Expert {
    Matrix gate, up, down;
    int64_t begin, end;
};

// out[row] = residual[row] + the sum of weight * expert(x[row]) over the row's choices, in the order of the experts. x,
// out and residual, which may be null, are contiguous [rows, width]. A choice is a row of x and a weight; those of one expert stand together, rows ascending.
struct Mixture {
    const float *x, *residual;
    float *out;
    int64_t rows, width, hidden;
    Activation activation;
    const Expert *experts; // with one choice at least
    int64_t count;
    const int64_t *chosen_by; // the row of every choice
    const float *weights;
};

// Each row of x normalised, and the `chosen` experts for which the gate scores it highest, the best first, with the softmax
// of their scores. Of equal scores the first ones are taken, and NaN is the highest of all.
struct Route {
    const float *x;
    int64_t rows, width;
    BlockNorm norm;
    Matrix gate; // [experts, width]
    int64_t chosen;
    float *normed; // [rows, width]
    int64_t *indices;
    float *weights; // [rows, chosen]
};

Outcome launch_route(const Level &level, const Route &route, int threads);
Outcome launch_mixture(const Level &level, const Mixture &mixture, int threads);

} // namespace upcast
