/* The engine's life. */
#include "engine.h"

#include <stdio.h>
#include <time.h>

static const char *const NAMES[ZS_BACKENDS] = {"io_uring", "libaio", "threads", "plain"};

const char *zs_backend_name(int backend) { return backend >= 0 && backend < ZS_BACKENDS ? NAMES[backend] : "none"; }

int zs_backend_from_name(const char *name)
{
    for (int i = 0; i < ZS_BACKENDS; i++)
        if (!strcmp(name, NAMES[i]))
            return i;
    return -EINVAL;
}

double zs_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

int zs_timed_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, double deadline)
{
#ifdef __APPLE__ /* no clock of one's choice there: the time left, relative */
    double left = deadline - zs_now();
    struct timespec t = {(time_t)(left > 0 ? left : 0), 0};
    t.tv_nsec = (long)(((left > 0 ? left : 0) - (double)t.tv_sec) * 1e9);
    return pthread_cond_timedwait_relative_np(cond, mutex, &t);
#else
    struct timespec t = {(time_t)deadline, 0};
    t.tv_nsec = (long)((deadline - (double)t.tv_sec) * 1e9);
    return pthread_cond_timedwait(cond, mutex, &t);
#endif
}

int zs_cond_init(pthread_cond_t *cond)
{
#ifdef __APPLE__
    return pthread_cond_init(cond, NULL);
#else
    pthread_condattr_t attributes;
    int error = pthread_condattr_init(&attributes);
    if (error)
        return error;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    error = pthread_cond_init(cond, &attributes);
    pthread_condattr_destroy(&attributes);
    return error;
#endif
}

int zs_is_foreign(const zs_engine *engine) { return engine->pid != getpid(); }

int zs_engine_foreign(const zs_engine *engine) { return zs_is_foreign(engine); }

static void read_faults(zs_faults *faults)
{
    const char *text = getenv("ZS_AIO_FAULTS");
    unsigned n;
    for (; text && *text; text = strchr(text, ',') ? strchr(text, ',') + 1 : NULL) {
        if (sscanf(text, "eintr=%u", &n) == 1)
            faults->eintr = n;
        else if (sscanf(text, "eagain=%u", &n) == 1)
            faults->eagain = n;
        else if (sscanf(text, "short=%u", &n) == 1)
            faults->shorten = n;
        else if (sscanf(text, "partial=%u", &n) == 1)
            faults->partial = n;
    }
}

int zs_fault(zs_engine *engine, int kind, unsigned every)
{
    return every && __atomic_add_fetch(&engine->faults.counts[kind], 1, __ATOMIC_RELAXED) % every == 0;
}

static void engine_free(zs_engine *engine)
{
    zs_backend_close(engine);
    for (zs_tuner *tuner = engine->tuners, *next; tuner; tuner = next) {
        next = tuner->next;
        free(tuner);
    }
    pthread_cond_destroy(&engine->idle);
    pthread_cond_destroy(&engine->work);
    pthread_mutex_destroy(&engine->mutex);
    free(engine->threads);
    free(engine);
}

void zs_engine_ref(zs_engine *engine)
{
    if (zs_is_foreign(engine))
        return;
    pthread_mutex_lock(&engine->mutex);
    engine->refs++;
    pthread_mutex_unlock(&engine->mutex);
}

void zs_engine_unref(zs_engine *engine)
{
    if (zs_is_foreign(engine)) /* the mutex may be held for ever; the memory is the child's copy */
        return;
    pthread_mutex_lock(&engine->mutex);
    int left = --engine->refs;
    pthread_mutex_unlock(&engine->mutex);
    if (!left)
        engine_free(engine);
}

static int start(zs_engine *engine, int threads, char *reason, size_t size)
{
    switch (engine->backend) {
    case ZS_IO_URING:
        return zs_uring_start(engine, reason, size);
    case ZS_LIBAIO:
        return zs_libaio_start(engine, reason, size);
    case ZS_THREADS:
        return zs_threads_start(engine, threads, reason, size);
    default:
        return zs_threads_start(engine, 1, reason, size);
    }
}

