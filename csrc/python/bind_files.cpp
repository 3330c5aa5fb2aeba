// Files that stay mapped while others may write to them. The kernel holds back whoever opens such a file for writing,
// or truncates it, until a thread of ours has copied what is in use to memory of our own, at the same addresses.
//
// That thread needs nothing of Python: the one that is held back may be ours, and hold the interpreter.
#include "python/bind.hpp"

#include <errno.h>
#include <fcntl.h>
#if defined(__linux__)
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#endif

namespace upcast {

#if defined(__linux__) && defined(F_SETLEASE) && defined(F_SETOWN_EX)
namespace {

constexpr size_t PIECE = size_t(64) << 20;     // copied at a time: more would be needed twice
constexpr size_t STACK = size_t(256) << 10;
constexpr timespec ROUND = {5, 0};             // the system drops signals where too many are waiting
constexpr int MOST_WAITED = 2000;              // milliseconds, for a child that does not come up

struct File;

struct Part {                                  // of a file, in use: addresses rounded to pages
    char *start, *end;
    File *file;
    Part *before, *after;
};

struct File {
    int descriptor;                            // with the lease; -1 once the parts are our own
    char *address;
    size_t size;
    Part *parts;
    File *before, *after;
};

pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER; // held around all that follows
File *files = nullptr;
int child_is_ready[2] = {-1, -1};              // a pipe, while the process forks
pid_t watcher = 0;                             // the thread's id, of this process
bool forking = false;                          // from py_before_fork to py_after_fork

struct Turn {
    Turn() { pthread_mutex_lock(&turn); }
    ~Turn() { pthread_mutex_unlock(&turn); }
};

template <class Node> void put(Node *node, Node **first) {
    node->before = nullptr;
    node->after = *first;
    if (*first) (*first)->before = node;
    *first = node;
}

template <class Node> void take(Node *node, Node **first) {
    (node->before ? node->before->after : *first) = node->after;
    if (node->after) node->after->before = node->before;
}

// Other threads may read meanwhile: the copy takes the place of the file's pages in one step.
bool make_own(char *start, char *end) {
    while (start < end) {
        const size_t left = static_cast<size_t>(end - start), size = left < PIECE ? left : PIECE;
        void *copy = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (copy == MAP_FAILED) return false;
        memcpy(copy, start, size);
        if (mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, start) == MAP_FAILED) {
            munmap(copy, size);
            return false;
        }
        start += size;
    }
    return true;
}

void let_go(File *file) {
    if (file->descriptor < 0) return;
    fcntl(file->descriptor, F_SETLEASE, F_UNLCK); // a child may hold the same description: closing is not enough
    close(file->descriptor);
    file->descriptor = -1;
}

void make_own(File *file) {
    bool whole = true;
    for (Part *part = file->parts; part; part = part->after) whole = make_own(part->start, part->end) && whole;
    if (!whole) dprintf(2, "upcast: a checkpoint that is in use is being written to, and there is no memory for a copy "
                           "of its weights; load the model again\n");
    let_go(file);
}

// Not SIGIO, which a program may wait for itself.
int news() { return SIGRTMAX - 2; }

void *watch(void *) {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, news());
    __atomic_store_n(&watcher, static_cast<pid_t>(syscall(SYS_gettid)), __ATOMIC_RELEASE);
    for (;;) {
        sigtimedwait(&signals, nullptr, &ROUND);
        Turn mine;
        for (File *file = files; file; file = file->after)
            if (file->descriptor >= 0 && fcntl(file->descriptor, F_GETLEASE) != F_RDLCK) make_own(file);
    }
    return nullptr;
}

int start_watching() {
    if (watcher) return 0;
    sigset_t all, before;
    sigfillset(&all);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &before); // the thread inherits it: the program's signals are not for it
    pthread_t thread;
    const int failed = pthread_create(&thread, &attributes, watch, nullptr);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_attr_destroy(&attributes);
    while (!failed && !__atomic_load_n(&watcher, __ATOMIC_ACQUIRE)) sched_yield();
    return failed;
}

// The owner first: where there is none, the signal goes to the process, and ends it.
int lease(int descriptor) {
    const int failed = start_watching();
    if (failed) return failed;
    const f_owner_ex owner = {F_OWNER_TID, watcher};
    if (fcntl(descriptor, F_SETSIG, news()) < 0 || fcntl(descriptor, F_SETOWN_EX, &owner) < 0) return errno;
    if (fcntl(descriptor, F_SETLEASE, F_RDLCK) < 0) return errno;
    return 0;
}

// A child has the addresses but not the thread, and its descriptor is the parent's: it needs both of its own.
void watch_again(File *file) {
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file->descriptor);
    const int fresh = open(name, O_RDONLY | O_CLOEXEC);
    close(file->descriptor);
    file->descriptor = fresh;
    if (fresh < 0 || lease(fresh)) make_own(file);
}

void forget(File *file) {
    take(file, &files);
    let_go(file);
    munmap(file->address, file->size);
    free(file);
}

Part *add_part(File *file, int64_t offset, int64_t size) {
    Part *part = static_cast<Part *>(malloc(sizeof(Part)));
    if (!part) return nullptr;
    const int64_t unit = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    char *start = file->address + offset / unit * unit, *end = file->address + (offset + size + unit - 1) / unit * unit;
    *part = {start, end, file, nullptr, nullptr};
    put(part, &file->parts);
    return part;
}

