#include "runtime/launch.hpp"

#include "runtime/system.hpp"
#include "runtime/threads.hpp"
#include "runtime/tuning.hpp"

namespace upcast {
namespace {

// Scratch of one call: calls from many threads never meet in it.
class Scratch {
  public:
    explicit Scratch(size_t bytes) : data_(bytes != 0 ? allocate_aligned(bytes) : nullptr), failed_(bytes != 0 && !data_) {}
    ~Scratch() { free_aligned(data_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool failed() const { return failed_; }
    void *data() const { return data_; }

  private:
    void *data_;
    bool failed_;
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

template <class Args>
void launch_range(void (*kernel)(const Args &, int64_t, int64_t), const Args &args, int64_t count, int64_t work,
                  int threads) {
    RangeCall<Args> call = {kernel, args, count, tasks_for(count, work, threads)};
    parallel(call.tasks, range_task<Args>, &call);
}

struct RefuseCall {
    const Level &level;
    const Append &args;
    int64_t positions;
    int tasks;
    bool found;
};

void refuse_task(void *context, int index) {
    RefuseCall &call = *static_cast<RefuseCall *>(context);
    const int64_t begin = call.positions * index / call.tasks, end = call.positions * (index + 1) / call.tasks;
    if (call.level.refuses(call.args, begin, end)) __atomic_store_n(&call.found, true, __ATOMIC_RELAXED);
}

constexpr int MOST_SURVEYORS = 64;

struct SurveyCall {
    const Level &level;
    const Survey &args;
    int64_t count;
    int tasks;
    Surveyed found[MOST_SURVEYORS];
};

void survey_task(void *context, int index) {
    SurveyCall &call = *static_cast<SurveyCall *>(context);
    call.found[index] =
        call.level.survey(call.args, call.count * index / call.tasks, call.count * (index + 1) / call.tasks);
}

void add(Surveyed &sum, const Surveyed &other) {
    if (other.largest > sum.largest) sum.largest = other.largest;
    if (other.max_error > sum.max_error) sum.max_error = other.max_error;
    sum.nonfinite += other.nonfinite, sum.out_of_range += other.out_of_range;
    sum.nonzero += other.nonzero, sum.flushed += other.flushed;
}

struct AttentionCall {
    const Level &level;
    const Attention &args;
    const AttentionPlan &plan;
    float *own, *partials;
    int64_t queries;
    int tasks;
};

// Units are dealt out in turn: under a causal mask later ones have more to do. Parts lie one after the other in memory.
void attention_task(void *context, int index) {
    const AttentionCall &call = *static_cast<const AttentionCall *>(context);
    float *own = call.own + index * call.plan.own;
    const bool in_turn = call.plan.parts == 1;
    const int64_t units = call.plan.units;
    const int begin = in_turn ? index : static_cast<int>(units * index / call.tasks);
    const int end = in_turn ? call.plan.units : static_cast<int>(units * (index + 1) / call.tasks);
    for (int unit = begin; unit < end; unit += in_turn ? call.tasks : 1) {
        call.level.attention(call.args, call.plan, own, call.partials, unit);
    }
}

void attention_join_task(void *context, int index) {
    const AttentionCall &call = *static_cast<const AttentionCall *>(context);
    call.level.attention_join(call.args, call.plan, call.partials, call.queries * index / call.tasks,
                              call.queries * (index + 1) / call.tasks);
}

// One of several products, and its part of their scratch.
struct Product {
    LinearPlan plan;
    char *scratch;
};

struct ProductsCall {
    const Level &level;
    const Linear *args;
    const Product *products;
    int64_t count;
    int tasks, phase;
};

// A product that has fewer tasks than there are begins where the one before it ended, so that all threads have work.
void products_task(void *context, int index) {
    const ProductsCall &call = *static_cast<const ProductsCall *>(context);
    for (int64_t i = 0; i < call.count; ++i) {
        const int task = static_cast<int>((index + i) % call.tasks);
        const LinearPlan &plan = call.products[i].plan;
        if (task < plan.tasks[call.phase]) call.level.linear(call.args[i], plan, call.products[i].scratch, call.phase, task);
    }
}

void run_products(ProductsCall call) {
    for (call.phase = 0; call.phase < 2; ++call.phase) {
        call.tasks = 0;
        for (int64_t i = 0; i < call.count; ++i) {
            const int tasks = call.products[i].plan.tasks[call.phase];
            if (tasks > call.tasks) call.tasks = tasks;
        }
        if (call.tasks > 0) parallel(call.tasks, products_task, &call);
    }
}

// Scratch of products that run at once: more of them wait for their turn.
constexpr size_t MOST_SCRATCH = size_t(64) << 20;

size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

} // namespace

int tasks_for(int64_t count, int64_t work, int threads) {
    constexpr int64_t WORK_PER_THREAD = 16 * 1024;
    int64_t tasks = work / WORK_PER_THREAD;
    if (tasks > threads) tasks = threads;
    if (tasks > count) tasks = count;
    return tasks < 1 ? 1 : static_cast<int>(tasks);
}

Outcome launch_linear(const Level &level, const Linear &args, int threads) {
    if (args.M == 0 || args.N == 0) return Outcome::done;
    LinearPlan plan = level.plan_linear(args, threads);
    plan.reading = tuning(level.isa).reading;
    const Scratch scratch(plan.scratch);
    if (scratch.failed()) return Outcome::no_memory;
    LinearCall call = {level, args, plan, scratch.data(), 0};
    for (; call.phase < 2 && plan.tasks[call.phase] > 0; ++call.phase) {
        parallel(plan.tasks[call.phase], linear_task, &call);
    }
    return Outcome::done;
}

namespace {

struct HiddenCall {
    const Level &level;
    const Linear &gate;
    const Linear *up;
    const Gated &gated;
    const LinearPlan &plan, &up_plan;
    void *scratch;
};

void hidden_task(void *context, int index) {
    const HiddenCall &call = *static_cast<const HiddenCall *>(context);
    call.level.linear(call.gate, call.plan, call.scratch, 0, index);
    if (call.up) call.level.linear(*call.up, call.up_plan, call.scratch, 0, index);
    const Gated &all = call.gated;
    const int64_t begin = all.width * index / call.plan.grid_n, end = all.width * (index + 1) / call.plan.grid_n;
    for (int64_t row = 0; row < all.rows; ++row) {
        const Gated part = {all.gate + row * all.ld_gate + begin, all.up + row * all.ld_up + begin, 0, 0, all.activation,
                            all.out + row * all.width + begin, 1, end - begin};
        call.level.gated(part, 0, 1);
    }
}

// Whether each task gives the outputs [N * task / grid_n, N * (task + 1) / grid_n) of all rows.
bool by_outputs(const LinearPlan &plan) {
    return (plan.strategy == Strategy::dot || plan.strategy == Strategy::packed) && plan.grid_m == 1 && plan.tasks[1] == 0;
}

} // namespace

// What a task has computed it activates itself, while the others go on.
Outcome launch_hidden(const Level &level, const Linear &gate, const Linear *up, const Gated &gated, int threads) {
    LinearPlan plan = level.plan_linear(gate, threads), up_plan = up ? level.plan_linear(*up, threads) : plan;
    const bool some = gate.M > 0 && gate.N > 0;
    if (some && by_outputs(plan) && by_outputs(up_plan) && plan.grid_n == up_plan.grid_n) {
        plan.reading = up_plan.reading = tuning(level.isa).reading;
        const Scratch scratch(plan.scratch > up_plan.scratch ? plan.scratch : up_plan.scratch);
        if (scratch.failed()) return Outcome::no_memory;
        HiddenCall call = {level, gate, up, gated, plan, up_plan, scratch.data()};
        parallel(plan.tasks[0], hidden_task, &call);
        return Outcome::done;
    }
    Outcome outcome = launch_linear(level, gate, threads);
    if (up && outcome == Outcome::done) outcome = launch_linear(level, *up, threads);
    if (outcome == Outcome::done) launch_gated(level, gated, threads);
    return outcome;
}

Outcome launch_linears(const Level &level, const Linear *args, int64_t count, int threads) {
    const Scratch room(sizeof(Product) * static_cast<size_t>(count));
    if (room.failed()) return Outcome::no_memory;
    Product *products = static_cast<Product *>(room.data());
    const Reading reading = tuning(level.isa).reading;
    for (int64_t i = 0; i < count; ++i) {
        LinearPlan &plan = products[i].plan = LinearPlan{};
        if (args[i].M > 0 && args[i].N > 0) plan = level.plan_linear(args[i], threads);
        plan.reading = reading;
    }
    for (int64_t begin = 0, end = 0; begin < count; begin = end) {
        size_t bytes = 0;
        for (; end < count; ++end) {
            const size_t more = whole_lines(products[end].plan.scratch);
            if (end > begin && bytes + more > MOST_SCRATCH) break;
            bytes += more;
        }
        const Scratch scratch(bytes);
        if (scratch.failed()) return Outcome::no_memory;
        char *at = static_cast<char *>(scratch.data());
        for (int64_t i = begin; i < end; at += whole_lines(products[i++].plan.scratch)) products[i].scratch = at;
        run_products({level, args + begin, products + begin, end - begin, 0, 0});
    }
    return Outcome::done;
}

Outcome launch_grouped(const Level &level, const Linear &args, const int64_t *counts, int64_t experts,
                       int64_t weight_stride, int threads) {
    const Scratch room(sizeof(Linear) * static_cast<size_t>(experts));
    if (room.failed()) return Outcome::no_memory;
    Linear *calls = static_cast<Linear *>(room.data()), expert = args;
    expert.bias = expert.residual = nullptr;
    int64_t chosen = 0;
    for (int64_t e = 0; e < experts; ++e) {
        expert.M = counts[e];
        if (expert.M > 0) calls[chosen++] = expert;
        expert.x += expert.M * expert.ldx;
        expert.y += expert.M * expert.ldy;
        if (expert.w) expert.w += weight_stride;
        else expert.packed.first += weight_stride;
    }
    return launch_linears(level, calls, chosen, threads);
}

void launch_embedding(const Level &level, const Embedding &args, int threads) {
    launch_range(level.embedding, args, args.count, args.count * args.width, threads);
}

// Exponentials and divisions weigh more than the floats that pass through them.
constexpr int64_t ACTIVATION_WORK = 4;

void launch_norm(const Level &level, const Norm &args, int threads) {
    launch_range(level.norm, args, args.rows, args.rows * args.width, threads);
}

void launch_gated(const Level &level, const Gated &args, int threads) {
    launch_range(level.gated, args, args.rows, args.rows * args.width * ACTIVATION_WORK, threads);
}

void launch_rope(const Level &level, const Rope &args, int64_t rows, int threads) {
    launch_range(level.rope, args, rows, rows * args.width, threads);
}

bool launch_append(const Level &level, const Append &args, int64_t rows, int threads) {
    if (!args.wide && rows > 0) {
        const int64_t positions = rows / args.heads;
        RefuseCall check = {level, args, positions, tasks_for(positions, rows * args.width, threads), false};
        parallel(check.tasks, refuse_task, &check);
        if (check.found) return false;
    }
    launch_range(level.append, args, rows, rows * args.width, threads);
    return true;
}

Outcome launch_attention(const Level &level, const Attention &args, int threads) {
    const int64_t queries = args.batch * args.kv_heads * args.group * args.time;
    if (queries == 0 || args.value_width == 0) return Outcome::done;
    const AttentionPlan plan = level.plan_attention(args, threads);
    const int tasks = tasks_for(plan.units, plan.work, threads);
    const int64_t floats = tasks * plan.own + plan.partials;
    const Scratch scratch(sizeof(float) * static_cast<size_t>(floats));
    if (scratch.failed()) return Outcome::no_memory;
    float *own = static_cast<float *>(scratch.data());
    AttentionCall call = {level, args, plan, own, own + tasks * plan.own, queries, tasks};
    parallel(tasks, attention_task, &call);
    call.tasks = tasks_for(queries, plan.partials, threads);
    parallel(call.tasks, attention_join_task, &call);
    return Outcome::done;
}

Surveyed launch_survey(const Level &level, const Survey &args, int64_t count, int threads) {
    SurveyCall call = {level, args, count, tasks_for(count, count, threads < MOST_SURVEYORS ? threads : MOST_SURVEYORS), {}};
    parallel(call.tasks, survey_task, &call);
    for (int i = 1; i < call.tasks; ++i) add(call.found[0], call.found[i]);
    return call.found[0];
}

} // namespace upcast
