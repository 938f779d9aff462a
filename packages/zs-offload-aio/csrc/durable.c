/* What is asked of a file as a whole: its space, its size, the end of its transfers, its durability. */
#include "engine.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>

int zs_file_preallocate(zs_file *file, int64_t nbytes, int *allocated)
{
    if (zs_is_foreign(file->engine))
        return -ECHILD;
    if (nbytes < 0)
        return -EINVAL;
    struct stat s;
    *allocated = 1;
    if (nbytes == 0)
        return 0;
#ifdef ZS_LINUX
    int result; /* not posix_fallocate: where the file system cannot, that writes every block */
    do
        result = fallocate(file->fd, 0, 0, nbytes);
    while (result && errno == EINTR);
    if (!result)
        return 0;
    if (errno != EOPNOTSUPP && errno != ENOSYS && errno != ENODEV)
        return -errno;
    if (errno == ENODEV) { /* a device: it has the size that it has */
        *allocated = 0;
        return 0;
    }
#endif
    *allocated = 0;
    if (fstat(file->fd, &s))
        return -errno;
    return s.st_size >= nbytes ? 0 : zs_file_truncate(file, nbytes);
}

int zs_file_truncate(zs_file *file, int64_t nbytes)
{
    if (zs_is_foreign(file->engine))
        return -ECHILD;
    int result;
    do
        result = ftruncate(file->fd, nbytes);
    while (result && errno == EINTR);
    return result ? -errno : 0;
}

static int live_of(const zs_file *file, int which)
{
    return which == ZS_ALL_OF_INODE ? file->inode->first != NULL : file->live[which];
}

int zs_file_drain(zs_file *file, int which, double timeout_s)
{
    zs_engine *engine = file->engine;
    if (zs_is_foreign(engine))
        return -ECHILD;
    int result = 0;
    double deadline = zs_now() + timeout_s;
    pthread_mutex_lock(&engine->mutex);
    while (live_of(file, which) && !result)
        if (zs_timed_wait(&engine->idle, &engine->mutex, deadline) == ETIMEDOUT && live_of(file, which))
            result = -ETIMEDOUT;
    pthread_mutex_unlock(&engine->mutex);
    return result;
}

/* Of the file itself: its path may be a link, whose folder is another. */
static int sync_parent(const zs_file *file)
{
    char *folder = NULL, *slash;
#ifdef ZS_LINUX
    char name[64], real[4096];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file->fd);
    ssize_t size = readlink(name, real, sizeof real);
    if (size > 0 && size < (ssize_t)sizeof real && *real == '/')
        folder = strndup(real, (size_t)size);
#endif
    if (!folder && !(folder = realpath(file->path, NULL)))
        folder = strdup(file->path);
    if (!folder)
        return -ENOMEM;
    if (!(slash = strrchr(folder, '/')))
        strcpy(folder, "."); /* a name has at least one character */
    else
        slash[slash == folder] = 0;
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int error = fd < 0 ? -errno : 0;
    if (!error && fsync(fd) && errno != EINVAL) /* EINVAL: a file system whose folders have nothing to sync */
        error = -errno;
    if (fd >= 0)
        close(fd);
    free(folder);
    return error;
}

int zs_file_flush(zs_file *file, int level)
{
    zs_engine *engine = file->engine;
    if (zs_is_foreign(engine))
        return -ECHILD;
    if (level == ZS_FLUSH_NONE)
        return 0;
    pthread_mutex_lock(&engine->mutex);
    int error = file->inode->sync_error;
    pthread_mutex_unlock(&engine->mutex);
    if (error) /* the kernel tells once and forgets: asking again would be answered "fine" */
        return -error;
    int result;
    do {
#ifdef __APPLE__
        result = fcntl(file->fd, F_FULLFSYNC);
#else
        result = level == ZS_FLUSH_DATA ? fdatasync(file->fd) : fsync(file->fd);
#endif
    } while (result && errno == EINTR);
    if (result) {
        error = errno;
        pthread_mutex_lock(&engine->mutex);
        if (!file->inode->sync_error)
            file->inode->sync_error = error;
        pthread_mutex_unlock(&engine->mutex);
        return -error;
    }
    return level == ZS_FLUSH_FULL ? sync_parent(file) : 0;
}
