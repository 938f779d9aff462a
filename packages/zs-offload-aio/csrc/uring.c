/* io_uring by system calls, with the kernel's structures written out (the kernel's own headers are often too old).
 *
 * The pump thread makes the ring and is its only user, which is what lets completions be run when it asks for them.
 *
 *   fill slots -> prepare -> entries -> io_uring_enter(submit all, wait for 1) -> results -> again
 *   an eventfd read kept in the ring ends the wait when something is submitted
 */
#include "engine.h"
#ifdef ZS_KERNEL_AIO
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup 425
#define __NR_io_uring_enter 426
#endif

typedef struct {
    uint8_t opcode, flags;
    uint16_t ioprio;
    int32_t fd;
    uint64_t offset, address;
    uint32_t nbytes, op_flags;
    uint64_t user_data;
    uint64_t rest[3];
} entry;

typedef struct {
    uint64_t user_data;
    int32_t result;
    uint32_t flags;
} completion;

typedef struct {
    uint32_t head, tail, mask, entries, flags, dropped, array, reserved;
    uint64_t user_address;
} submission_offsets;

typedef struct {
    uint32_t head, tail, mask, entries, overflow, entries_at, flags, reserved;
    uint64_t user_address;
} completion_offsets;

typedef struct {
    uint32_t sq_entries, cq_entries, flags, thread_cpu, thread_idle, features, wq_fd, reserved[3];
    submission_offsets sq;
    completion_offsets cq;
} parameters;

enum { OP_READ = 22, OP_WRITE = 23 };
enum { ENTER_GETEVENTS = 1 };
enum {
    SETUP_CLAMP = 1 << 4,
    SETUP_SUBMIT_ALL = 1 << 7,
    SETUP_COOP_TASKRUN = 1 << 8,
    SETUP_SINGLE_ISSUER = 1 << 12,
    SETUP_DEFER_TASKRUN = 1 << 13,
};
#define WAKE UINT64_MAX

typedef struct {
    int fd;
    char *ring; /* both queues share one mapping */
    size_t ring_nbytes, entries_nbytes;
    entry *entries;
    uint32_t *sq_tail, *sq_mask, *sq_array, *cq_head, *cq_tail, *cq_mask;
    completion *completions;
    uint32_t queued; /* filled, not yet taken by the kernel */
    uint64_t woken;  /* where the eventfd is read to */
    int wake_armed;
} ring;

static int setup(ring *r)
{
    static const uint32_t FLAGS[] = {
        SETUP_CLAMP | SETUP_SUBMIT_ALL | SETUP_COOP_TASKRUN | SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN,
        SETUP_CLAMP | SETUP_SUBMIT_ALL | SETUP_COOP_TASKRUN,
        SETUP_CLAMP,
    };
    parameters p;
    for (size_t i = 0; i < sizeof FLAGS / sizeof *FLAGS; i++) { /* older kernels know fewer */
        memset(&p, 0, sizeof p);
        p.flags = FLAGS[i];
        r->fd = (int)syscall(__NR_io_uring_setup, ZS_SLOTS + 1, &p);
        if (r->fd >= 0 || errno != EINVAL)
            break;
    }
    if (r->fd < 0)
        return -errno;
    if (!(p.features & 1)) /* one mapping: since 5.4, older than the read and write operations */
        return -ENOSYS;
    size_t sq = p.sq.array + p.sq_entries * sizeof(uint32_t);
    size_t cq = p.cq.entries_at + p.cq_entries * sizeof(completion);
    r->ring_nbytes = sq > cq ? sq : cq;
    r->entries_nbytes = p.sq_entries * sizeof(entry);
    r->ring = mmap(NULL, r->ring_nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, 0);
    if (r->ring == MAP_FAILED) {
        r->ring = NULL;
        return -errno;
    }
    r->entries = mmap(NULL, r->entries_nbytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, 0x10000000);
    if (r->entries == MAP_FAILED) {
        r->entries = NULL;
        return -errno;
    }
    madvise(r->ring, r->ring_nbytes, MADV_DONTFORK); /* a child that completed our transfers would be a disaster */
    madvise(r->entries, r->entries_nbytes, MADV_DONTFORK);
    r->sq_tail = (uint32_t *)(r->ring + p.sq.tail);
    r->sq_mask = (uint32_t *)(r->ring + p.sq.mask);
    r->sq_array = (uint32_t *)(r->ring + p.sq.array);
    r->cq_head = (uint32_t *)(r->ring + p.cq.head);
    r->cq_tail = (uint32_t *)(r->ring + p.cq.tail);
    r->cq_mask = (uint32_t *)(r->ring + p.cq.mask);
    r->completions = (completion *)(r->ring + p.cq.entries_at);
    return 0;
}

static void teardown(ring *r)
{
    if (r->entries)
        munmap(r->entries, r->entries_nbytes);
    if (r->ring)
        munmap(r->ring, r->ring_nbytes);
    if (r->fd >= 0)
        close(r->fd);
}

