/* Linux AIO by system calls. It is asynchronous for direct I/O only: what goes through the page cache is carried by
 * pread and pwrite on the pump's thread.
 *
 * One eventfd tells both of completions (each counts on it) and of submissions, so that one read waits for either.
 */
#include "engine.h"
#ifdef ZS_KERNEL_AIO
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>

typedef struct {
    uint64_t data;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    uint32_t key, rw_flags;
#else
    uint32_t rw_flags, key;
#endif
    uint16_t opcode;
    int16_t priority;
    uint32_t fd;
    uint64_t address, nbytes;
    int64_t offset;
    uint64_t reserved;
    uint32_t flags, event_fd;
} request;

typedef struct {
    uint64_t data, object;
    int64_t result, result2;
} event;

enum { COMMAND_READ = 0, COMMAND_WRITE = 1, FLAG_EVENT_FD = 1 };

typedef struct {
    unsigned long context;
    request requests[ZS_SLOTS];  /* by slot */
    request *queue[ZS_SLOTS];    /* filled, not yet taken by the kernel */
    int queued;
} queue;

static void push(zs_engine *engine, queue *q, zs_chunk *c)
{
    request *r = &q->requests[c - engine->slots];
    *r = (request){.data = (uint64_t)(c - engine->slots), .fd = (uint32_t)c->fd,
                   .address = (uint64_t)(uintptr_t)c->io_address,
                   .opcode = c->direction == ZS_READ ? COMMAND_READ : COMMAND_WRITE,
                   .nbytes = (uint64_t)c->io_nbytes, .offset = c->io_offset, .flags = FLAG_EVENT_FD,
                   .event_fd = (uint32_t)engine->wake_fd};
    q->queue[q->queued++] = r;
}

/* A chunk that the kernel does not take asynchronously, or that it answered. */
static void go_on(zs_engine *engine, queue *q, zs_chunk *c)
{
    if (c->sync || !c->direct)
        zs_transfer(engine, c);
    else
        push(engine, q, c);
}

static void submit(zs_engine *engine, queue *q)
{
    for (int tries = 0; q->queued;) {
        long count = q->queued;
        if (count > 1 && zs_fault(engine, 3, engine->faults.partial))
            count /= 2;
        long taken = syscall(__NR_io_submit, q->context, count, q->queue);
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0 && errno == EAGAIN && ++tries < 1000) {
            usleep(100);
            continue;
        }
        if (taken <= 0) { /* the first one is refused: its own error, not the others' */
            zs_chunk *c = &engine->slots[q->queue[0]->data];
            int error = taken < 0 ? errno : EAGAIN;
            memmove(q->queue, q->queue + 1, sizeof *q->queue * (size_t)--q->queued);
            if (error == EBADF && !c->sync) { /* the context itself may be what is bad */
                c->sync = 1;
                zs_transfer(engine, c);
            } else if (zs_advance(engine, c, -error))
                go_on(engine, q, c);
            tries = 0;
            continue;
        }
        q->queued -= (int)taken; /* a part may be taken */
        memmove(q->queue, q->queue + taken, sizeof *q->queue * (size_t)q->queued);
        tries = 0;
    }
}

static void reap(zs_engine *engine, queue *q)
{
    event events[64];
    struct timespec now = {0, 0};
    long n;
    do {
        do
            n = syscall(__NR_io_getevents, q->context, 0L, 64L, events, &now);
        while (n < 0 && errno == EINTR);
        for (long i = 0; i < n; i++) {
            zs_chunk *c = &engine->slots[events[i].data];
            if (zs_advance(engine, c, events[i].result))
                go_on(engine, q, c);
        }
    } while (n == 64);
}

/* A read of an empty file, submitted and answered: a filter of system calls may let the setup pass and nothing else. */
static int try_it(queue *q)
{
    char byte;
    int fd = zs_scratch();
    request read = {.opcode = COMMAND_READ, .fd = (uint32_t)fd, .address = (uint64_t)(uintptr_t)&byte, .nbytes = 1};
    request *list = &read;
    event answer = {0};
    long taken = fd < 0 ? -1 : syscall(__NR_io_submit, q->context, 1L, &list);
    if (taken == 1)
        taken = syscall(__NR_io_getevents, q->context, 1L, 1L, &answer, NULL);
    int error = taken != 1 ? (errno ? -errno : -EIO) : answer.result < 0 ? (int)answer.result : 0;
    if (fd >= 0)
        close(fd);
    return error;
}

static void *pump(void *argument)
{
    zs_engine *engine = argument;
    queue *q = calloc(1, sizeof *q);
    const char *what = "io_setup";
    int error = !q ? -ENOMEM : syscall(__NR_io_setup, (long)ZS_SLOTS, &q->context) ? -errno : 0;
    if (!error && (error = try_it(q)))
        what = "io_submit";
    zs_pump_says(engine, error, what);
    while (!error) {
        zs_chunk *c;
        pthread_mutex_lock(&engine->mutex);
        while ((c = zs_next_chunk(engine))) {
            pthread_mutex_unlock(&engine->mutex);
            int failed = zs_prepare(engine, c), here = !c->direct, bounced = c->bounced;
            if (here) { /* it is carried on this thread: the others go first, and are answered in between */
                submit(engine, q);
                reap(engine, q);
            }
            if (failed)
                zs_chunk_over(engine, c, -failed);
            else
                go_on(engine, q, c);
            if (bounced && !here) /* the disk need not wait while the next one is copied */
                submit(engine, q);
            pthread_mutex_lock(&engine->mutex);
        }
        zs_pump_sleeps(engine);
        int stop = engine->stop && !engine->in_flight;
        pthread_mutex_unlock(&engine->mutex);
        if (stop)
            break;
        submit(engine, q);
        uint64_t count;
        while (read(engine->wake_fd, &count, sizeof count) < 0 && errno == EINTR) {
        }
        reap(engine, q);
    }
    if (q && q->context)
        syscall(__NR_io_destroy, q->context);
    free(q);
    return NULL;
}

int zs_libaio_start(zs_engine *engine, char *reason, size_t size) { return zs_pump_start(engine, pump, reason, size); }
#endif
