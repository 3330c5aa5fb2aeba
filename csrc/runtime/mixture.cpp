#include "runtime/mixture.hpp"

#include "runtime/system.hpp"
#include "runtime/threads.hpp"

#include <string.h>

namespace upcast {
namespace {

// Choices of one expert that are worked on together: all of them, or a part.
struct Piece {
    const Expert *expert;
    int64_t begin, end;
    int64_t count() const { return end - begin; }
};

// Floats of the choices that are worked on at once: experts join until there are ENOUGH, which the caches hold. One that
// has more by itself is cut at MOST; cut sooner, its matrices would be read once more for too few rows.
constexpr int64_t ENOUGH_FLOATS = int64_t(1) << 20, MOST_FLOATS = int64_t(16) << 20;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t at_least_one(int64_t a) { return larger(a, 1); }

struct Columns {
    const Mixture &mixture;
    const float *rows; // what the experts gave for the choices [begin, end)
    int64_t begin, end;
    int tasks;
};

// Each task adds to columns of its own, so that a row's sum has one order.
void add_task(void *context, int index) {
    const Columns &call = *static_cast<const Columns *>(context);
    const Mixture &all = call.mixture;
    const int64_t first = all.width * index / call.tasks, last = all.width * (index + 1) / call.tasks;
    for (int64_t i = call.begin; i < call.end; ++i) {
        float *out = all.out + all.chosen_by[i] * all.width;
        const float *row = call.rows + (i - call.begin) * all.width, weight = all.weights[i];
        for (int64_t k = first; k < last; ++k) out[k] += weight * row[k];
    }
}

void begin_sum(const Mixture &all) {
    const size_t bytes = sizeof(float) * static_cast<size_t>(all.rows * all.width);
    if (all.residual) memcpy(all.out, all.residual, bytes);
    else memset(all.out, 0, bytes);
}

class Run {
  public:
    Run(const Level &level, const Mixture &mixture, int threads) : level_(level), all_(mixture), threads_(threads) {}
    ~Run() { free_aligned(data_); }
    Run(const Run &) = delete;
    Run &operator=(const Run &) = delete;

    Outcome run() {
        begin_sum(all_);
        if (!allocate()) return Outcome::no_memory;
        Piece next = {all_.experts, all_.experts->begin, 0};
        while (next.expert != all_.experts + all_.count) {
            take(next);
            if (!work()) return Outcome::no_memory;
        }
        return Outcome::done;
    }

  private:
    bool allocate() {
        const int64_t each = all_.width + 2 * all_.hidden;
        enough_ = at_least_one(ENOUGH_FLOATS / each);
        int64_t largest = 0;
        for (int64_t e = 0; e < all_.count; ++e) largest = larger(largest, all_.experts[e].end - all_.experts[e].begin);
        room_ = smaller(smaller(enough_ + largest, at_least_one(MOST_FLOATS / each)), all_.experts[all_.count - 1].end);
        const int64_t most = smaller(enough_, all_.count); // pieces at once
        const size_t floats = (sizeof(float) * static_cast<size_t>(room_ * each) + 63) / 64 * 64;
        data_ = static_cast<char *>(allocate_aligned(floats + (2 * sizeof(Linear) + sizeof(Piece)) * static_cast<size_t>(most)));
        if (!data_) return false;
        rows_ = reinterpret_cast<float *>(data_);
        gate_ = rows_ + room_ * all_.width, up_ = gate_ + room_ * all_.hidden;
        products_ = reinterpret_cast<Linear *>(data_ + floats);
        pieces_ = reinterpret_cast<Piece *>(products_ + 2 * most);
        return true;
    }

    // Choices from `next` on, until there are enough.
    void take(Piece &next) {
        count_ = 0, begin_ = end_ = next.begin;
        while (next.expert != all_.experts + all_.count && end_ - begin_ < enough_) {
            const int64_t left = next.expert->end - next.begin, taken = smaller(left, room_ - (end_ - begin_));
            pieces_[count_++] = {next.expert, next.begin, next.begin + taken};
            end_ = next.begin += taken;
            if (taken == left) ++next.expert;
        }
    }

    bool work() {
        gather();
        for (int64_t i = 0; i < count_; ++i) {
            const Piece &piece = pieces_[i];
            const int64_t at = (piece.begin - begin_) * all_.hidden;
            products_[2 * i] = product_of(piece.expert->gate, input(piece), gate_ + at, all_.hidden, nullptr, piece.count());
            products_[2 * i + 1] = product_of(piece.expert->up, input(piece), up_ + at, all_.hidden, nullptr, piece.count());
        }
        if (launch_linears(level_, products_, 2 * count_, threads_) != Outcome::done) return false;
        const int64_t choices = end_ - begin_;
        launch_gated(level_, {gate_, up_, all_.hidden, all_.hidden, all_.activation, gate_, choices, all_.hidden}, threads_);
        for (int64_t i = 0; i < count_; ++i) {
            const Piece &piece = pieces_[i];
            const int64_t at = piece.begin - begin_;
            products_[i] = product_of(piece.expert->down, gate_ + at * all_.hidden, rows_ + at * all_.width, all_.width,
                                      nullptr, piece.count());
        }
        if (launch_linears(level_, products_, count_, threads_) != Outcome::done) return false;
        Columns sum = {all_, rows_, begin_, end_, tasks_for(all_.width, choices * all_.width, threads_)};
        parallel(sum.tasks, add_task, &sum);
        return true;
    }

