// Operations over the thread pool: plan, scratch, phases. No Python.
#pragma once

#include "runtime/kernels.hpp"

namespace upcast {

enum class Outcome { done, no_memory };

// How many tasks `count` things are worth. `work` counts floats touched; small calls stay on the calling thread.
int tasks_for(int64_t count, int64_t work, int threads);

Outcome launch_linear(const Level &level, const Linear &args, int threads);

// Products of which none reads what another one writes, all of them in one region for each phase.
Outcome launch_linears(const Level &level, const Linear *args, int64_t count, int threads);

// The products of an MLP and what follows them: gated.gate is gate.y, gated.up is up->y; without `up` it is as it stands.
Outcome launch_hidden(const Level &level, const Linear &gate, const Linear *up, const Gated &gated, int threads);

// `counts[e]` consecutive rows of args.x meet the e-th weight, `weight_stride` halves after the previous, or
// so many packed rows.
// args.M, bias and residual are ignored; experts without rows are not touched.
Outcome launch_grouped(const Level &level, const Linear &args, const int64_t *counts, int64_t experts,
                       int64_t weight_stride, int threads);

void launch_embedding(const Level &level, const Embedding &args, int threads);
void launch_norm(const Level &level, const Norm &args, int threads);
void launch_gated(const Level &level, const Gated &args, int threads);
void launch_rope(const Level &level, const Rope &args, int64_t rows, int threads);

// False, and nothing written, if a finite value would become infinite in the cache's float16, or is beyond its limit.
bool launch_append(const Level &level, const Append &args, int64_t rows, int threads);

Outcome launch_attention(const Level &level, const Attention &args, int threads);

Surveyed launch_survey(const Level &level, const Survey &args, int64_t count, int threads);

} // namespace upcast
