/* A disk that fails or is slow, for the files whose path has $DISK_PATH in it.
 *
 * $DISK_CALL is open, opendir, read, write or fsync. From the $DISK_AT-th such call on it fails
 * with $DISK_ERRNO, only that one where $DISK_ONCE is set; without an errno it takes $DISK_MS.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int number(const char *name) {
    const char *text = getenv(name);
    return text ? atoi(text) : 0;
}

static int fails(const char *call, const char *path) {
    static int seen;
    const char *part = getenv("DISK_PATH"), *wanted = getenv("DISK_CALL");
    if (!part || !wanted || strcmp(call, wanted) || !strstr(path, part)) return 0;
    if (!number("DISK_ERRNO")) {
        usleep(1000 * number("DISK_MS"));
        return 0;
    }
    int at = number("DISK_AT"), now = ++seen;
    if (getenv("DISK_ONCE") ? now != at : now < at) return 0;
    errno = number("DISK_ERRNO");
    return 1;
}

static int fails_at(const char *call, int fd) {
    char link[64], path[4096] = "";
    int before = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size > 0) path[size] = 0;
    errno = before;
    return fails(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                                                 \
    int name(const char *path, int flags, ...) {                                                   \
        va_list more;                                                                              \
        va_start(more, flags);                                                                     \
        int mode = va_arg(more, int);                                                              \
        va_end(more);                                                                              \
        return fails("open", path) ? -1 : REAL(name)(path, flags, mode);                           \
    }
OPEN(open)
OPEN(open64)

DIR *opendir(const char *path) { return fails("opendir", path) ? NULL : REAL(opendir)(path); }
ssize_t read(int fd, void *data, size_t size) {
    return fails_at("read", fd) ? -1 : REAL(read)(fd, data, size);
}
ssize_t write(int fd, const void *data, size_t size) {
    return fails_at("write", fd) ? -1 : REAL(write)(fd, data, size);
}
int fsync(int fd) { return fails_at("fsync", fd) ? -1 : REAL(fsync)(fd); }
