/* Faults between a process and its files. Preloaded: every call that changes a file or a folder under `root` is counted,
 * and the n-th can be where the process dies, stops, or is told of an error; or all of them are written to a log.
 *
 * Python lays out `struct control` in shared memory (shim.py), so that what a killed child did can be read afterwards.
 * Calls that change nothing are not counted: dying before one of them leaves what dying after the call before leaves.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CREATE = 1, WRITE, TRUNCATE, ALLOCATE, FSYNC, RENAME, UNLINK, RMDIR, MKDIR, LINK, SYMLINK, OTHER };
enum { BEFORE, AFTER, HALF };
enum { KILL, STOP };

struct control {
    int64_t armed, count;
    int64_t at, when, how;          /* the n-th call, counted from 1: where the process dies or stops; 0: nowhere */
    int64_t fail_at, fail_errno;    /* the n-th call is answered by this errno; by a short count where it is 0 */
    int64_t committing, committed;  /* renames and links to `commit`, begun and done */
    int64_t hit_op, failed_op;      /* what the n-th call was */
    int64_t hit_committed;          /* whether the commit was done then */
    int64_t log_fd;                 /* -1: no log */
    int64_t started, returned;      /* Python's own */
    char commit[64];
    char root[512];
    char hit_path[512];
};

struct record {
    uint32_t magic, op;
    int64_t inode, offset, length, is_folder;
    int64_t moment;                 /* when it was done, in ns: orders the logs of several processes */
    uint32_t path_nbytes, other_nbytes, data_nbytes, pad;
};

static struct control *control;
static pthread_mutex_t log_mutex = PTHREAD_MUTEX_INITIALIZER;

/* One counted call, between `begin` and `finish`. */
struct call {
    int op, counted, half, after, fail, locked;
    char path[PATH_MAX], other[PATH_MAX];
};

void zs_shim_attach(struct control *given) { control = given; }

static void die(void)
{
    if (control->how == STOP) {
        kill(getpid(), SIGSTOP);
        return;
    }
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void path_of_fd(int fd, char *out)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, out, PATH_MAX - 1);
    out[n < 0 ? 0 : n] = 0;
}

/* Absolute, not normalised: `root` is a real path, and what is under test is not expected to write "..". */
static void path_at(int folder, const char *path, char *out)
{
    if (!path) { out[0] = 0; return; }
    if (path[0] == '/') { snprintf(out, PATH_MAX, "%s", path); return; }
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) base[0] = 0;
    } else {
        path_of_fd(folder, base);
    }
    if ((size_t)snprintf(out, PATH_MAX, path[0] ? "%s/%s" : "%s%s", base, path) >= PATH_MAX) out[0] = 0;
}

static int under_root(const char *path)
{
    size_t n = strlen(control->root);
    return n && !strncmp(path, control->root, n) && (path[n] == '/' || !path[n]);
}

static int is_commit(const struct call *call)
{
    const char *name = strrchr(call->other, '/');
    return (call->op == RENAME || call->op == LINK) && control->commit[0] && name && !strcmp(name + 1, control->commit);
}

/* call->path (and other) are set. Whether the call goes on is in call->fail; not counted: nothing of it is ours. */
static void begin(struct call *call, int op)
{
    call->op = op;
    call->counted = call->half = call->after = call->fail = call->locked = 0;
    if (!under_root(call->path) && !(call->other[0] && under_root(call->other))) return;
    call->counted = 1;
    if (control->log_fd >= 0) {
        pthread_mutex_lock(&log_mutex);
        call->locked = 1;
    }
    int64_t number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST);
    if (number == control->at) {
        control->hit_op = op;
        snprintf(control->hit_path, sizeof control->hit_path, "%.511s", call->path);
        if (control->when == AFTER) call->after = 1;
        else if (control->when == HALF && op == WRITE) call->half = 1;
        else die();
    }
    if (number == control->fail_at) {
        control->failed_op = op;
        control->hit_committed = control->committed;
        snprintf(control->hit_path, sizeof control->hit_path, "%.511s", call->path);
        if (control->fail_errno) call->fail = (int)control->fail_errno;
        else if (op == WRITE) call->half = 2;
    }
    if (!call->fail && is_commit(call)) __atomic_add_fetch(&control->committing, 1, __ATOMIC_SEQ_CST);
}

