#include "launch.hpp"

#include "threads.hpp"

#include <stdlib.h>

namespace upcast {
namespace {

// Scratch of one call: calls from many threads never meet in it.
class Scratch {
  public:
    explicit Scratch(size_t bytes) {
        if (bytes != 0 && posix_memalign(&data_, 64, bytes) != 0) data_ = nullptr;
        failed_ = bytes != 0 && !data_;
    }
    ~Scratch() { free(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool failed() const { return failed_; }
    void *data() const { return data_; }

  private:
    void *data_ = nullptr;
    bool failed_ = false;
};

struct LinearCall {
    const Level &level;
    const Linear &args;
    const LinearPlan &plan;
    void *scratch;
    int phase;
};

void linear_task(void *context, int index) {
    const LinearCall &call = *static_cast<const LinearCall *>(context);
    call.level.linear(call.args, call.plan, call.scratch, call.phase, index);
}

// Contiguous ranges of `count` items, one per task.
template <class Args> struct RangeCall {
    void (*kernel)(const Args &, int64_t begin, int64_t end);
    const Args &args;
    int64_t count;
    int tasks;
};

template <class Args> void range_task(void *context, int index) {
    const RangeCall<Args> &call = *static_cast<const RangeCall<Args> *>(context);
    call.kernel(call.args, call.count * index / call.tasks, call.count * (index + 1) / call.tasks);
}

// `work` counts floats touched; small calls stay on the calling thread.
template <class Args>
void launch_range(void (*kernel)(const Args &, int64_t, int64_t), const Args &args, int64_t count, int64_t work,
                  int threads) {
    constexpr int64_t WORK_PER_THREAD = 16 * 1024;
    int64_t tasks = work / WORK_PER_THREAD;
    if (tasks > threads) tasks = threads;
    if (tasks > count) tasks = count;
    if (tasks < 1) tasks = 1;
    RangeCall<Args> call = {kernel, args, count, static_cast<int>(tasks)};
    parallel(call.tasks, range_task<Args>, &call);
}

} // namespace

Outcome launch_linear(const Level &level, const Linear &args, int threads) {
    if (args.M == 0 || args.N == 0) return Outcome::done;
    const LinearPlan plan = level.plan_linear(args, threads);
    const Scratch scratch(plan.scratch);
    if (scratch.failed()) return Outcome::no_memory;
    LinearCall call = {level, args, plan, scratch.data(), 0};
    for (; call.phase < 2 && plan.tasks[call.phase] > 0; ++call.phase) {
        parallel(plan.tasks[call.phase], linear_task, &call);
    }
    return Outcome::done;
}

Outcome launch_grouped(const Level &level, const Linear &args, const int64_t *counts, int64_t experts,
                       int64_t weight_stride, int threads) {
    Linear expert = args;
    expert.bias = expert.residual = nullptr;
    for (int64_t e = 0; e < experts; ++e) {
        expert.M = counts[e];
        if (launch_linear(level, expert, threads) == Outcome::no_memory) return Outcome::no_memory;
        expert.x += expert.M * expert.ldx;
        expert.y += expert.M * expert.ldy;
        expert.w += weight_stride;
    }
    return Outcome::done;
}

void launch_embedding(const Level &level, const Embedding &args, int threads) {
    launch_range(level.embedding, args, args.count, args.count * args.width, threads);
}

} // namespace upcast
