/* Inside of the engine: what its parts share. zs_aio.h is what the world sees.
 *
 * op      one request, ordered after earlier ones that overlap it
 * chunk   one transfer of an op, at most one system call long; lives in a slot
 * tuner   chunk size and depth of one direction on one device
 *
 *   submit --> blocked --(earlier overlapping ops end)--> ready[direction] --> chunks in flight --> ended
 *                                                          FIFO                  pump or workers
 *
 * One mutex guards all of it; it is never held across a system call that transfers, nor across a copy of a chunk.
 */
#ifndef ZS_ENGINE_H
#define ZS_ENGINE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#ifdef __linux__
#define ZS_LINUX 1
#ifndef ZS_NO_KERNEL_AIO
#define ZS_KERNEL_AIO 1
#endif
#endif

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#include "zs_aio.h"

enum { ZS_SLOTS = 256 };                     /* most transfers in flight in one engine */
#define ZS_BOUNCE_NBYTES ((int64_t)1 << 20)  /* of one slot's aligned buffer */
#define ZS_SMALL_NBYTES ((int64_t)1 << 16)   /* up to this, of a small one */
#define ZS_MAX_ALIGN ((int64_t)1 << 16)      /* file systems that ask for more are used through the page cache */
#define ZS_MAX_TRANSFER ((int64_t)1 << 30)   /* the kernel cuts at 0x7ffff000, and a ring's length has 32 bits */

typedef struct zs_tuner {
    struct zs_tuner *next;
    uint64_t device;
    int direction;
    int settled, candidate, round, skip; /* skip: completions that still belong to the candidate before */
    int in_flight;
    int64_t in_flight_nbytes;
    int64_t window_nbytes;
    double window_start;
    struct { int64_t chunk_nbytes; int depth; double rates[3]; int windows; } candidates[8];
    int count;
} zs_tuner;

typedef struct zs_inode {
    struct zs_inode *next;
    uint64_t device, number;
    int refs;
    int sync_error;           /* errno of the first failed sync: what it lost cannot be known again */
    zs_op *first, *last;      /* operations that have not ended, in the order of their submission */
    int writes;               /* of those */
    int64_t high;             /* where the last of their bytes ends; beyond it nothing is overlapped */
} zs_inode;

struct zs_file {
    zs_engine *engine;
    zs_inode *inode;
    zs_tuner *tuners[2];
    int refs;
    int closed, writable;
    int fd, direct_fd;        /* direct_fd: -1 where not direct */
    int64_t offset_align, memory_align, page; /* page: borders of what is written directly */
    int live[2];              /* operations that have not ended, by direction */
    char reason[128];
    char *path;
};

struct zs_op {
    zs_engine *engine;
    zs_file *file;
    zs_op *next_live, *prev_live; /* of the inode */
    zs_op *next_ready;
    int refs;
    int direction, state, cancelling, ready;
    int blockers;             /* earlier operations that overlap and have not ended */
    int dependants;           /* later ones that count this one among theirs */
    int in_flight;            /* chunks */
    int error;
    int waiters;
    int count, segment;       /* cursor: the segment and the position in it of the next chunk */
    int64_t segment_position;
    int64_t offset, nbytes, issued, done, chunks, error_offset, error_nbytes;
    pthread_cond_t ended;
    zs_segment segments[];
};

typedef struct {
    zs_op *op;
    int direction, fd, direct, bounced, sync, retries;
    int64_t offset, nbytes;       /* of the request's bytes */
    int segment;                  /* where they are in memory */
    int64_t segment_position;
    int64_t io_offset, io_nbytes; /* of the transfer: padded where a read is not aligned */
    char *io_address;
    int64_t io_done;
    char *bounce;                 /* the slot's own memory, kept */
    int next_free;
} zs_chunk;

typedef struct {
    unsigned eintr, eagain, shorten, partial; /* every N-th; 0: never */
    unsigned counts[4];
} zs_faults;

