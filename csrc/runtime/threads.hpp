// Running tasks on torch's own thread pool.
#pragma once

namespace upcast {

typedef void (*Task)(void *context, int index);

// Runs task(context, i) once for every i in [0, count), concurrently where a pool was found. Returns when
// all are done. Tasks must not wait for one another.
void parallel(int count, Task task, void *context);

// Calls body(context) on this thread with the pool's threads at hand: a `parallel` inside neither wakes them nor
// sends them to rest, which costs microseconds when the memory is busy. For a few operations in a row.
void together(int threads, void (*body)(void *), void *context);

// Looks the pool's entry points up in a library that is already loaded, or in what it depends on. True if
// found. Nothing is ever loaded: a second pool would compete with torch's.
bool attach_pool(const char *library);

// "libgomp (path)", "libdispatch" or "none: one thread".
const char *pool_name();

} // namespace upcast