static void put(const void *data, size_t nbytes)
{
    const char *at = data;
    while (nbytes) {
        ssize_t n = syscall(SYS_write, (int)control->log_fd, at, nbytes);
        if (n <= 0) abort();
        at += n;
        nbytes -= (size_t)n;
    }
}

static int64_t now(void)
{
    struct timespec moment;
    clock_gettime(CLOCK_MONOTONIC, &moment);
    return (int64_t)moment.tv_sec * 1000000000 + moment.tv_nsec;
}

static void finish(struct call *call, int fd, int done, int64_t offset, int64_t length,
                   const struct iovec *parts, int nparts)
{
    int keep = errno;
    if (!call->counted) return;
    if (done && is_commit(call)) __atomic_add_fetch(&control->committed, 1, __ATOMIC_SEQ_CST);
    if (call->half == 1 || call->after) die();
    if (call->locked) {
        struct stat found = {0};
        if (fd >= 0) fstat(fd, &found);
        else if (done && call->other[0]) lstat(call->other, &found);
        else if (done) lstat(call->path, &found);
        if (done) {
            struct record record = {0x5a53, (uint32_t)call->op, (int64_t)found.st_ino, offset, length,
                                    S_ISDIR(found.st_mode), now(), (uint32_t)strlen(call->path),
                                    (uint32_t)strlen(call->other), 0, 0};
            record.data_nbytes = call->op == WRITE ? (uint32_t)length : 0;
            put(&record, sizeof record);
            put(call->path, record.path_nbytes);
            put(call->other, record.other_nbytes);
            size_t left = record.data_nbytes;
            for (int i = 0; i < nparts && left; i++) {
                size_t n = parts[i].iov_len < left ? parts[i].iov_len : left;
                put(parts[i].iov_base, n);
                left -= n;
            }
        }
        pthread_mutex_unlock(&log_mutex);
    }
    errno = keep;
}

static int active(void) { return control && control->armed; }

/* The call is answered by an error; what was locked is unlocked. */
static int failed(struct call *call)
{
    if (!call->fail) return 0;
    finish(call, -1, 0, 0, 0, NULL, 0);
    errno = call->fail;
    return 1;
}

/* ---- opening: counted where it makes a file or empties one ---- */

static int changes(const char *path, int flags)
{
    struct stat found;
    if ((flags & O_TMPFILE) == O_TMPFILE) return CREATE;
    if ((flags & O_CREAT) && lstat(path, &found)) return CREATE;
    if ((flags & O_TRUNC) && !lstat(path, &found) && S_ISREG(found.st_mode) && found.st_size) return TRUNCATE;
    return 0;
}

static int opened(int folder, const char *path, int flags, mode_t mode)
{
    if (!active()) return (int)syscall(SYS_openat, folder, path, flags, mode);
    struct call call;
    int keep = errno;
    path_at(folder, path, call.path);
    call.other[0] = 0;
    int op = under_root(call.path) ? changes(call.path, flags) : 0;
    errno = keep;
    if (!op) return (int)syscall(SYS_openat, folder, path, flags, mode);
    begin(&call, op);
    if (failed(&call)) return -1;
    int fd = (int)syscall(SYS_openat, folder, path, flags, mode);
    finish(&call, fd, fd >= 0, 0, 0, NULL, 0);
    return fd;
}

#define MODE(flags)                                                 \
    mode_t mode = 0;                                                \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                        \
        va_list more;                                               \
        va_start(more, flags);                                      \
        mode = va_arg(more, mode_t);                                \
        va_end(more);                                               \
    }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) return opened(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }
int __open_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return opened(AT_FDCWD, path, flags, 0); }