struct zs_engine {
    pthread_mutex_t mutex;
    pthread_cond_t idle;      /* an operation ended */
    pthread_cond_t work;      /* of the workers: a chunk may be taken */
    pid_t pid;
    int refs, backend, closing, stop, closed;
    int fixed_depth;          /* 0: the tuners' */
    int64_t fixed_chunk;
    zs_inode *inodes;
    zs_tuner *tuners;
    zs_op *ready_first[2], *ready_last[2];
    int turn;                 /* the direction that is served next */
    int live, in_flight;      /* operations, chunks */
    double progress;          /* when a transfer last ended */
    zs_chunk slots[ZS_SLOTS];
    int free_slot;
    char *small;              /* aligned buffers of small transfers, one for each slot */
    int wants_wake, wake_fd;  /* of the pump */
    pthread_t *threads;
    int thread_count;
    void *ring;               /* the backend's own */
    int start_error;          /* of the pump: 1 while it starts */
    char start_reason[160];
    zs_faults faults;
    zs_stats stats;
};

/* engine.c */
double zs_now(void);
int zs_cond_init(pthread_cond_t *cond);
int zs_timed_wait(pthread_cond_t *cond, pthread_mutex_t *mutex, double deadline);
int zs_is_foreign(const zs_engine *engine);
int zs_fault(zs_engine *engine, int kind, unsigned every); /* pump's or mutex-holder's: is it this one's turn? */

/* ops.c */
void zs_unready(zs_op *op);               /* mutex held: out of the queue, if it is in it */
void zs_cancel(zs_op *op);                /* mutex held; only where it has not ended */
void zs_op_ended(zs_op *op);              /* mutex held: nothing of it is in flight and nothing will be */

/* file.c */
int zs_file_make(zs_engine *engine, int fd, const char *path, int flags, int permissions, int direct, zs_file **file);
void zs_file_unref(zs_file *file);        /* mutex held; closes what nobody uses any more */
void zs_inode_unref(zs_engine *engine, zs_inode *inode); /* mutex held */

/* chunks.c */
zs_chunk *zs_next_chunk(zs_engine *engine);                /* mutex held; NULL where there is none, or no depth left */
int zs_prepare(zs_engine *engine, zs_chunk *chunk);        /* fills the bounce buffer; 0 or -errno */
int zs_advance(zs_engine *engine, zs_chunk *chunk, int64_t result); /* 1: what is left is to be transferred; 0: over */
void zs_transfer(zs_engine *engine, zs_chunk *chunk);      /* all of it, by pread or pwrite on this thread */
void zs_chunk_over(zs_engine *engine, zs_chunk *chunk, int error);  /* mutex not held: accounts and frees the slot */

void zs_bounces_free(zs_engine *engine);

/* tuner.c */
zs_tuner *zs_tuner_get(zs_engine *engine, uint64_t device, int direction);
int64_t zs_tuner_chunk(const zs_engine *engine, const zs_tuner *tuner);
int zs_tuner_has_depth(const zs_engine *engine, const zs_tuner *tuner);
void zs_tuner_count(zs_engine *engine, zs_tuner *tuner, int64_t nbytes, int saturated, int alone);

/* backends: start returns 0 or -errno and says why */
int zs_uring_start(zs_engine *engine, char *reason, size_t size);
int zs_libaio_start(zs_engine *engine, char *reason, size_t size);
int zs_threads_start(zs_engine *engine, int count, char *reason, size_t size);
int zs_pump_start(zs_engine *engine, void *(*pump)(void *), char *reason, size_t size); /* waits until it says so */
void zs_pump_says(zs_engine *engine, int error, const char *what); /* the pump: started, or why not */
void zs_wake(zs_engine *engine);          /* mutex held: there is something to do */
int zs_scratch(void);                     /* an empty file without a name, or -1 */
void zs_pump_sleeps(zs_engine *engine);   /* mutex held: about to wait; a submission must wake it */
int zs_spawn(pthread_t *thread, void *(*run)(void *), void *argument); /* with every signal blocked */
void zs_backend_close(zs_engine *engine);

#endif
