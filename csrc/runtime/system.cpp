#include "runtime/system.hpp"

#include <stdio.h>
#include <stdlib.h>
#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#include <malloc.h>
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <time.h>
#endif

namespace upcast {

constexpr size_t LINE = 64;
constexpr int64_t SECOND = INT64_C(1000000000);

#if defined(_WIN32)

void *allocate_aligned(size_t bytes) { return _aligned_malloc(bytes, LINE); }
void free_aligned(void *data) { _aligned_free(data); }

int64_t nanoseconds() {
    LARGE_INTEGER now, per_second; // neither call fails on any Windows since XP
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&per_second);
    return now.QuadPart / per_second.QuadPart * SECOND + now.QuadPart % per_second.QuadPart * SECOND / per_second.QuadPart;
}

void yield_core() { SwitchToThread(); }
void nap(int64_t nanoseconds) { Sleep(static_cast<DWORD>((nanoseconds + SECOND / 1000 - 1) / (SECOND / 1000))); }

void *find_library(const char *path) {
    wchar_t wide[1024];
    HMODULE found = nullptr;
    if (!MultiByteToWideChar(CP_UTF8, 0, path, -1, wide, sizeof wide / sizeof *wide)) return nullptr;
    return GetModuleHandleExW(0, wide, &found) ? found : nullptr;
}

void let_library_go(void *library) { FreeLibrary(static_cast<HMODULE>(library)); }

void *find_symbol(void *library, const char *name) {
    return reinterpret_cast<void *>(GetProcAddress(static_cast<HMODULE>(library), name));
}

void name_library_of(void *function, char *name, size_t size) {
    wchar_t wide[1024];
    HMODULE found = nullptr;
    constexpr DWORD BY_ADDRESS = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT;
    if (!GetModuleHandleExW(BY_ADDRESS, static_cast<const wchar_t *>(function), &found)) return;
    if (!GetModuleFileNameW(found, wide, sizeof wide / sizeof *wide)) return;
    WideCharToMultiByte(CP_UTF8, 0, wide, -1, name, static_cast<int>(size), nullptr, nullptr);
}

void after_fork(void (*)()) {} // nobody forks here

#else

void *allocate_aligned(size_t bytes) {
    void *data = nullptr;
    return posix_memalign(&data, LINE, bytes) == 0 ? data : nullptr;
}
void free_aligned(void *data) { free(data); }

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * SECOND + now.tv_nsec;
}

void yield_core() { sched_yield(); }

void nap(int64_t nanoseconds) {
    const timespec length = {static_cast<time_t>(nanoseconds / SECOND), static_cast<long>(nanoseconds % SECOND)};
    nanosleep(&length, nullptr);
}

void *find_library(const char *path) { return dlopen(path, RTLD_LAZY | RTLD_NOLOAD); }
void let_library_go(void *library) { dlclose(library); }
void *find_symbol(void *library, const char *name) { return dlsym(library, name); }

void name_library_of(void *function, char *name, size_t size) {
    Dl_info info = {};
    if (dladdr(function, &info) && info.dli_fname) snprintf(name, size, "%s", info.dli_fname);
}

void after_fork(void (*child)()) { pthread_atfork(nullptr, nullptr, child); }

#endif

} // namespace upcast
