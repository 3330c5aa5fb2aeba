// There is no -fopenmp here: the entry points of the OpenMP library that torch has loaded are looked up by
// name. That works with any compiler, survives the hash in the name of a library bundled into a wheel, and
// cannot map a second pool. LLVM's libomp exports the same GOMP_ names. libdispatch serves macOS when no
// libomp is found; that path is compiled by the tests but has not been run.
#include "threads.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <time.h>

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

// Written once, under the interpreter's import lock, before any kernel runs.
Pool pool = {};
char description[512] = "none: one thread";

// The threads of an OpenMP pool do not survive fork(), and waiting for them would hang the child.
int forked = 0;

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

struct Region {
    Task task;
    void *context;
    int count;
    int64_t first_end, last_end; // when the first thread was done with its tasks, and the last one
};

void region_body(void *data) {
    Region &region = *static_cast<Region *>(data);
    // A runtime may grant fewer threads than asked for.
    const int team = pool.team_size();
    for (int i = pool.thread_number(); i < region.count; i += team) region.task(region.context, i);
    const int64_t now = nanoseconds();
    int64_t seen = __atomic_load_n(&region.first_end, __ATOMIC_RELAXED);
    while (now < seen && !__atomic_compare_exchange_n(&region.first_end, &seen, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    seen = __atomic_load_n(&region.last_end, __ATOMIC_RELAXED);
    while (now > seen && !__atomic_compare_exchange_n(&region.last_end, &seen, now, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

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

// False, and nothing done, during a pause.
bool run_on_pool(Region &region) {
    const int64_t begin = nanoseconds();
    if (begin < __atomic_load_n(&pause_end, __ATOMIC_RELAXED)) return false;
    region.first_end = INT64_MAX, region.last_end = begin;
    pool.parallel(region_body, &region, static_cast<unsigned>(region.count), 0);
    if (starved(begin, region)) pause_threads(region.last_end);
    return true;
}

void note_fork() { __atomic_store_n(&forked, 1, __ATOMIC_RELAXED); }

// dlsym gives object pointers; POSIX guarantees that they hold functions.
template <class Function> bool look_up(void *handle, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(handle, name));
    return function != nullptr;
}

#ifdef UPCAST_LIBDISPATCH
void dispatch_body(void *data, size_t index) {
    const Region &region = *static_cast<const Region *>(data);
    region.task(region.context, static_cast<int>(index));
}
#endif

} // namespace

bool attach_pool(const char *library) {
    void *handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return false;
    Pool found = {};
    const bool complete = look_up(handle, "GOMP_parallel", found.parallel) &&
                          look_up(handle, "omp_get_thread_num", found.thread_number) &&
                          look_up(handle, "omp_get_num_threads", found.team_size);
    if (complete) {
        Dl_info info = {};
        dladdr(reinterpret_cast<void *>(found.parallel), &info);
        snprintf(description, sizeof description, "OpenMP (%s)", info.dli_fname ? info.dli_fname : library);
        pool = found;
        pthread_atfork(nullptr, nullptr, note_fork);
        // The handle stays open: it keeps the pool's code mapped for as long as we may call it.
        return true;
    }
    dlclose(handle);
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

} // namespace upcast
