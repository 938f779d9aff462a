/* Stress of the engine from C alone, for the thread sanitizer; of use under the address sanitizer as well.
 *
 *   gcc -std=gnu11 -g -O1 -fsanitize=thread -pthread -I../../csrc stress.c \
 *       ../../csrc/{engine,ops,file,durable,chunks,tuner,pump,uring,libaio,threads}.c -o stress
 *   ./stress FOLDER [ROUNDS] [BACKEND...]        all four backends where none is named; 0: everything held
 *
 * ordered   one thread, overlapping reads and writes in flight; each read must see the writes submitted before it
 * private   threads with a part of one file each: what was written is read back, at any alignment
 * shared    all threads write and read the same records; a record is never half one writer's, half another's
 * cancel    long reads, cancelled or not waited for; the memory of each is unmapped as soon as it has ended
 * closing   the engine is closed while others submit: they are refused or served, and nothing is lost
 *
 * Seeds are fixed and iterations counted, so that every run asks for the same.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "zs_aio.h"

enum { THREADS = 6, PART = 1 << 20, RECORD = 12288, RECORDS = 4, WINDOW = 8 };

static int backend, failures;
static char path[4096];
static int rounds = 60;

#define CHECK(condition, ...)                                                        \
    do {                                                                             \
        if (!(condition)) {                                                          \
            fprintf(stderr, "%s, line %d: ", zs_backend_name(backend), __LINE__);    \
            fprintf(stderr, __VA_ARGS__);                                            \
            fputc('\n', stderr);                                                     \
            __atomic_add_fetch(&failures, 1, __ATOMIC_RELAXED);                      \
        }                                                                            \
    } while (0)

static uint32_t roll(uint32_t *state, uint32_t below) /* xorshift; `below` > 0 */
{
    *state ^= *state << 13;
    *state ^= *state >> 17;
    *state ^= *state << 5;
    return *state % below;
}

static char *pages(size_t nbytes)
{
    char *memory = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        abort();
    return memory;
}

static zs_engine *engine_new(int64_t chunk_nbytes, int depth)
{
    zs_options options = {.backend = backend, .chunk_nbytes = chunk_nbytes, .depth = depth};
    zs_engine *engine;
    char reason[256];
    int error = zs_engine_open(&options, &engine, reason, sizeof reason);
    if (error) {
        fprintf(stderr, "%s: %s: %s\n", zs_backend_name(backend), strerror(-error), reason);
        exit(2);
    }
    return engine;
}

static zs_file *file_new(zs_engine *engine, int flags)
{
    zs_file *file;
    int error = zs_file_open(engine, path, O_RDWR | flags, 0600, ZS_DIRECT_AUTO, &file);
    if (error) {
        fprintf(stderr, "%s: %s\n", path, strerror(-error));
        exit(2);
    }
    return file;
}

static zs_op *begin(zs_file *file, int direction, void *address, int64_t nbytes, int64_t offset)
{
    zs_segment parts[3];
    int64_t third = nbytes / 3; /* several segments, of which some are empty for short requests */
    char *at = address;
    parts[0] = (zs_segment){at, third};
    parts[1] = (zs_segment){at + third, third};
    parts[2] = (zs_segment){at + 2 * third, nbytes - 2 * third};
    zs_op *op = NULL;
    int error = nbytes % 2 ? zs_submit(file, direction, parts, 3, offset, &op)
                           : zs_submit(file, direction, &(zs_segment){address, nbytes}, 1, offset, &op);
    CHECK(!error, "zs_submit: %s", strerror(-error));
    return op;
}

static void end(zs_op *op, int64_t nbytes)
{
    zs_op_status_t status;
    int error = zs_op_wait(op, 60.0);
    CHECK(!error, "zs_op_wait: %s", strerror(-error));
    zs_op_status(op, &status);
    CHECK(status.state == ZS_DONE && status.done_nbytes == nbytes, "state %d, errno %d, %lld of %lld bytes", status.state,
          status.error, (long long)status.done_nbytes, (long long)nbytes);
    zs_op_release(op);
}

/* ---- ordered ---- */

