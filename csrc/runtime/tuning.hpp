// What was measured of a processor family, in one table.
#pragma once

#include "runtime/kernels.hpp"

namespace upcast {

struct Tuning {
    Reading reading;
    int64_t torch_rows; // of x from which torch's own product on upcast tiles is faster; 0: never
};

// What this processor runs `isa` best with: what was measured on this machine, or what the table has.
Tuning tuning(Isa isa);

// Has `tuning(isa)` give what was measured here, or with null what the table has.
void set_tuning(Isa isa, const Tuning *measured);

} // namespace upcast
