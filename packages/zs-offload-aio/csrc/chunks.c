/* How operations are cut into transfers, and what becomes of each transfer's result.
 *
 * [Note: Direct edges]
 * A transfer that bypasses the page cache must be aligned in the file, in memory and in length. What of a request is
 * not, is read whole blocks at a time into an aligned buffer (reading more than was asked for is harmless, beyond the
 * end of the file too), and written through the page cache, up to the border of a page: a block is never read,
 * changed and written back, because another request may own the rest of it; and a page that is written directly is
 * never one that a buffered write touches at the same time, whose write-back would bring old bytes back.
 */
#include <sys/mman.h>

#include "engine.h"

static int64_t down(int64_t x, int64_t to) { return x - x % to; }
static int64_t up(int64_t x, int64_t to) /* at the end of the number range it stays there: the kernel refuses that */
{
    int64_t more = x % to ? to - x % to : 0;
    return x <= INT64_MAX - more ? x + more : INT64_MAX;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Sets what is transferred and how, from the operation's cursor on; at least one byte. */
static void cut(zs_engine *engine, zs_op *op, zs_chunk *c)
{
    zs_file *file = op->file;
    int64_t position = op->offset + op->issued, end = op->offset + op->nbytes;
    zs_segment segment = op->segments[op->segment];
    char *address = (char *)segment.address + op->segment_position;
    int64_t here = segment.nbytes - op->segment_position; /* bytes left in this segment */
    int64_t most = zs_tuner_chunk(engine, file->tuners[op->direction]);
    int64_t align = op->direction == ZS_WRITE ? file->page : file->offset_align;
    int64_t bounce = ZS_BOUNCE_NBYTES - 2 * align;

    c->direct = file->direct_fd >= 0;
    c->bounced = 0;
    int fits = (uintptr_t)address % (uintptr_t)file->memory_align == 0;
    if (c->direct && position % align == 0 && here >= align && fits) {
        c->nbytes = down(least(most, here), align);
        if (!c->nbytes)
            c->nbytes = align;
    } else if (c->direct && op->direction == ZS_READ) {
        int64_t border = up(position + 1, align); /* from here on it may fit in place, if only the start is off */
        if (here > border - position + align &&
            (uintptr_t)(address + (border - position)) % (uintptr_t)file->memory_align == 0)
            c->nbytes = border - position;
        else {
            c->nbytes = least(least(most, bounce), end - position);
            if (position + c->nbytes < end && down(position + c->nbytes, align) > position)
                c->nbytes = down(position + c->nbytes, align) - position;
        }
        c->bounced = 1;
    } else if (c->direct && position % align == 0 && end - position >= align) {
        c->nbytes = down(least(least(most, bounce), end - position), align);
        if (!c->nbytes)
            c->nbytes = align;
        c->bounced = 1;
    } else {
        int64_t limit = c->direct ? least(up(position + 1, align), end) : end; /* see [Note: Direct edges] */
        c->direct = 0;
        c->nbytes = least(least(most, here), limit - position);
        if (c->nbytes == here && position + here < limit && here < 65536) { /* small pieces: one call for many */
            c->nbytes = least(least(most, ZS_BOUNCE_NBYTES), limit - position);
            c->bounced = 1;
        }
    }
    c->offset = c->io_offset = position;
    c->io_nbytes = c->nbytes;
    c->io_address = address;
    c->fd = c->direct ? file->direct_fd : file->fd;
    if (c->bounced && c->direct && op->direction == ZS_READ) {
        c->io_offset = down(position, align);
        c->io_nbytes = up(position + c->nbytes, align) - c->io_offset;
    }
    c->segment = op->segment;
    c->segment_position = op->segment_position;
}

static void move_cursor(zs_op *op, int64_t nbytes)
{
    op->issued += nbytes;
    while (nbytes) {
        int64_t here = least(nbytes, op->segments[op->segment].nbytes - op->segment_position);
        nbytes -= here;
        op->segment_position += here;
        if (op->segment_position == op->segments[op->segment].nbytes) {
            op->segment++;
            op->segment_position = 0;
        }
    }
}

static zs_chunk *take(zs_engine *engine, int direction)
{
    zs_op *op = engine->ready_first[direction];
    if (!op || engine->free_slot < 0)
        return NULL;
    zs_tuner *tuner = op->file->tuners[direction];
    if (!zs_tuner_has_depth(engine, tuner))
        return NULL;
    zs_chunk *c = &engine->slots[engine->free_slot];
    engine->free_slot = c->next_free;
    c->op = op;
    c->direction = direction;
    c->io_done = 0;
    c->retries = 0;
    c->sync = 0;
    cut(engine, op, c);
    move_cursor(op, c->nbytes);
    op->in_flight++;
    op->chunks++;
    tuner->in_flight++;
    tuner->in_flight_nbytes += c->nbytes;
    engine->in_flight++;
    if (engine->in_flight > engine->stats.peak_depth)
        engine->stats.peak_depth = engine->in_flight;
    if (c->bounced)
        engine->stats.bounced_nbytes += c->nbytes;
    if (!c->direct)
        engine->stats.buffered_nbytes += c->nbytes;
    if (op->issued == op->nbytes) {
        op->ready = 0;
        engine->ready_first[direction] = op->next_ready;
        if (!op->next_ready)
            engine->ready_last[direction] = NULL;
    }
    return c;
}

zs_chunk *zs_next_chunk(zs_engine *engine)
{
    zs_chunk *c = take(engine, engine->turn); /* reads and writes take turns: neither waits behind the other's queue */
    if (c)
        engine->turn = !engine->turn;
    else
        c = take(engine, !engine->turn);
    return c;
}

/* Between the slot's buffer and the request's segments. */
static void copy(zs_chunk *c, char *bounce, int64_t nbytes, int into_bounce)
{
    int segment = c->segment;
    int64_t position = c->segment_position;
    while (nbytes) {
        zs_segment *s = &c->op->segments[segment];
        int64_t here = least(nbytes, s->nbytes - position);
        char *memory = (char *)s->address + position;
        memcpy(into_bounce ? bounce : memory, into_bounce ? memory : bounce, (size_t)here);
        bounce += here;
        nbytes -= here;
        segment++;
        position = 0;
    }
}

static char *anonymous(size_t nbytes)
{
    char *map = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return map == MAP_FAILED ? NULL : map;
}

/* Of a pair of slots, in one huge page: 4 KiB pages would need more scatter entries than a disk takes at once. */
static char *huge_page(void)
{
    size_t huge = (size_t)2 * ZS_BOUNCE_NBYTES;
    char *map = anonymous(2 * huge);
    if (!map)
        return NULL;
    char *aligned = map + (huge - (uintptr_t)map % huge) % huge;
    if (aligned > map)
        munmap(map, (size_t)(aligned - map));
    munmap(aligned + huge, (size_t)(map + 2 * huge - (aligned + huge)));
#ifdef MADV_HUGEPAGE
    madvise(aligned, huge, MADV_HUGEPAGE);
#endif
    return aligned;
}

static char *bounce_memory(zs_engine *engine, zs_chunk *c)
{
    ptrdiff_t slot = c - engine->slots;
    pthread_mutex_lock(&engine->mutex);
    if (c->io_nbytes <= ZS_SMALL_NBYTES) { /* small transfers are many: they shall not touch a huge page each */
        if (!engine->small)
            engine->small = anonymous((size_t)(ZS_SLOTS * ZS_SMALL_NBYTES));
    } else if (!c->bounce) {
        zs_chunk *pair = &engine->slots[slot - slot % 2];
        if ((pair[0].bounce = huge_page()))
            pair[1].bounce = pair[0].bounce + ZS_BOUNCE_NBYTES;
    }
    char *small = engine->small;
    pthread_mutex_unlock(&engine->mutex);
    if (c->io_nbytes > ZS_SMALL_NBYTES)
        return c->bounce;
    return small ? small + slot * ZS_SMALL_NBYTES : NULL;
}

void zs_bounces_free(zs_engine *engine)
{
    if (engine->small)
        munmap(engine->small, (size_t)(ZS_SLOTS * ZS_SMALL_NBYTES));
    engine->small = NULL;
    for (int i = 0; i < ZS_SLOTS; i += 2) {
        if (engine->slots[i].bounce)
            munmap(engine->slots[i].bounce, (size_t)(2 * ZS_BOUNCE_NBYTES));
        engine->slots[i].bounce = engine->slots[i + 1].bounce = NULL;
    }
}

int zs_prepare(zs_engine *engine, zs_chunk *c)
{
    if (!c->bounced)
        return 0;
    if (!(c->io_address = bounce_memory(engine, c)))
        return -ENOMEM;
    if (c->direction == ZS_WRITE)
        copy(c, c->io_address, c->nbytes, 1);
    return 0;
}

static int64_t faulty(zs_engine *engine, zs_chunk *c, int64_t result)
{
    zs_faults *f = &engine->faults;
    if (zs_fault(engine, 0, f->eintr))
        return -EINTR;
    if (zs_fault(engine, 1, f->eagain))
        return -EAGAIN;
    if (result > 1 && zs_fault(engine, 2, f->shorten))
        return c->io_nbytes > 8192 && result > 8192 ? down(result / 2, 512) : result / 2;
    return result;
}

static void count(zs_engine *engine, int64_t *counter)
{
    pthread_mutex_lock(&engine->mutex);
    ++*counter;
    pthread_mutex_unlock(&engine->mutex);
}

static void to_buffered(zs_chunk *c)
{
    c->direct = 0;
    c->fd = c->op->file->fd;
}

int zs_advance(zs_engine *engine, zs_chunk *c, int64_t result)
{
    result = faulty(engine, c, result);
    if (result > 0) {
        c->retries = 0;
        c->io_done += result;
        c->io_offset += result;
        c->io_address += result;
        c->io_nbytes -= result;
        int64_t wanted = c->offset + c->nbytes - c->io_offset; /* a padded read may end early, at the end of the file */
        if (c->io_nbytes > 0 && wanted > 0) {
            count(engine, &engine->stats.short_transfers);
            zs_file *file = c->op->file;
            if (c->direct && (c->io_offset % file->offset_align || c->io_nbytes % file->offset_align ||
                              (uintptr_t)c->io_address % (uintptr_t)file->memory_align))
                to_buffered(c);
            return 1;
        }
        if (c->bounced && c->direction == ZS_READ) {
            int64_t start = c->io_offset - c->io_done; /* where the transfer began */
            copy(c, c->io_address - c->io_done + (c->offset - start), c->nbytes, 0);
        }
        zs_chunk_over(engine, c, 0);
        return 0;
    }
    int error = (int)-result;
    if (error == EINTR || error == EAGAIN) {
        if (++c->retries < 1000) {
            count(engine, &engine->stats.retried);
            if (error == EAGAIN && c->retries > 3)
                usleep(1000); /* the kernel is short of something: do not spin */
            return 1;
        }
    } else if (error == EINVAL && c->direct) { /* refused now what was promised: the page cache takes it */
        to_buffered(c);
        count(engine, &engine->stats.downgraded);
        return 1;
    } else if ((error == EOPNOTSUPP || error == ENOSYS || error == EPERM) && !c->sync && engine->backend < ZS_THREADS) {
        c->sync = 1;
        count(engine, &engine->stats.downgraded);
        return 1;
    } else if (!error)
        error = c->direction == ZS_READ ? ENODATA : ENOSPC; /* the end of the file; a write that takes nothing */
    zs_chunk_over(engine, c, error);
    return 0;
}

void zs_transfer(zs_engine *engine, zs_chunk *c)
{
    int64_t result;
    do {
        if (c->direction == ZS_READ)
            result = pread(c->fd, c->io_address, (size_t)c->io_nbytes, c->io_offset);
        else
            result = pwrite(c->fd, c->io_address, (size_t)c->io_nbytes, c->io_offset);
        if (result < 0)
            result = -errno;
    } while (zs_advance(engine, c, result));
}

void zs_chunk_over(zs_engine *engine, zs_chunk *c, int error)
{
    pthread_mutex_lock(&engine->mutex);
    zs_op *op = c->op;
    zs_tuner *tuner = op->file->tuners[c->direction];
    int64_t large = least(zs_tuner_chunk(engine, tuner), ZS_BOUNCE_NBYTES); /* a bounced chunk is no larger */
    int saturated = engine->ready_first[c->direction] != NULL && c->nbytes * 2 >= large;
    engine->stats.transfers++;
    engine->progress = zs_now();
    engine->in_flight--;
    tuner->in_flight--;
    tuner->in_flight_nbytes -= c->nbytes;
    op->in_flight--;
    int64_t moved = c->io_offset - c->offset; /* of a transfer that failed halfway */
    if (!error)
        op->done += c->nbytes;
    else if (moved > 0 && (c->direction == ZS_WRITE || !c->bounced))
        op->done += moved;
    if (error) { /* the first in the file is told: of a file that ends, that is where */
        int64_t at = moved > 0 ? c->io_offset : c->offset;
        if (!op->error || at < op->error_offset) {
            op->error = error;
            op->error_offset = at;
            op->error_nbytes = c->offset + c->nbytes - at;
        }
        zs_unready(op); /* nothing more of it is begun */
    }
    if (!error)
        zs_tuner_count(engine, tuner, c->nbytes, saturated, engine->in_flight == tuner->in_flight);
    c->op = NULL;
    c->next_free = engine->free_slot;
    engine->free_slot = (int)(c - engine->slots);
    if (!op->in_flight && (op->error || op->cancelling || op->issued == op->nbytes))
        zs_op_ended(op);
    zs_wake(engine);
    pthread_mutex_unlock(&engine->mutex);
}