FILE *fopen(const char *path, const char *how)
{
    static FILE *(*real)(const char *, const char *);
    if (!real) real = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, "fopen");
    struct call call;
    int op = 0;
    if (active()) {
        path_at(AT_FDCWD, path, call.path);
        call.other[0] = 0;
        int flags = how[0] == 'w' ? O_CREAT | O_TRUNC : how[0] == 'a' ? O_CREAT : 0;
        op = under_root(call.path) ? changes(call.path, flags) : 0;
    }
    if (!op) return real(path, how);
    begin(&call, op);
    if (failed(&call)) return NULL;
    FILE *file = real(path, how);
    finish(&call, file ? fileno(file) : -1, file != NULL, 0, 0, NULL, 0);
    return file;
}
FILE *fopen64(const char *path, const char *how) { return fopen(path, how); }

/* ---- content ---- */

/* offset -1: at the file's position. Done by plain pwritev/writev of the first half where half of it is asked for. */
static ssize_t written(int fd, const struct iovec *parts, int nparts, off_t offset, int flags)
{
    struct call call;
    call.counted = call.half = 0;
    size_t total = 0;
    for (int i = 0; i < nparts; i++) total += parts[i].iov_len;
    if (active()) {
        int keep = errno;
        path_of_fd(fd, call.path);
        call.other[0] = 0;
        begin(&call, WRITE);
        if (failed(&call)) return -1;
        errno = keep;
    }
    off_t at = offset;
    if (call.counted && offset < 0) {
        at = fcntl(fd, F_GETFL) & O_APPEND ? lseek(fd, 0, SEEK_END) : lseek(fd, 0, SEEK_CUR);
    }
    if (call.half) {
        size_t half = total / 2, done = 0;
        for (int i = 0; i < nparts && done < half; i++) {
            size_t n = parts[i].iov_len < half - done ? parts[i].iov_len : half - done;
            ssize_t r = offset < 0 ? syscall(SYS_write, fd, parts[i].iov_base, n)
                                   : syscall(SYS_pwrite64, fd, parts[i].iov_base, n, offset + (off_t)done);
            if (r <= 0) break;
            done += (size_t)r;
        }
        finish(&call, fd, 1, at, (int64_t)done, parts, nparts);
        return (ssize_t)done;
    }
    ssize_t result;
    if (nparts == 1 && !flags) {
        result = offset < 0 ? syscall(SYS_write, fd, parts[0].iov_base, parts[0].iov_len)
                            : syscall(SYS_pwrite64, fd, parts[0].iov_base, parts[0].iov_len, offset);
    } else if (offset < 0 && !flags) {
        result = syscall(SYS_writev, fd, parts, nparts);
    } else {
        result = syscall(SYS_pwritev2, fd, parts, nparts, (long)offset, 0L, flags);
    }
    if (call.counted) finish(&call, fd, result >= 0, at, result, parts, nparts);
    return result;
}

ssize_t write(int fd, const void *data, size_t n)
{
    struct iovec part = {(void *)data, n};
    return written(fd, &part, 1, -1, 0);
}
ssize_t pwrite(int fd, const void *data, size_t n, off_t offset)
{
    struct iovec part = {(void *)data, n};
    return written(fd, &part, 1, offset, 0);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) { return pwrite(fd, data, n, offset); }
ssize_t writev(int fd, const struct iovec *parts, int n) { return written(fd, parts, n, -1, 0); }
ssize_t pwritev(int fd, const struct iovec *parts, int n, off_t at) { return written(fd, parts, n, at, 0); }
ssize_t pwritev64(int fd, const struct iovec *parts, int n, off64_t at) { return written(fd, parts, n, at, 0); }
ssize_t pwritev2(int fd, const struct iovec *parts, int n, off_t at, int flags)
{
    return written(fd, parts, n, at, flags);
}
ssize_t pwritev64v2(int fd, const struct iovec *parts, int n, off64_t at, int flags)
{
    return written(fd, parts, n, at, flags);
}

/* On a descriptor, with a result of 0 or -1. */
#define ON_FD(OP, fd, offset, length, act)                                   \
    struct call call;                                                        \
    call.counted = 0;                                                        \
    if (active()) {                                                          \
        int keep = errno;                                                    \
        path_of_fd(fd, call.path);                                           \
        call.other[0] = 0;                                                   \
        begin(&call, OP);                                                    \
        if (failed(&call)) return -1;                                        \
        errno = keep;                                                        \
    }                                                                        \
    int result = (int)(act);                                                 \
    if (call.counted) finish(&call, fd, result == 0, offset, length, NULL, 0); \
    return result

