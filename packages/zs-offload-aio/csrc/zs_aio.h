/* The asynchronous file engine: its whole C contract. No Python in here, nor in anything that includes only this.
 *
 *   zs_engine_open -> zs_file_open -> zs_submit -> zs_op -> zs_op_wait -> zs_op_release -> zs_file_close -> zs_engine_close
 *
 * Threads: every function may be called from any thread. Nothing is called back.
 * Errors: functions return 0 or a negative errno; of an operation, the details are in `zs_op_status`.
 * Memory of an operation (its segments' targets) must stay valid until `zs_op_done` is true or `zs_op_wait` returned 0.
 * Fork: an engine belongs to the process that opened it; elsewhere every function returns -ECHILD and touches nothing.
 */
#ifndef ZS_AIO_H
#define ZS_AIO_H

#include <stddef.h>
#include <stdint.h>

typedef struct zs_engine zs_engine;
typedef struct zs_file zs_file;
typedef struct zs_op zs_op;

enum { ZS_READ = 0, ZS_WRITE = 1 };

/* Backends in order of preference; the probe does an I/O, because setup alone proves nothing. */
enum { ZS_IO_URING = 0, ZS_LIBAIO = 1, ZS_THREADS = 2, ZS_PLAIN = 3, ZS_BACKENDS = 4 };

const char *zs_backend_name(int backend);
int zs_backend_from_name(const char *name);                        /* -EINVAL where there is none of that name */
int zs_backend_probe(int backend, char *reason, size_t size);      /* 0, or why it does not work here */

typedef struct {
    int backend;          /* or -1: the first that works */
    int64_t chunk_nbytes; /* 0: calibrated on the traffic; else a multiple of 4096 */
    int depth;            /* 0: calibrated on the traffic; chunks in flight, at most 256 */
    int threads;          /* of the thread backend; 0: 4 */
} zs_options;

int zs_engine_open(const zs_options *options, zs_engine **engine, char *reason, size_t size);
int zs_engine_drain(zs_engine *engine, double timeout_s);          /* until nothing is in flight; -ETIMEDOUT */
int zs_engine_close(zs_engine *engine);                            /* cancels reads, finishes writes, joins, frees */
void zs_engine_begin_close(zs_engine *engine);                     /* cancels reads, refuses what is new; does not wait */
double zs_engine_quiet_s(zs_engine *engine);                       /* seconds since a transfer last ended */
void zs_engine_ref(zs_engine *engine);                             /* its memory stays, closed or not, until as many */
void zs_engine_unref(zs_engine *engine);                           /* of these */
int zs_engine_foreign(const zs_engine *engine);                    /* it was made by another process */
int zs_engine_backend(const zs_engine *engine);

typedef struct {
    int64_t read_nbytes, written_nbytes;   /* asked for and transferred */
    int64_t bounced_nbytes;                /* of those, copied through an aligned buffer */
    int64_t buffered_nbytes;               /* of those, through the page cache */
    int64_t transfers;                     /* system-level transfers that completed */
    int64_t retried, short_transfers, downgraded;  /* transient errors; continued; done without the backend */
    int64_t ops_submitted, ops_done, ops_failed, ops_cancelled;
    int64_t in_flight;                     /* operations */
    int64_t peak_depth;                    /* most transfers in flight at once */
} zs_stats;
void zs_engine_stats(zs_engine *engine, zs_stats *stats);

/* What the calibration of one direction on one device came to. */
typedef struct {
    uint64_t device;
    int direction;        /* ZS_READ, ZS_WRITE */
    int settled;          /* 0: still trying candidates on the traffic */
    int64_t chunk_nbytes;
    int depth;
    int candidates;       /* number of entries below */
    struct { int64_t chunk_nbytes; int depth; double gb_per_s; int windows; } tried[8];
} zs_calibration;
int zs_engine_calibrations(zs_engine *engine, zs_calibration *found, int capacity); /* number of entries */

/* ---- files ---- */
enum { ZS_DIRECT_AUTO = 0, ZS_DIRECT_NEVER = 1 };

typedef struct {
    int direct;               /* 1: transfers of aligned parts bypass the page cache */
    int offset_align;         /* bytes; 1 where not direct */
    int memory_align;         /* bytes; 1 where not direct */
    char reason[128];         /* why not direct; empty where it is */
    int64_t nbytes;           /* size of the file now */
    uint64_t device, inode;
} zs_file_info;

int zs_file_open(zs_engine *engine, const char *path, int flags, int permissions, int direct, zs_file **file);
void zs_file_ref(zs_file *file);   /* it stays open, closed or not, until as many */
void zs_file_release(zs_file *file); /* of these: for calls that another thread's close may meet */
int zs_file_info_get(zs_file *file, zs_file_info *info);
int zs_file_preallocate(zs_file *file, int64_t nbytes, int *allocated); /* *allocated 0: the size was set, no space taken */
int zs_file_truncate(zs_file *file, int64_t nbytes);
enum { ZS_FLUSH_NONE = 0, ZS_FLUSH_DATA = 1, ZS_FLUSH_FULL = 2 };
enum { ZS_ALL_OF_INODE = 2 };
/* Until its operations of a direction ended, or all of those on the same inode; -ETIMEDOUT. */
int zs_file_drain(zs_file *file, int which, double timeout_s);
int zs_file_flush(zs_file *file, int level);  /* of what was transferred; a failed sync is remembered for ever */
int zs_file_close(zs_file *file);             /* once its operations are done; operations in flight hold it open */

/* ---- operations ---- */
typedef struct { void *address; int64_t nbytes; } zs_segment;

/* The segments, one after the other, are the bytes of the file from `offset` on. The array is copied, the memory is not. */
int zs_submit(zs_file *file, int direction, const zs_segment *segments, int count, int64_t offset, zs_op **op);

enum { ZS_PENDING = 0, ZS_DONE = 1, ZS_FAILED = 2, ZS_CANCELLED = 3 };
typedef struct {
    int state;
    int error;                /* errno of the first failure; ENODATA: the file ends before the request does */
    int64_t nbytes;           /* asked for */
    int64_t done_nbytes;      /* transferred */
    int64_t offset;           /* of the request */
    int64_t error_offset, error_nbytes; /* of the transfer that failed */
    int64_t chunks;           /* transfers issued */
} zs_op_status_t;

int zs_op_foreign(const zs_op *op);            /* it belongs to another process */
int zs_op_done(zs_op *op);
int zs_op_wait(zs_op *op, double timeout_s);  /* 0 once it is done, however it ended; -ETIMEDOUT */
void zs_op_status(zs_op *op, zs_op_status_t *status);
int zs_op_cancel(zs_op *op);                  /* 1: it will end as cancelled; 0: too late. Never before its transfers end */
void zs_op_release(zs_op *op);                /* gives up the handle; the operation goes on */

/* ---- test hook: faults at the border to the kernel ---- */
/* ZS_AIO_FAULTS="eintr=N,eagain=N,short=N,partial=N" (environment, read at zs_engine_open): every N-th transfer is
 * answered by EINTR, EAGAIN, by half of what was asked, or every N-th submission of several accepts only a part. */

#endif
