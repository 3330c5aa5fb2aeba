// There is no -fopenmp here: the entry points of the OpenMP library that torch has loaded are looked up by
// name. That works with any compiler, survives the hash in the name of a library bundled into a wheel, and
// cannot map a second pool. LLVM's libomp exports the same GOMP_ names. libdispatch serves macOS when no
// libomp is found; that path is compiled by the tests but has not been run.
#include "runtime/threads.hpp"

#include "runtime/system.hpp"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#if defined(__APPLE__) || defined(UPCAST_CHECK_LIBDISPATCH)
#define UPCAST_LIBDISPATCH 1
extern "C" void *dispatch_get_global_queue(long identifier, unsigned long flags);
extern "C" void dispatch_apply_f(size_t count, void *queue, void *context, void (*work)(void *, size_t));
#endif

namespace upcast {
namespace {

struct Pool {
    void (*parallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
    int (*thread_number)();
    int (*team_size)();
};

#if defined(_WIN32)
// The library that torch has on Windows is LLVM's kind without GOMP_parallel: this is the same by its own entry points.
struct Place {
    int32_t reserved_1, flags, reserved_2, reserved_3;
    const char *source;
};
constexpr int32_t OF_A_COMPILER = 2; // KMP_IDENT_KMPC
Place place = {0, OF_A_COMPILER, 0, 0, ";unknown;unknown;0;0;;"};

typedef void (*Body)(void *);
void (*fork_call)(Place *, int32_t count, void (*microtask)(int32_t *, int32_t *, void *, void *), ...) = nullptr;
void (*push_threads)(Place *, int32_t thread, int32_t threads) = nullptr;
int32_t (*global_thread)(Place *) = nullptr;

void microtask(int32_t *, int32_t *, void *body, void *data) { reinterpret_cast<Body>(body)(data); }

void fork_parallel(Body body, void *data, unsigned threads, unsigned) {
    push_threads(&place, global_thread(&place), static_cast<int32_t>(threads));
    fork_call(&place, 2, microtask, reinterpret_cast<void *>(body), data);
}
#endif

// Written once, under the interpreter's import lock, before any kernel runs.
Pool pool = {};
char description[512] = "none: one thread";

// The threads of an OpenMP pool do not survive fork(), and waiting for them would hang the child.
int forked = 0;

struct Region {
    Task task;
    void *context;
    int count;
    int64_t first_end, last_end; // when the first thread was done with its tasks, and the last one
};

// One thread's tasks of a region.
void share(Region &region, int thread, int threads) {
    for (int i = thread; i < region.count; i += threads) region.task(region.context, i);
    const int64_t now = nanoseconds();
    int64_t seen = __atomic_load_n(&region.first_end, __ATOMIC_RELAXED);
    while (now < seen && !__atomic_compare_exchange_n(&region.first_end, &seen, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    seen = __atomic_load_n(&region.last_end, __ATOMIC_RELAXED);
    while (now > seen && !__atomic_compare_exchange_n(&region.last_end, &seen, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

// A runtime may grant fewer threads than asked for.
void region_body(void *data) { share(*static_cast<Region *>(data), pool.thread_number(), pool.team_size()); }

// Another program on one of the cores starves the thread that shares it, for milliseconds at a time, and every
// region waits for it: then one thread is faster than all. All tasks stay on the calling thread for a pause,
// which grows while the trouble lasts; the tasks are the same, and so is every bit of the result.
constexpr int64_t MILLISECOND = 1000000, SHORTEST_PAUSE = 25 * MILLISECOND, LONGEST_PAUSE = 500 * MILLISECOND;
int64_t pause_end = 0, pause_length = 0; // races between callers cost a pause too many or too few, no more

bool starved(int64_t begin, const Region &region) {
    // Threads have equal shares; no share takes thrice another's and a millisecond more by itself.
    return region.last_end - begin > 3 * (region.first_end - begin) + MILLISECOND;
}

void pause_threads(int64_t now) {
    const bool again = now - __atomic_load_n(&pause_end, __ATOMIC_RELAXED) < SHORTEST_PAUSE * 4;
    int64_t length = again ? 2 * __atomic_load_n(&pause_length, __ATOMIC_RELAXED) : SHORTEST_PAUSE;
    if (length < SHORTEST_PAUSE) length = SHORTEST_PAUSE;
    if (length > LONGEST_PAUSE) length = LONGEST_PAUSE;
    __atomic_store_n(&pause_length, length, __ATOMIC_RELAXED);
    __atomic_store_n(&pause_end, now + length, __ATOMIC_RELAXED);
}

bool paused(int64_t now) { return now < __atomic_load_n(&pause_end, __ATOMIC_RELAXED); }

// The threads of one `together`: the first runs its body, the others wait for the regions that it meets.
struct Team {
    void (*body)(void *);
    void *context;
    int size;
    alignas(64) Region *region;
    int64_t posted; // regions so far; CLOSED after the last one
    alignas(64) int64_t finished; // shares of the others, over all regions
};
constexpr int64_t CLOSED = -1;
thread_local Team *team_of_this_thread = nullptr;

// A region of a token lasts tens of microseconds. Who waits for longer may be waiting for a thread on the same core.
template <class Done> void wait_until(Done done) {
    constexpr int PATIENCE = 4096;
    for (int tries = 0; !done(); ++tries) {
        if (tries >= PATIENCE) yield_core();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#elif defined(__aarch64__)
        else __asm__ volatile("yield");
#endif
    }
}

void serve_team(Team &team, int thread) {
    int64_t seen = 0;
    for (;;) {
        int64_t posted = seen;
        wait_until([&] { return (posted = __atomic_load_n(&team.posted, __ATOMIC_ACQUIRE)) != seen; });
        if (posted == CLOSED) return;
        seen = posted;
        share(*team.region, thread, team.size);
        __atomic_fetch_add(&team.finished, 1, __ATOMIC_RELEASE);
    }
}

void team_body(void *data) {
    Team &team = *static_cast<Team *>(data);
    const int thread = pool.thread_number();
    if (thread != 0) return serve_team(team, thread);
    team.size = pool.team_size();
    team_of_this_thread = &team;
    team.body(team.context);
    team_of_this_thread = nullptr;
    __atomic_store_n(&team.posted, CLOSED, __ATOMIC_RELEASE);
}

void run_on_team(Team &team, Region &region) {
    team.region = &region;
    __atomic_store_n(&team.posted, team.posted + 1, __ATOMIC_RELEASE);
    share(region, 0, team.size);
    const int64_t due = team.posted * (team.size - 1);
    wait_until([&] { return __atomic_load_n(&team.finished, __ATOMIC_ACQUIRE) == due; });
}

// False, and nothing done, during a pause.
bool run_on_pool(Region &region) {
    const int64_t begin = nanoseconds();
    if (paused(begin)) return false;
    region.first_end = INT64_MAX, region.last_end = begin;
    if (team_of_this_thread) run_on_team(*team_of_this_thread, region);
    else pool.parallel(region_body, &region, static_cast<unsigned>(region.count), 0);
    if (starved(begin, region)) pause_threads(region.last_end);
    return true;
}

void note_fork() { __atomic_store_n(&forked, 1, __ATOMIC_RELAXED); }

// Object pointers hold functions, on POSIX and on Windows.
template <class Function> bool look_up(void *library, const char *name, Function &function) {
    function = reinterpret_cast<Function>(find_symbol(library, name));
    return function != nullptr;
}

bool look_up_parallel(void *library, Pool &found) {
#if defined(_WIN32)
    found.parallel = fork_parallel;
    return look_up(library, "__kmpc_fork_call", fork_call) && look_up(library, "__kmpc_push_num_threads", push_threads) &&
           look_up(library, "__kmpc_global_thread_num", global_thread);
#else
    return look_up(library, "GOMP_parallel", found.parallel);
#endif
}

#ifdef UPCAST_LIBDISPATCH
void dispatch_body(void *data, size_t index) {
    const Region &region = *static_cast<const Region *>(data);
    region.task(region.context, static_cast<int>(index));
}
#endif

} // namespace

bool attach_pool(const char *library) {
    void *handle = find_library(library);
    if (!handle) return false;
    Pool found = {};
    const bool complete = look_up_parallel(handle, found) && look_up(handle, "omp_get_thread_num", found.thread_number) &&
                          look_up(handle, "omp_get_num_threads", found.team_size);
    if (complete) {
        char name[sizeof description - 16];
        snprintf(name, sizeof name, "%s", library);
        name_library_of(reinterpret_cast<void *>(found.thread_number), name, sizeof name);
        snprintf(description, sizeof description, "OpenMP (%s)", name);
        pool = found;
        after_fork(note_fork);
        // The handle stays open: it keeps the pool's code mapped for as long as we may call it.
        return true;
    }
    let_library_go(handle);
    return false;
}

const char *pool_name() {
#ifdef UPCAST_LIBDISPATCH
    if (!pool.parallel) return "libdispatch";
#endif
    return description;
}

void parallel(int count, Task task, void *context) {
    Region region = {task, context, count, 0, 0};
    if (count > 1 && !__atomic_load_n(&forked, __ATOMIC_RELAXED)) {
        if (pool.parallel && run_on_pool(region)) return;
#ifdef UPCAST_LIBDISPATCH
        if (!pool.parallel)
            return dispatch_apply_f(static_cast<size_t>(count), dispatch_get_global_queue(0, 0), &region, dispatch_body);
#endif
    }
    for (int i = 0; i < count; ++i) task(context, i);
}

void together(int threads, void (*body)(void *), void *context) {
    const bool alone = threads < 2 || !pool.parallel || team_of_this_thread || __atomic_load_n(&forked, __ATOMIC_RELAXED);
    if (alone || paused(nanoseconds())) return body(context);
    Team team = {body, context, 0, nullptr, 0, 0};
    pool.parallel(team_body, &team, static_cast<unsigned>(threads), 0);
}

} // namespace upcast