static void ordered(void)
{
    enum { SIZE = 256 * 1024 };
    zs_engine *engine = engine_new(16384, 16);
    zs_file *file = file_new(engine, O_CREAT | O_TRUNC);
    char *model = calloc(1, SIZE), *memory[WINDOW], *expected[WINDOW];
    struct { zs_op *op; int direction; int64_t nbytes; } flight[WINDOW] = {0};
    uint32_t seed = 12345;
    for (int i = 0; i < WINDOW; i++) {
        memory[i] = pages(SIZE);
        expected[i] = malloc(SIZE);
    }
    CHECK(!zs_file_truncate(file, SIZE), "truncate");
    for (int i = 0; i < rounds * 8 + WINDOW; i++) {
        int slot = i % WINDOW;
        if (flight[slot].op) {
            end(flight[slot].op, flight[slot].nbytes);
            if (flight[slot].direction == ZS_READ)
                CHECK(!memcmp(memory[slot], expected[slot], (size_t)flight[slot].nbytes), "a read missed an earlier write");
        }
        flight[slot].op = NULL;
        if (i >= rounds * 8)
            continue;
        int aligned = roll(&seed, 2), direction = (int)roll(&seed, 2);
        int64_t offset = roll(&seed, SIZE), nbytes;
        if (aligned)
            offset -= offset % 4096;
        nbytes = 1 + roll(&seed, (uint32_t)(SIZE - offset));
        if (direction == ZS_WRITE) {
            memset(memory[slot], 1 + i % 250, (size_t)nbytes);
            memset(model + offset, 1 + i % 250, (size_t)nbytes);
        } else
            memcpy(expected[slot], model + offset, (size_t)nbytes);
        flight[slot].op = begin(file, direction, memory[slot], nbytes, offset);
        flight[slot].direction = direction;
        flight[slot].nbytes = nbytes;
    }
    for (int i = 0; i < WINDOW; i++) {
        munmap(memory[i], SIZE);
        free(expected[i]);
    }
    free(model);
    zs_file_close(file);
    zs_engine_close(engine);
}

/* ---- private and shared ---- */

typedef struct {
    zs_engine *engine;
    zs_file *file; /* shared by all */
    int number;
} job;

static void *private_and_shared(void *argument)
{
    job *mine = argument;
    zs_file *own = file_new(mine->engine, 0); /* a second handle of the same file */
    uint32_t seed = 777u + (uint32_t)mine->number;
    int64_t base = (int64_t)RECORD * RECORDS + (int64_t)mine->number * PART;
    char *written = pages(PART + 8192), *back = pages(PART + 8192), *record = pages(RECORD);
    for (int i = 0; i < rounds; i++) {
        int64_t offset = roll(&seed, PART), nbytes = 1 + roll(&seed, (uint32_t)(PART - offset) / 2 + 1);
        if (offset + nbytes > PART)
            nbytes = PART - offset;
        char *from = written + roll(&seed, 4096), *to = back + roll(&seed, 4096);
        for (int64_t k = 0; k < nbytes; k += 61)
            from[k] = (char)(i + k);
        zs_op *write = begin(i % 2 ? own : mine->file, ZS_WRITE, from, nbytes, base + offset);
        zs_op *read = begin(i % 3 ? own : mine->file, ZS_READ, to, nbytes, base + offset);
        end(read, nbytes); /* the later one first */
        CHECK(zs_op_done(write), "a read ended before the write it overlaps");
        end(write, nbytes);
        CHECK(!memcmp(from, to, (size_t)nbytes), "other bytes came back");

        int64_t at = (int64_t)RECORD * roll(&seed, RECORDS);
        memset(record, mine->number + 1, RECORD);
        zs_op *all[4];
        for (int k = 0; k < 4; k++) /* the memory is read by writes and written by reads, one after the other */
            if (k == 3 || k == 1) {
                all[k] = begin(mine->file, ZS_READ, record, RECORD, at);
                end(all[k], RECORD);
                for (int b = 1; b < RECORD; b++)
                    if (record[b] != record[0]) {
                        CHECK(0, "a record of two writers: %d at 0, %d at %d", record[0], record[b], b);
                        break;
                    }
            } else
                end(begin(own, ZS_WRITE, record, RECORD, at), RECORD);
    }
    munmap(written, PART + 8192);
    munmap(back, PART + 8192);
    munmap(record, RECORD);
    zs_file_close(own);
    return NULL;
}

static void run_threads(void *(*work)(void *), zs_engine *engine, zs_file *file, void (*meanwhile)(zs_engine *))
{
    pthread_t threads[THREADS];
    job jobs[THREADS];
    for (int i = 0; i < THREADS; i++) {
        jobs[i] = (job){engine, file, i};
        if (pthread_create(&threads[i], NULL, work, &jobs[i]))
            abort();
    }
    if (meanwhile)
        meanwhile(engine);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
}