// Returns an error number. All or nothing: the lease comes last, and finds every part in its place.
int hold(int descriptor, size_t size, const int64_t *places, Py_ssize_t count, File **made, Part **parts) {
    char *address = static_cast<char *>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0));
    if (address == MAP_FAILED) return errno;
    File *file = static_cast<File *>(malloc(sizeof(File)));
    int failed = file ? 0 : ENOMEM;
    if (file) *file = {descriptor, address, size, nullptr, nullptr, nullptr};
    for (Py_ssize_t i = 0; i < count && !failed; ++i) {
        parts[i] = add_part(file, places[2 * i], places[2 * i + 1]);
        if (!parts[i]) failed = ENOMEM;
    }
    if (!failed) failed = lease(descriptor);
    if (!failed) {
        put(file, &files);
        *made = file;
        return 0;
    }
    while (file && file->parts) {
        Part *part = file->parts;
        take(part, &file->parts);
        free(part);
    }
    free(file);
    munmap(address, size);
    return failed;
}

PyObject *addresses(Part *const *parts, Py_ssize_t count) {
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list && i < count; ++i) PyList_SetItem(list, i, PyLong_FromVoidPtr(parts[i]));
    return list;
}

} // namespace

// hold_file(descriptor, size, [offset, size, offset, size, ...]): (0, address, [part, ...]), and the descriptor is the
// file's; or (errno, 0, None)
PyObject *py_hold_file(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t descriptor, size;
    if (!take_count("hold_file", count, 3) || !read_integer(args[0], descriptor)) return nullptr;
    if (!read_integer(args[1], size)) return nullptr;
    const Py_ssize_t wanted = PyList_Size(args[2]) / 2;
    if (PyErr_Occurred()) return nullptr;
    int64_t *places = static_cast<int64_t *>(malloc(sizeof(int64_t) * 2 * static_cast<size_t>(wanted)));
    Part **parts = static_cast<Part **>(malloc(sizeof(Part *) * static_cast<size_t>(wanted)));
    bool read = places && parts;
    if (!read) PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < 2 * wanted && read; ++i) read = read_integer(PyList_GetItem(args[2], i), places[i]);
    PyObject *result = nullptr;
    if (read) {
        File *file = nullptr;
        int failed;
        {
            Released released;
            Turn mine;
            failed = hold(static_cast<int>(descriptor), static_cast<size_t>(size), places, wanted, &file, parts);
        }
        if (failed) result = Py_BuildValue("(iiO)", failed, 0, Py_None);
        else result = Py_BuildValue("(iNN)", 0, PyLong_FromVoidPtr(file->address), addresses(parts, wanted));
    }
    free(places);
    free(parts);
    return result;
}

// drop_part(part): nobody uses it any more; a file goes with its last part
PyObject *py_drop_part(PyObject *, PyObject *pointer) {
    void *address = PyLong_AsVoidPtr(pointer);
    if (PyErr_Occurred()) return nullptr;
    {
        Released released;
        Turn mine;
        Part *part = static_cast<Part *>(address);
        File *file = part->file;
        take(part, &file->parts);
        free(part);
        if (!file->parts) forget(file);
    }
    Py_RETURN_NONE;
}

// own(start, end): whether the numbers between these addresses, which the caller keeps mapped, are now in memory of ours
PyObject *py_own(PyObject *, PyObject *const *args, Py_ssize_t count) {
    int64_t start, end;
    if (!take_count("own", count, 2) || !read_integer(args[0], start) || !read_integer(args[1], end)) return nullptr;
    const int64_t unit = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
    bool own;
    {
        Released released;
        own = make_own(reinterpret_cast<char *>(start / unit * unit),
                       reinterpret_cast<char *>((end + unit - 1) / unit * unit));
    }
    return PyBool_FromLong(own);
}

PyObject *py_before_fork(PyObject *, PyObject *) {
    {
        Released released; // who is copying needs no interpreter, but takes its time
        pthread_mutex_lock(&turn);
    }
    forking = true;
    if (!files || pipe2(child_is_ready, O_CLOEXEC) < 0) child_is_ready[0] = child_is_ready[1] = -1;
    Py_RETURN_NONE;
}

// A server in C may fork by itself, and tell Python in the child alone: a thread that is not there may have had its turn.
static bool take_turn_of_child(bool is_child) {
    if (!is_child) return false;
    turn = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&turn);
    child_is_ready[0] = child_is_ready[1] = -1;
    return true;
}

// Until the child has leases of its own it depends on the parent's, which the parent could give up.
PyObject *py_after_fork(PyObject *, PyObject *is_child) {
    if (!forking && !take_turn_of_child(is_child == Py_True)) Py_RETURN_NONE;
    if (is_child == Py_True) {
        watcher = 0;
        for (File *file = files; file; file = file->after)
            if (file->descriptor >= 0) watch_again(file);
    }
    if (child_is_ready[1] >= 0) {
        Released released;
        close(child_is_ready[1]);
        pollfd closed = {child_is_ready[0], POLLIN, 0};
        if (is_child != Py_True) poll(&closed, 1, MOST_WAITED);
        close(child_is_ready[0]);
    }
    forking = false;
    pthread_mutex_unlock(&turn);
    Py_RETURN_NONE;
}

#else // no leases here

PyObject *py_hold_file(PyObject *, PyObject *const *, Py_ssize_t) {
    return Py_BuildValue("(iiO)", ENOTSUP, 0, Py_None);
}
PyObject *py_drop_part(PyObject *, PyObject *) { Py_RETURN_NONE; }
PyObject *py_own(PyObject *, PyObject *const *, Py_ssize_t) { Py_RETURN_FALSE; }
PyObject *py_before_fork(PyObject *, PyObject *) { Py_RETURN_NONE; }
PyObject *py_after_fork(PyObject *, PyObject *) { Py_RETURN_NONE; }

#endif

} // namespace upcast
