/* A file system that fails on demand, below one folder: loaded with LD_PRELOAD.

   fault_arm(call, n, number, lasting, below): the n-th call of this name from now on, whose path or
   file lies below a folder, returns -1 and sets errno to `number`; with `lasting` so do all after
   it. fault_disarm() ends that and returns how many such calls there were. The environment can
   arm it too, before the program starts: FAULT="call n errno lasting", FAULT_BELOW=folder. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char armed[16], below[4096];
static long at, seen, number;
static int lasting;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fault_arm(const char *call, long n, int error, int stays, const char *folder) {
    pthread_mutex_lock(&lock);
    snprintf(armed, sizeof armed, "%s", call);
    snprintf(below, sizeof below, "%s", folder);
    at = n, number = error, lasting = stays, seen = 0;
    pthread_mutex_unlock(&lock);
}

long fault_disarm(void) {
    pthread_mutex_lock(&lock);
    armed[0] = 0;
    long count = seen;
    pthread_mutex_unlock(&lock);
    return count;
}

__attribute__((constructor)) static void from_environment(void) {
    const char *fault = getenv("FAULT"), *folder = getenv("FAULT_BELOW");
    char call[16];
    long n;
    int error, stays;
    if (fault && folder && sscanf(fault, "%15s %ld %d %d", call, &n, &error, &stays) == 4)
        fault_arm(call, n, error, stays, folder);
}

/* Must this call fail? Called with the path it is about. */
static int fails(const char *call, const char *path) {
    if (!armed[0] || !path) return 0;
    int saved = errno, yes = 0;
    pthread_mutex_lock(&lock);
    if (!strcmp(call, armed) && !strncmp(path, below, strlen(below))) {
        seen++;
        yes = lasting ? seen >= at : seen == at;
    }
    pthread_mutex_unlock(&lock);
    errno = yes ? (int)number : saved;
    return yes;
}

static int fails_at(const char *call, int folder, const char *path) {
    if (!armed[0]) return 0;
    char link[64], whole[8192];
    if (path && path[0] == '/') return fails(call, path);
    if (folder == AT_FDCWD) {
        if (!getcwd(whole, 4096)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, whole, 4095);
        if (length < 0) return 0;
        whole[length] = 0;
    }
    if (path) {
        strncat(whole, "/", 2);
        strncat(whole, path, 4000);
    }
    return fails(call, whole);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        REAL(name);                                                                                \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = va_arg(rest, mode_t);                                                        \
        va_end(rest);                                                                              \
        const char *call = flags & (O_WRONLY | O_RDWR) ? "create" : "open";                        \
        return fails_at(call, AT_FDCWD, path) ? -1 : real(path, flags, mode);                      \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                               \
    int name(int folder, const char *path, int flags, ...) {                                       \
        REAL(name);                                                                                \
        va_list rest;                                                                              \
        va_start(rest, flags);                                                                     \
        mode_t mode = va_arg(rest, mode_t);                                                        \
        va_end(rest);                                                                              \
        const char *call = flags & (O_WRONLY | O_RDWR) ? "create" : "open";                        \
        return fails_at(call, folder, path) ? -1 : real(folder, path, flags, mode);                \
    }
OPENAT(openat)
OPENAT(openat64)

#define OF_FILE(result, name, call, parameters, arguments)                                         \
    result name parameters {                                                                       \
        REAL(name);                                                                                \
        return fails_at(call, file, NULL) ? -1 : real arguments;                                   \
    }
OF_FILE(ssize_t, write, "write", (int file, const void *data, size_t size), (file, data, size))
OF_FILE(ssize_t, pwrite, "write", (int file, const void *data, size_t size, off_t from),
        (file, data, size, from))
OF_FILE(ssize_t, pwrite64, "write", (int file, const void *data, size_t size, off64_t from),
        (file, data, size, from))
OF_FILE(ssize_t, writev, "write", (int file, const struct iovec *parts, int count),
        (file, parts, count))
OF_FILE(ssize_t, pwritev, "write", (int file, const struct iovec *parts, int count, off_t from),
        (file, parts, count, from))
OF_FILE(ssize_t, read, "read", (int file, void *data, size_t size), (file, data, size))
OF_FILE(ssize_t, pread, "read", (int file, void *data, size_t size, off_t from),
        (file, data, size, from))
OF_FILE(ssize_t, pread64, "read", (int file, void *data, size_t size, off64_t from),
        (file, data, size, from))
OF_FILE(int, fsync, "fsync", (int file), (file))
OF_FILE(int, fdatasync, "fsync", (int file), (file))
OF_FILE(int, flock, "flock", (int file, int operation), (file, operation))
OF_FILE(int, ftruncate, "write", (int file, off_t size), (file, size))
OF_FILE(int, ftruncate64, "write", (int file, off64_t size), (file, size))

/* A file system without flock has no locks of ranges either. */
#define LOCKS(name)                                                                                \
    int name(int file, int command, ...) {                                                         \
        REAL(name);                                                                                \
        va_list rest;                                                                              \
        va_start(rest, command);                                                                   \
        void *argument = va_arg(rest, void *);                                                     \
        va_end(rest);                                                                              \
        int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK ||         \
                    command == F_OFD_SETLKW;                                                       \
        return locks && fails_at("flock", file, NULL) ? -1 : real(file, command, argument);        \
    }
LOCKS(fcntl)
LOCKS(fcntl64)

#define OF_PATH(name, call, parameters, arguments)                                                 \
    int name parameters {                                                                          \
        REAL(name);                                                                                \
        return fails_at(call, AT_FDCWD, path) ? -1 : real arguments;                               \
    }
OF_PATH(rename, "rename", (const char *path, const char *to), (path, to))
OF_PATH(rmdir, "rmdir", (const char *path), (path))
OF_PATH(unlink, "unlink", (const char *path), (path))
OF_PATH(mkdir, "mkdir", (const char *path, mode_t mode), (path, mode))

int renameat(int folder, const char *path, int there, const char *to) {
    REAL(renameat);
    return fails_at("rename", folder, path) ? -1 : real(folder, path, there, to);
}

int unlinkat(int folder, const char *path, int flags) {
    REAL(unlinkat);
    const char *call = flags & AT_REMOVEDIR ? "rmdir" : "unlink";
    return fails_at(call, folder, path) ? -1 : real(folder, path, flags);
}

int mkdirat(int folder, const char *path, mode_t mode) {
    REAL(mkdirat);
    return fails_at("mkdir", folder, path) ? -1 : real(folder, path, mode);
}