int zs_engine_open(const zs_options *options, zs_engine **result, char *reason, size_t size)
{
    snprintf(reason, size, "%s", "");
    if (options->chunk_nbytes < 0 || options->chunk_nbytes % 4096 || options->chunk_nbytes > ZS_MAX_TRANSFER ||
        options->depth < 0 || options->depth > ZS_SLOTS || options->threads < 0 || options->threads > ZS_SLOTS ||
        options->backend >= ZS_BACKENDS)
        return -EINVAL;
    int backend = options->backend;
    if (backend < 0) {
        for (backend = 0; backend < ZS_BACKENDS; backend++)
            if (zs_backend_probe(backend, reason, size) == 0)
                break;
        if (backend == ZS_BACKENDS)
            return -EAGAIN;
        snprintf(reason, size, "%s", "");
    }
    zs_engine *engine = calloc(1, sizeof *engine);
    if (!engine)
        return -ENOMEM;
    int error = pthread_mutex_init(&engine->mutex, NULL);
    if (!error && (error = zs_cond_init(&engine->idle)))
        pthread_mutex_destroy(&engine->mutex);
    else if (!error && (error = zs_cond_init(&engine->work))) {
        pthread_cond_destroy(&engine->idle);
        pthread_mutex_destroy(&engine->mutex);
    }
    if (error) {
        free(engine);
        return -error;
    }
    engine->refs = 1;
    engine->pid = getpid();
    engine->backend = backend;
    engine->wake_fd = -1;
    if (options->depth || options->chunk_nbytes) { /* one given: the other follows, 32 MiB in flight */
        int64_t chunk = options->chunk_nbytes ? options->chunk_nbytes : (int64_t)1 << 20;
        int64_t depth = ((int64_t)32 << 20) / chunk;
        engine->fixed_chunk = chunk;
        engine->fixed_depth = options->depth ? options->depth : depth < 4 ? 4 : depth > 64 ? 64 : (int)depth;
    }
    for (int i = 0; i < ZS_SLOTS; i++)
        engine->slots[i].next_free = i + 1 < ZS_SLOTS ? i + 1 : -1;
    read_faults(&engine->faults);
    engine->progress = zs_now();
    int threads = options->threads ? options->threads : options->depth && options->depth < 4 ? options->depth : 4;
    error = start(engine, threads, reason, size);
    if (error) {
        engine_free(engine);
        return error;
    }
    *result = engine;
    return 0;
}

int zs_engine_backend(const zs_engine *engine) { return engine->backend; }

int zs_engine_drain(zs_engine *engine, double timeout_s)
{
    if (zs_is_foreign(engine))
        return -ECHILD;
    int result = 0;
    double deadline = zs_now() + timeout_s;
    pthread_mutex_lock(&engine->mutex);
    while (engine->live && !result)
        if (zs_timed_wait(&engine->idle, &engine->mutex, deadline) == ETIMEDOUT && engine->live)
            result = -ETIMEDOUT;
    pthread_mutex_unlock(&engine->mutex);
    return result;
}

double zs_engine_quiet_s(zs_engine *engine)
{
    pthread_mutex_lock(&engine->mutex);
    double quiet = zs_now() - engine->progress;
    pthread_mutex_unlock(&engine->mutex);
    return quiet;
}

void zs_engine_begin_close(zs_engine *engine)
{
    if (zs_is_foreign(engine))
        return;
    pthread_mutex_lock(&engine->mutex);
    engine->closing = 1;
    for (zs_inode *inode = engine->inodes, *next_inode; inode; inode = next_inode) {
        inode->refs++; /* the end of its last operation may let go of it */
        for (zs_op *op = inode->first, *next; op; op = next) {
            next = op->next_live;
            if (op->direction == ZS_READ)
                zs_cancel(op);
        }
        next_inode = inode->next;
        zs_inode_unref(engine, inode);
    }
    pthread_mutex_unlock(&engine->mutex);
}

int zs_engine_close(zs_engine *engine)
{
    if (zs_is_foreign(engine))
        return -ECHILD; /* its threads do not exist here and its memory may be half written: leave it */
    zs_engine_begin_close(engine);
    pthread_mutex_lock(&engine->mutex);
    if (engine->closed) {
        pthread_mutex_unlock(&engine->mutex);
        return 0;
    }
    engine->closed = 1;
    while (engine->live)
        pthread_cond_wait(&engine->idle, &engine->mutex);
    engine->stop = 1;
    pthread_cond_broadcast(&engine->work);
    engine->wants_wake = 1;
    zs_wake(engine);
    pthread_mutex_unlock(&engine->mutex);
    for (int i = 0; i < engine->thread_count; i++)
        pthread_join(engine->threads[i], NULL);
    zs_backend_close(engine);
    zs_engine_unref(engine);
    return 0;
}

void zs_engine_stats(zs_engine *engine, zs_stats *stats)
{
    pthread_mutex_lock(&engine->mutex);
    *stats = engine->stats;
    stats->in_flight = engine->live;
    pthread_mutex_unlock(&engine->mutex);
}
