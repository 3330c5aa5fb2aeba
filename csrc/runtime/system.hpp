// What POSIX and Windows call by different names.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace upcast {

// Memory that begins a cache line, or nullptr; to be given back by `free_aligned`.
void *allocate_aligned(size_t bytes);
void free_aligned(void *data);

// Of a clock that nobody sets.
int64_t nanoseconds();
// Others may have the core.
void yield_core();
void nap(int64_t nanoseconds);

// A library that the process has loaded already, or nullptr; it stays loaded until it is let go.
void *find_library(const char *path);
void let_library_go(void *library);
void *find_symbol(void *library, const char *name);
// Writes the file's name of the library that has this function, or leaves `name` alone.
void name_library_of(void *function, char *name, size_t size);

// Calls `child` in each process that this one forks into.
void after_fork(void (*child)());

} // namespace upcast
