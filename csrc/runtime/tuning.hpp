// What was measured of a processor family, in one table.
#pragma once

#include "runtime/kernels.hpp"

namespace upcast {

struct Tuning {
    Reading reading;
    int64_t torch_rows; // of x from which torch's own product on upcast tiles is faster; 0: never
};

// What this processor runs `isa` best with.
const Tuning &tuning(Isa isa);

} // namespace upcast
