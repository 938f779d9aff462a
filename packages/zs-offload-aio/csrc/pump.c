/* What io_uring and libaio share: one thread that owns the queue, an eventfd that wakes it; and which backend works. */
#include "engine.h"

#include <fcntl.h>
#include <stdio.h>
#ifdef ZS_LINUX
#include <sys/eventfd.h>
#include <sys/syscall.h>
#endif

void zs_wake(zs_engine *engine)
{
    if (engine->backend >= ZS_THREADS) {
        if (engine->ready_first[0] || engine->ready_first[1])
            pthread_cond_signal(&engine->work);
    } else if (engine->wants_wake) {
        engine->wants_wake = 0;
        uint64_t one = 1;
        while (write(engine->wake_fd, &one, sizeof one) < 0 && errno == EINTR) {
        }
    }
}

void zs_pump_sleeps(zs_engine *engine) { engine->wants_wake = 1; }

#ifdef ZS_KERNEL_AIO
int zs_pump_start(zs_engine *engine, void *(*pump)(void *), char *reason, size_t size)
{
    engine->wake_fd = eventfd(0, EFD_CLOEXEC);
    if (engine->wake_fd < 0) {
        snprintf(reason, size, "eventfd: %s", strerror(errno));
        return -errno;
    }
    engine->threads = calloc(1, sizeof *engine->threads);
    if (!engine->threads)
        return -ENOMEM;
    engine->start_error = 1;
    int error = zs_spawn(&engine->threads[0], pump, engine);
    if (error) {
        snprintf(reason, size, "no thread could be started: %s", strerror(-error));
        return error;
    }
    pthread_mutex_lock(&engine->mutex);
    while (engine->start_error == 1)
        pthread_cond_wait(&engine->idle, &engine->mutex);
    error = engine->start_error;
    pthread_mutex_unlock(&engine->mutex);
    if (error) {
        pthread_join(engine->threads[0], NULL);
        snprintf(reason, size, "%s", engine->start_reason);
    } else
        engine->thread_count = 1;
    return error;
}

void zs_pump_says(zs_engine *engine, int error, const char *what)
{
    pthread_mutex_lock(&engine->mutex);
    if (error)
        snprintf(engine->start_reason, sizeof engine->start_reason, "%s: %s", what, strerror(-error));
    engine->start_error = error;
    pthread_cond_broadcast(&engine->idle);
    pthread_mutex_unlock(&engine->mutex);
}

#else

int zs_uring_start(zs_engine *engine, char *reason, size_t size)
{
    (void)engine;
    snprintf(reason, size, "not in this build (it is for Linux)");
    return -ENOSYS;
}

int zs_libaio_start(zs_engine *engine, char *reason, size_t size) { return zs_uring_start(engine, reason, size); }
#endif

/* What need not wait until nobody refers to the engine any more. Nothing runs and nothing is submitted. */
void zs_backend_close(zs_engine *engine)
{
    pthread_mutex_lock(&engine->mutex);
    if (engine->wake_fd >= 0)
        close(engine->wake_fd);
    engine->wake_fd = -1;
    engine->wants_wake = 0;
    zs_bounces_free(engine);
    pthread_mutex_unlock(&engine->mutex);
}

/* ---- which works ---- */

int zs_scratch(void)
{
#if defined(ZS_LINUX) && defined(__NR_memfd_create)
    int fd = (int)syscall(__NR_memfd_create, "zs-probe", 1 /* MFD_CLOEXEC */);
    if (fd >= 0)
        return fd;
#endif
    FILE *file = tmpfile();
    int copy = file ? dup(fileno(file)) : -1;
    if (file)
        fclose(file);
    return copy;
}

int zs_backend_probe(int backend, char *reason, size_t size)
{
    static const char TEXT[] = "written, then read";
    char back[sizeof TEXT] = "";
    zs_options options = {.backend = backend, .depth = 2, .threads = 1};
    zs_engine *engine = NULL;
    zs_file *file = NULL;
    int limited = 0, error = zs_engine_open(&options, &engine, reason, size);
    if (error)
        return error;
    int fd = zs_scratch();
    error = fd < 0 ? -errno : zs_file_make(engine, fd, "probe", O_RDWR, 0, ZS_DIRECT_NEVER, &file);
    for (int direction = ZS_WRITE; !error && direction >= ZS_READ; direction--) {
        zs_op *op;
        zs_segment all = {direction == ZS_WRITE ? (char *)TEXT : back, sizeof TEXT};
        zs_op_status_t status;
        if ((error = zs_submit(file, direction, &all, 1, 0, &op)))
            break;
        error = zs_op_wait(op, 10.0);
        zs_op_status(op, &status);
        if (!error)
            error = -status.error;
        if (error == -EFBIG || error == -ENODATA) { /* answered: no files may be written here, so nothing is to read */
            limited = 1;
            error = 0;
        }
        zs_op_release(op);
    }
    zs_stats stats;
    zs_engine_stats(engine, &stats);
    if (!error && !limited && memcmp(back, TEXT, sizeof TEXT))
        error = -EIO;
    if (!error && backend == ZS_IO_URING && stats.downgraded) /* it was done, but not by the ring */
        error = -EOPNOTSUPP;
    if (error)
        snprintf(reason, size, "a transfer failed: %s", strerror(-error));
    if (file)
        zs_file_close(file);
    if (fd >= 0)
        close(fd);
    zs_engine_close(engine);
    return error;
}
