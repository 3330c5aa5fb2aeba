// Which of the built levels runs.
#pragma once

#include "runtime/kernels.hpp"

namespace upcast {

constexpr int MOST_LEVELS = 5;

// The levels this build holds and this machine runs, best first; returns how many.
int available_levels(const Level *levels[MOST_LEVELS]);

// The level in use: the best available one, or the one forced.
const Level &current_level();

// Makes `name` the level in use; false if it is not available.
bool force_level(const char *name);

} // namespace upcast
