// Operations over the thread pool: plan, scratch, phases. No Python.
#pragma once

#include "kernels.hpp"

namespace upcast {

enum class Outcome { done, no_memory };

Outcome launch_linear(const Level &level, const Linear &args, int threads);

// `counts[e]` consecutive rows of args.x meet the e-th weight, `weight_stride` halves after the previous.
// args.M, bias and residual are ignored; experts without rows are not touched.
Outcome launch_grouped(const Level &level, const Linear &args, const int64_t *counts, int64_t experts,
                       int64_t weight_stride, int threads);

void launch_embedding(const Level &level, const Embedding &args, int threads);

} // namespace upcast
