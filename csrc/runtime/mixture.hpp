// A mixture of experts over the thread pool: the experts that were chosen, each with the rows that chose it.
#pragma once

#include "runtime/matrix.hpp"

namespace upcast {

// down(activation(gate x) * up x), for the rows whose choices are [begin, end).
struct Expert {
    Matrix gate, up, down;
    int64_t begin, end;
};

// out[row] = the sum of weight * expert(x[row]) over the row's choices, in the order of the experts. x and out are
// contiguous [rows, width]. A choice is a row of x and a weight; those of one expert stand together, rows ascending.
struct Mixture {
    const float *x;
    float *out;
    int64_t rows, width, hidden;
    Activation activation;
    const Expert *experts; // with one choice at least
    int64_t count;
    const int64_t *chosen_by; // the row of every choice
    const float *weights;
};

Outcome launch_mixture(const Level &level, const Mixture &mixture, int threads);

} // namespace upcast