int ftruncate(int fd, off_t length) { ON_FD(TRUNCATE, fd, 0, length, syscall(SYS_ftruncate, fd, length)); }
int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }
int fsync(int fd) { ON_FD(FSYNC, fd, 0, 0, syscall(SYS_fsync, fd)); }
int fdatasync(int fd) { ON_FD(FSYNC, fd, 0, 1, syscall(SYS_fdatasync, fd)); }
int syncfs(int fd) { ON_FD(OTHER, fd, 0, 0, syscall(SYS_syncfs, fd)); }
int fallocate(int fd, int mode, off_t offset, off_t length)
{
    ON_FD(mode ? OTHER : ALLOCATE, fd, offset, length, syscall(SYS_fallocate, fd, mode, offset, length));
}
int fallocate64(int fd, int mode, off64_t offset, off64_t length) { return fallocate(fd, mode, offset, length); }
int posix_fallocate(int fd, off_t offset, off_t length) { return fallocate(fd, 0, offset, length) ? errno : 0; }
int posix_fallocate64(int fd, off64_t offset, off64_t length) { return posix_fallocate(fd, offset, length); }
ssize_t sendfile(int to, int from, off_t *offset, size_t n) { ON_FD(OTHER, to, 0, 0, syscall(SYS_sendfile, to, from, offset, n)); }
ssize_t sendfile64(int to, int from, off64_t *offset, size_t n) { return sendfile(to, from, offset, n); }
ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t n, unsigned flags)
{
    ON_FD(OTHER, to, 0, 0, syscall(SYS_copy_file_range, from, a, to, b, n, flags));
}

/* ---- names ---- */

#define ON_NAMES(OP, folder, name, folder2, name2, act)                      \
    struct call call;                                                        \
    call.counted = 0;                                                        \
    if (active()) {                                                          \
        int keep = errno;                                                    \
        path_at(folder, name, call.path);                                    \
        path_at(folder2, name2, call.other);                                 \
        begin(&call, OP);                                                    \
        if (failed(&call)) return -1;                                        \
        errno = keep;                                                        \
    }                                                                        \
    int result = (int)(act);                                                 \
    if (call.counted) finish(&call, -1, result == 0, 0, 0, NULL, 0);         \
    return result

int renameat2(int f, const char *a, int g, const char *b, unsigned flags)
{
    ON_NAMES(flags & ~1u ? OTHER : RENAME, f, a, g, b, syscall(SYS_renameat2, f, a, g, b, flags));
}
int rename(const char *a, const char *b) { return renameat2(AT_FDCWD, a, AT_FDCWD, b, 0); }
int renameat(int f, const char *a, int g, const char *b) { return renameat2(f, a, g, b, 0); }
int unlinkat(int f, const char *a, int flags)
{
    ON_NAMES(flags & AT_REMOVEDIR ? RMDIR : UNLINK, f, a, f, NULL, syscall(SYS_unlinkat, f, a, flags));
}
int unlink(const char *a) { return unlinkat(AT_FDCWD, a, 0); }
int rmdir(const char *a) { return unlinkat(AT_FDCWD, a, AT_REMOVEDIR); }
int mkdirat(int f, const char *a, mode_t mode) { ON_NAMES(MKDIR, f, a, f, NULL, syscall(SYS_mkdirat, f, a, mode)); }
int mkdir(const char *a, mode_t mode) { return mkdirat(AT_FDCWD, a, mode); }
int linkat(int f, const char *a, int g, const char *b, int flags)
{
    ON_NAMES(LINK, f, a, g, b, syscall(SYS_linkat, f, a, g, b, flags));
}
int link(const char *a, const char *b) { return linkat(AT_FDCWD, a, AT_FDCWD, b, 0); }
int symlinkat(const char *to, int f, const char *a)
{
    ON_NAMES(SYMLINK, f, a, f, NULL, syscall(SYS_symlinkat, to, f, a));
}
int symlink(const char *to, const char *a) { return symlinkat(to, AT_FDCWD, a); }
