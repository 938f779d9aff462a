/* Files: opened twice where direct I/O is possible, once for what is aligned and once for the rest. */
#include "engine.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#ifdef ZS_LINUX
#include <sys/syscall.h>
#include <sys/utsname.h>
#endif

/* ---- direct or not ---- */

#ifdef ZS_LINUX
/* The kernel's statx structure, written out: C libraries and their headers are often older than the kernel. */
typedef struct {
    uint32_t mask, blksize;
    uint64_t attributes;
    uint32_t nlink, uid, gid;
    uint16_t mode, spare0;
    uint64_t ino, size, blocks, attributes_mask;
    struct { int64_t sec; uint32_t nsec; int32_t reserved; } times[4];
    uint32_t rdev_major, rdev_minor, dev_major, dev_minor;
    uint64_t mnt_id;
    uint32_t dio_mem_align, dio_offset_align;
    uint64_t spare3[12];
} kernel_statx;
enum { WANT_DIOALIGN = 0x2000 };

/* Whether the kernel is new enough (6.1) to say how direct I/O must be aligned. */
static int kernel_states_alignment(void)
{
    struct utsname name;
    int major = 0, minor = 0;
    return uname(&name) == 0 && sscanf(name.release, "%d.%d", &major, &minor) == 2 &&
           (major > 6 || (major == 6 && minor >= 1));
}

/* 0 and the alignments, or why this file is not for direct I/O. */
static int alignment_of(int fd, int64_t *memory, int64_t *offset, char *reason, size_t size)
{
    kernel_statx s;
    memset(&s, 0, sizeof s);
#ifdef __NR_statx
    long result = syscall(__NR_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, WANT_DIOALIGN, &s);
#else
    long result = -1;
    errno = ENOSYS;
#endif
    if (result == 0 && (s.mask & WANT_DIOALIGN)) {
        if (!s.dio_offset_align || !s.dio_mem_align) {
            snprintf(reason, size, "the file system does not support direct I/O on this file");
            return -EINVAL;
        }
        *memory = s.dio_mem_align;
        *offset = s.dio_offset_align;
    } else if (kernel_states_alignment()) {
        snprintf(reason, size, "the file system does not say how direct I/O must be aligned");
        return -EINVAL;
    } else
        *memory = *offset = 4096; /* enough for every disk; a refusal falls back to the page cache */
    if (*offset > ZS_MAX_ALIGN || *memory > ZS_MAX_ALIGN) {
        snprintf(reason, size, "direct I/O would need an alignment of %lld bytes",
                 (long long)(*offset > *memory ? *offset : *memory));
        return -EINVAL;
    }
    return 0;
}

static void open_direct(zs_file *file, int flags)
{
    char name[64], *reason = file->reason;
    size_t size = sizeof file->reason;
    if (alignment_of(file->fd, &file->memory_align, &file->offset_align, reason, size))
        return;
    int again = (flags & ~(O_CREAT | O_EXCL | O_TRUNC)) | O_DIRECT;
    snprintf(name, sizeof name, "/proc/self/fd/%d", file->fd); /* the same file, whatever the path means by now */
    do
        file->direct_fd = open(name, again);
    while (file->direct_fd < 0 && errno == EINTR);
    if (file->direct_fd < 0 && errno == ENOENT) { /* no /proc */
        struct stat a, b;
        file->direct_fd = open(file->path, again);
        if (file->direct_fd >= 0 && (fstat(file->fd, &a) || fstat(file->direct_fd, &b) || a.st_dev != b.st_dev ||
                                     a.st_ino != b.st_ino)) {
            close(file->direct_fd);
            file->direct_fd = -1;
            errno = ESTALE;
        }
    }
    if (file->direct_fd < 0)
        snprintf(reason, size, "opening it for direct I/O was refused: %s", strerror(errno));
}
#else
static void open_direct(zs_file *file, int flags)
{
    (void)flags;
    snprintf(file->reason, sizeof file->reason, "direct I/O is for Linux");
}
#endif

/* ---- open and close ---- */

static zs_inode *inode_get(zs_engine *engine, uint64_t device, uint64_t number) /* mutex held */
{
    zs_inode *inode = engine->inodes;
    while (inode && (inode->device != device || inode->number != number))
        inode = inode->next;
    if (!inode) {
        if (!(inode = calloc(1, sizeof *inode)))
            return NULL;
        inode->device = device;
        inode->number = number;
        inode->next = engine->inodes;
        engine->inodes = inode;
    }
    inode->refs++;
    return inode;
}

void zs_inode_unref(zs_engine *engine, zs_inode *inode)
{
    if (--inode->refs)
        return;
    zs_inode **link = &engine->inodes;
    while (*link != inode)
        link = &(*link)->next;
    *link = inode->next;
    free(inode);
}

static void release(zs_file *file)
{
    if (file->direct_fd >= 0)
        close(file->direct_fd);
    if (file->fd >= 0)
        close(file->fd);
    free(file->path);
    free(file);
}

void zs_file_unref(zs_file *file)
{
    if (--file->refs)
        return;
    zs_inode_unref(file->engine, file->inode);
    file->engine->refs--; /* never the last: whoever calls holds one */
    release(file);
}