    // A row alone is read where it is.
    const float *input(const Piece &piece) const {
        if (piece.count() == 1) return all_.x + all_.chosen_by[piece.begin] * all_.width;
        return rows_ + (piece.begin - begin_) * all_.width;
    }

    void gather() {
        const int tasks = tasks_for(count_, (end_ - begin_) * all_.width, threads_);
        gathering_ = tasks;
        parallel(tasks, gather_task, this);
    }

    static void gather_task(void *context, int index) {
        const Run &run = *static_cast<const Run *>(context);
        for (int64_t i = index; i < run.count_; i += run.gathering_) run.gather(run.pieces_[i]);
    }

    void gather(const Piece &piece) const {
        const size_t bytes = sizeof(float) * static_cast<size_t>(all_.width);
        for (int64_t i = piece.begin; i < piece.end && piece.count() > 1; ++i)
            memcpy(rows_ + (i - begin_) * all_.width, all_.x + all_.chosen_by[i] * all_.width, bytes);
    }

    const Level &level_;
    const Mixture &all_;
    const int threads_;
    char *data_ = nullptr;
    float *rows_, *gate_, *up_; // of every choice: x, later what its expert gave; and what lies between
    Linear *products_;
    Piece *pieces_;
    int64_t enough_, room_, count_, begin_, end_; // choices that are enough, and that fit; the pieces, and their choices
    int gathering_;
};

struct Call {
    const Level &level;
    const Mixture &mixture;
    int threads;
    Outcome outcome;
};

void run_call(void *context) {
    Call &call = *static_cast<Call *>(context);
    call.outcome = Run(call.level, call.mixture, call.threads).run();
}

struct RouteCall {
    const Level &level;
    const Route &route;
    float *scores;
    int threads, tasks;
    Outcome outcome;
};

// e^x for x <= 0 and NaN, within two units in the last place of a double. The C library's is of a newer version than the
// rest of what is used of it.
double exponential(double x) {
    constexpr double SMALLEST = -700, LOG2_E = 1.4426950408889634, LN2_HIGH = 0.6931471803691238, LN2_LOW = 1.9082149292705877e-10;
    if (x < SMALLEST) return 0;
    if (x != x) return x;
    const int64_t power = static_cast<int64_t>(x * LOG2_E - 0.5);
    const double rest = (x - static_cast<double>(power) * LN2_HIGH) - static_cast<double>(power) * LN2_LOW;
    double sum = 1;
    for (int i = 14; i > 0; --i) sum = 1 + sum * rest / i;
    uint64_t bits = static_cast<uint64_t>(power + 1023) << 52;
    double scale;
    memcpy(&scale, &bits, sizeof scale);
    return sum * scale;
}

bool higher(float a, float b) { return a > b || (a != a && b == b); }

void choose(const Route &all, int64_t row, const float *scores) {
    int64_t *best = all.indices + row * all.chosen;
    float *weights = all.weights + row * all.chosen;
    for (int64_t e = 0, count = 0; e < all.gate.rows; ++e) {
        if (count == all.chosen && !higher(scores[e], scores[best[count - 1]])) continue;
        int64_t at = count < all.chosen ? count++ : count - 1;
        for (; at > 0 && higher(scores[e], scores[best[at - 1]]); --at) best[at] = best[at - 1];
        best[at] = e;
    }
    double sum = 0;
    for (int64_t i = 0; i < all.chosen; ++i) {
        const double above = exponential(static_cast<double>(scores[best[i]]) - scores[best[0]]);
        sum += above, weights[i] = static_cast<float>(above);
    }
    for (int64_t i = 0; i < all.chosen; ++i) weights[i] = static_cast<float>(weights[i] / sum);
}

void choose_task(void *context, int index) {
    const RouteCall &call = *static_cast<const RouteCall *>(context);
    const int64_t rows = call.route.rows, end = rows * (index + 1) / call.tasks;
    for (int64_t row = rows * index / call.tasks; row < end; ++row) choose(call.route, row, call.scores + row * call.route.gate.rows);
}

void run_route(void *context) {
    RouteCall &call = *static_cast<RouteCall *>(context);
    const Route &all = call.route;
    if (all.norm.kind == NormKind::none) memcpy(all.normed, all.x, sizeof(float) * static_cast<size_t>(all.rows * all.width));
    else launch_norm(call.level, norm_of(all.norm, all.x, all.normed, all.rows, all.width), call.threads);
    const Linear gate = product_of(all.gate, all.normed, call.scores, all.gate.rows, nullptr, all.rows);
    call.outcome = launch_linear(call.level, gate, call.threads);
    if (call.outcome != Outcome::done) return;
    call.tasks = tasks_for(all.rows, all.rows * all.gate.rows * all.chosen, call.threads);
    parallel(call.tasks, choose_task, &call);
}

} // namespace

Outcome launch_route(const Level &level, const Route &route, int threads) {
    if (route.rows == 0) return Outcome::done;
    float *scores = static_cast<float *>(allocate_aligned(sizeof(float) * static_cast<size_t>(route.rows * route.gate.rows + 1)));
    if (!scores) return Outcome::no_memory;
    RouteCall call = {level, route, scores, threads, 1, Outcome::done};
    together(threads, run_route, &call);
    free_aligned(scores);
    return call.outcome;
}

Outcome launch_mixture(const Level &level, const Mixture &mixture, int threads) {
    if (mixture.rows == 0 || mixture.width == 0) return Outcome::done;
    if (mixture.count == 0) {
        begin_sum(mixture);
        return Outcome::done;
    }
    Call call = {level, mixture, threads, Outcome::done};
    together(threads, run_call, &call);
    return call.outcome;
}

} // namespace upcast