static void push(ring *r, int opcode, int fd, void *address, int64_t nbytes, int64_t offset, uint64_t tag)
{
    uint32_t tail = *r->sq_tail, index = tail & *r->sq_mask; /* there is room: one entry for each slot, one to wake */
    r->entries[index] = (entry){.opcode = (uint8_t)opcode, .fd = fd, .offset = (uint64_t)offset,
                                .address = (uint64_t)(uintptr_t)address, .nbytes = (uint32_t)nbytes, .user_data = tag};
    r->sq_array[index] = index;
    __atomic_store_n(r->sq_tail, tail + 1, __ATOMIC_RELEASE);
    r->queued++;
}

static void push_chunk(zs_engine *engine, ring *r, zs_chunk *c)
{
    push(r, c->direction == ZS_READ ? OP_READ : OP_WRITE, c->fd, c->io_address,
         c->io_nbytes < ZS_MAX_TRANSFER ? c->io_nbytes : ZS_MAX_TRANSFER, c->io_offset, (uint64_t)(c - engine->slots));
}

/* 0, or an error that will not pass. */
static int enter(zs_engine *engine, ring *r, int wait)
{
    uint32_t submit = r->queued;
    if (submit > 1 && zs_fault(engine, 3, engine->faults.partial))
        submit /= 2;
    long taken = syscall(__NR_io_uring_enter, r->fd, submit, wait ? 1 : 0, wait ? ENTER_GETEVENTS : 0, NULL, 0);
    if (taken >= 0)
        r->queued -= (uint32_t)taken;
    else if (errno == EAGAIN || errno == EBUSY)
        usleep(100); /* the kernel is short of memory, or wants its completions taken first */
    else if (errno != EINTR)
        return -errno;
    return 0;
}

static void reap(zs_engine *engine, ring *r)
{
    uint32_t head = *r->cq_head;
    while (head != __atomic_load_n(r->cq_tail, __ATOMIC_ACQUIRE)) {
        completion done = r->completions[head & *r->cq_mask];
        __atomic_store_n(r->cq_head, ++head, __ATOMIC_RELEASE);
        if (done.user_data == WAKE) {
            r->wake_armed = 0;
            continue;
        }
        zs_chunk *c = &engine->slots[done.user_data];
        if (!zs_advance(engine, c, done.result))
            continue;
        if (c->sync)
            zs_transfer(engine, c);
        else
            push_chunk(engine, r, c);
    }
}

/* The ring is gone (somebody closed its descriptor): what it carried has no known end, what follows needs no ring. */
static void without_ring(zs_engine *engine, int error)
{
    for (int i = 0; i < ZS_SLOTS; i++)
        if (engine->slots[i].op)
            zs_chunk_over(engine, &engine->slots[i], error);
    pthread_mutex_lock(&engine->mutex);
    while (!engine->stop) {
        zs_chunk *c = zs_next_chunk(engine);
        pthread_mutex_unlock(&engine->mutex);
        int failed = c ? zs_prepare(engine, c) : 0;
        if (c && failed)
            zs_chunk_over(engine, c, -failed);
        else if (c)
            zs_transfer(engine, c);
        else
            usleep(1000);
        pthread_mutex_lock(&engine->mutex);
    }
    pthread_mutex_unlock(&engine->mutex);
}

static void *pump(void *argument)
{
    zs_engine *engine = argument;
    ring r = {.fd = -1};
    int failed = setup(&r), error = failed, stop = 0;
    zs_pump_says(engine, error, "io_uring_setup");
    while (!error) {
        zs_chunk *c;
        pthread_mutex_lock(&engine->mutex);
        while ((c = zs_next_chunk(engine))) {
            pthread_mutex_unlock(&engine->mutex);
            int refused = zs_prepare(engine, c);
            if (refused)
                zs_chunk_over(engine, c, -refused);
            else {
                push_chunk(engine, &r, c); /* it is in flight with the next entry only: still ours to look at */
                if (c->bounced) /* the disk need not wait while the next one is copied */
                    enter(engine, &r, 0);
            }
            pthread_mutex_lock(&engine->mutex);
        }
        zs_pump_sleeps(engine);
        stop = engine->stop && !engine->in_flight;
        pthread_mutex_unlock(&engine->mutex);
        if (stop)
            break;
        if (!r.wake_armed) {
            push(&r, OP_READ, engine->wake_fd, &r.woken, sizeof r.woken, 0, WAKE);
            r.wake_armed = 1;
        }
        error = enter(engine, &r, 1);
        reap(engine, &r);
    }
    teardown(&r);
    if (error && !failed)
        without_ring(engine, -error);
    return NULL;
}

int zs_uring_start(zs_engine *engine, char *reason, size_t size) { return zs_pump_start(engine, pump, reason, size); }
#endif