static int open_first(zs_file *file, int fd, int flags, int permissions, struct stat *s)
{
    do /* not to be held up by a pipe that nobody writes to */
        file->fd = fd >= 0 ? fcntl(fd, F_DUPFD_CLOEXEC, 0)
                           : open(file->path, flags | O_CLOEXEC | O_NONBLOCK, permissions);
    while (file->fd < 0 && errno == EINTR);
    if (file->fd < 0)
        return -errno;
    if (fstat(file->fd, s))
        return -errno;
    if (S_ISDIR(s->st_mode))
        return -EISDIR;
    if (S_ISFIFO(s->st_mode) || S_ISSOCK(s->st_mode))
        return -ESPIPE;
    return fcntl(file->fd, F_SETFL, flags & ~(O_CREAT | O_EXCL | O_TRUNC)) ? -errno : 0;
}

/* The folder is looked up again when the file is made durable: the working directory may be another by then. */
static char *absolute(const char *path)
{
    char *folder = *path == '/' ? NULL : getcwd(NULL, 0), *result;
    if (!folder)
        return strdup(path);
    size_t size = strlen(folder) + strlen(path) + 2;
    if ((result = malloc(size)))
        snprintf(result, size, "%s/%s", folder, path);
    free(folder);
    return result;
}

int zs_file_open(zs_engine *engine, const char *path, int flags, int permissions, int direct, zs_file **result)
{
    return zs_file_make(engine, -1, path, flags, permissions, direct, result);
}

int zs_file_make(zs_engine *engine, int fd, const char *path, int flags, int permissions, int direct, zs_file **result)
{
    if (zs_is_foreign(engine))
        return -ECHILD;
    zs_file *file = calloc(1, sizeof *file);
    if (!file || !(file->path = absolute(path))) {
        free(file);
        return -ENOMEM;
    }
    file->engine = engine;
    file->writable = (flags & O_ACCMODE) != O_RDONLY;
    file->refs = 1;
    file->fd = file->direct_fd = -1;
    struct stat s;
    int error = open_first(file, fd, flags, permissions, &s);
    if (error) {
        release(file);
        return error;
    }
    file->offset_align = file->memory_align = 1;
    if (direct == ZS_DIRECT_NEVER)
        snprintf(file->reason, sizeof file->reason, "asked for");
    else if (engine->backend == ZS_PLAIN)
        snprintf(file->reason, sizeof file->reason, "the plain backend uses the page cache");
    else
        open_direct(file, flags | O_CLOEXEC);
    if (file->direct_fd < 0) {
        file->offset_align = file->memory_align = 1;
        size_t used = strlen(file->reason);
        if (engine->backend == ZS_LIBAIO) /* which is asynchronous for direct I/O only */
            snprintf(file->reason + used, sizeof file->reason - used, "; carried by pread and pwrite");
    }
    int64_t page = sysconf(_SC_PAGESIZE);
    file->page = file->offset_align > page ? file->offset_align : page;
    if (file->page % file->offset_align) /* never seen; then neither is a border of the other */
        file->page *= file->offset_align;

    pthread_mutex_lock(&engine->mutex);
    error = engine->closing ? -ESHUTDOWN : 0;
    if (!error) {
        file->inode = inode_get(engine, (uint64_t)s.st_dev, (uint64_t)s.st_ino);
        file->tuners[ZS_READ] = zs_tuner_get(engine, (uint64_t)s.st_dev, ZS_READ);
        file->tuners[ZS_WRITE] = zs_tuner_get(engine, (uint64_t)s.st_dev, ZS_WRITE);
        if (!file->inode || !file->tuners[0] || !file->tuners[1]) {
            error = -ENOMEM;
            if (file->inode)
                zs_inode_unref(engine, file->inode);
        } else
            engine->refs++;
    }
    pthread_mutex_unlock(&engine->mutex);
    if (error) {
        release(file);
        return error;
    }
    *result = file;
    return 0;
}

void zs_file_ref(zs_file *file)
{
    if (zs_is_foreign(file->engine))
        return;
    pthread_mutex_lock(&file->engine->mutex);
    file->refs++;
    pthread_mutex_unlock(&file->engine->mutex);
}

static void let_go(zs_file *file, int closed)
{
    zs_engine *engine = file->engine;
    pthread_mutex_lock(&engine->mutex);
    engine->refs++; /* so that the file's own reference is not the last */
    file->closed |= closed;
    zs_file_unref(file);
    pthread_mutex_unlock(&engine->mutex);
    zs_engine_unref(engine);
}

void zs_file_release(zs_file *file)
{
    if (!zs_is_foreign(file->engine))
        let_go(file, 0);
}

int zs_file_close(zs_file *file)
{
    if (zs_is_foreign(file->engine))
        return -ECHILD;
    let_go(file, 1);
    return 0;
}

int zs_file_info_get(zs_file *file, zs_file_info *info)
{
    struct stat s;
    if (fstat(file->fd, &s))
        return -errno;
    memset(info, 0, sizeof *info);
    info->direct = file->direct_fd >= 0;
    info->offset_align = (int)file->offset_align;
    info->memory_align = (int)file->memory_align;
    memcpy(info->reason, file->reason, sizeof info->reason);
    info->nbytes = s.st_size;
    info->device = (uint64_t)s.st_dev;
    info->inode = (uint64_t)s.st_ino;
    return 0;
}