static void many_threads(void)
{
    zs_engine *engine = engine_new(0, 0);
    zs_file *file = file_new(engine, O_CREAT | O_TRUNC);
    zs_stats stats;
    CHECK(!zs_file_truncate(file, (int64_t)RECORD * RECORDS + (int64_t)THREADS * PART), "truncate");
    run_threads(private_and_shared, engine, file, NULL);
    CHECK(!zs_engine_drain(engine, 60.0), "drain");
    CHECK(!zs_file_flush(file, ZS_FLUSH_FULL), "flush");
    zs_engine_stats(engine, &stats);
    int64_t asked = (int64_t)THREADS * rounds * 6;
    CHECK(stats.ops_submitted == asked && stats.ops_done == asked && !stats.in_flight, "%lld submitted, %lld done of %lld",
          (long long)stats.ops_submitted, (long long)stats.ops_done, (long long)asked);
    zs_file_close(file);
    zs_engine_close(engine);
}

/* ---- cancel ---- */

static void *cancel_some(void *argument)
{
    job *mine = argument;
    uint32_t seed = 99u + (uint32_t)mine->number;
    for (int i = 0; i < rounds; i++) {
        int64_t nbytes = 4 * PART;
        char *memory = pages((size_t)nbytes);
        zs_op *op = begin(mine->file, ZS_READ, memory + (i % 2 ? 1 : 0), nbytes - 1, 0);
        for (uint32_t k = roll(&seed, 200); k; k--)
            zs_op_done(op);
        int cancelled = i % 3 ? zs_op_cancel(op) : 0;
        zs_op_status_t status;
        while (zs_op_wait(op, 0.001) == -ETIMEDOUT) {
        }
        zs_op_status(op, &status);
        CHECK(status.state == (cancelled ? ZS_CANCELLED : ZS_DONE), "cancel said %d, the state is %d", cancelled, status.state);
        munmap(memory, (size_t)nbytes); /* nothing may come into it any more */
        zs_op_release(op);
    }
    return NULL;
}

static void cancelling(void)
{
    zs_engine *engine = engine_new(65536, 4);
    zs_file *file = file_new(engine, 0);
    zs_stats stats;
    run_threads(cancel_some, engine, file, NULL);
    zs_engine_stats(engine, &stats);
    CHECK(stats.ops_done + stats.ops_cancelled == (int64_t)THREADS * rounds, "%lld done, %lld cancelled",
          (long long)stats.ops_done, (long long)stats.ops_cancelled);
    zs_file_close(file);
    zs_engine_close(engine);
}

/* ---- closing ---- */

static void *submit_until_closed(void *argument)
{
    job *mine = argument;
    char *memory = pages(65536);
    zs_op_status_t status;
    for (int64_t i = 0;; i++) {
        zs_op *op;
        int error = zs_submit(mine->file, (int)(i % 2), &(zs_segment){memory, 65536}, 1, 65536 * mine->number, &op);
        if (error) {
            CHECK(error == -ESHUTDOWN, "zs_submit: %s", strerror(-error));
            break;
        }
        CHECK(!zs_op_wait(op, 60.0), "wait");
        zs_op_status(op, &status);
        CHECK(status.state == ZS_DONE || (status.state == ZS_CANCELLED && i % 2 == ZS_READ), "state %d", status.state);
        zs_op_release(op);
    }
    munmap(memory, 65536);
    return NULL;
}

static void close_soon(zs_engine *engine)
{
    usleep(2000);
    CHECK(!zs_engine_close(engine), "close");
}

static void closing(void)
{
    for (int i = 0; i < rounds / 4; i++) {
        zs_engine *engine = engine_new(i % 2 ? 4096 : 0, i % 2 ? 3 : 0);
        zs_file *file = file_new(engine, 0); /* it keeps the closed engine's memory */
        run_threads(submit_until_closed, engine, file, close_soon);
        zs_file_close(file);
    }
}

int main(int count, char **arguments)
{
    if (count < 2) {
        fprintf(stderr, "usage: %s FOLDER [ROUNDS] [BACKEND...]\n", arguments[0]);
        return 2;
    }
    snprintf(path, sizeof path, "%s/stress.%d", arguments[1], (int)getpid());
    if (count > 2)
        rounds = atoi(arguments[2]);
    for (int i = 0; i < (count > 3 ? count - 3 : ZS_BACKENDS); i++) {
        backend = count > 3 ? zs_backend_from_name(arguments[3 + i]) : i;
        char reason[256] = "no such backend";
        if (backend < 0 || zs_backend_probe(backend, reason, sizeof reason)) {
            fprintf(stderr, "%s: %s\n", zs_backend_name(backend), reason);
            return 2;
        }
        ordered();
        many_threads();
        cancelling();
        closing();
        printf("%s: %s\n", zs_backend_name(backend), failures ? "FAILED" : "held");
        fflush(stdout);
    }
    unlink(path);
    return failures != 0;
}
