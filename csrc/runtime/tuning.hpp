// What was measured of a processor family, in one table.
#pragma once

#include "runtime/kernels.hpp"

namespace upcast {

struct Tuning {
    Reading reading;
};

// What this processor runs `isa` best with.
const Tuning &tuning(Isa isa);

} // namespace upcast
