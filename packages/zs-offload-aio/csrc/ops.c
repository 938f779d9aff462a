/* Operations, from their submission to their end. */
#include "engine.h"

static int overlap(const zs_op *a, const zs_op *b)
{
    return (a->direction == ZS_WRITE || b->direction == ZS_WRITE) && a->offset < b->offset + b->nbytes &&
           b->offset < a->offset + a->nbytes;
}

static void make_ready(zs_op *op)
{
    zs_engine *engine = op->engine;
    int d = op->direction;
    op->ready = 1;
    op->next_ready = NULL;
    if (engine->ready_last[d])
        engine->ready_last[d]->next_ready = op;
    else
        engine->ready_first[d] = op;
    engine->ready_last[d] = op;
}

static void drop_op(zs_op *op) /* mutex held */
{
    if (--op->refs)
        return;
    pthread_cond_destroy(&op->ended);
    op->engine->refs--; /* never the last: whoever calls holds one */
    free(op);
}

int zs_submit(zs_file *file, int direction, const zs_segment *segments, int count, int64_t offset, zs_op **result)
{
    zs_engine *engine = file->engine;
    if (zs_is_foreign(engine))
        return -ECHILD;
    int64_t nbytes = 0;
    if (direction == ZS_WRITE && !file->writable)
        return -EBADF;
    if (count < 0 || offset < 0)
        return -EINVAL;
    for (int i = 0; i < count; i++)
        if (segments[i].nbytes < 0 || __builtin_add_overflow(nbytes, segments[i].nbytes, &nbytes))
            return -EINVAL;
    int64_t end;
    if (__builtin_add_overflow(offset, nbytes, &end))
        return -EOVERFLOW;
    zs_op *op = calloc(1, sizeof *op + sizeof(zs_segment) * (size_t)count);
    if (!op)
        return -ENOMEM;
    for (int i = 0; i < count; i++)
        if (segments[i].nbytes)
            op->segments[op->count++] = segments[i];
    if (zs_cond_init(&op->ended)) {
        free(op);
        return -ENOMEM;
    }
    op->engine = engine;
    op->file = file;
    op->direction = direction;
    op->offset = offset;
    op->nbytes = nbytes;
    op->refs = 2; /* the caller's and, until it ended, the engine's */

    pthread_mutex_lock(&engine->mutex);
    if (engine->closing || file->closed) {
        pthread_mutex_unlock(&engine->mutex);
        pthread_cond_destroy(&op->ended);
        free(op);
        return -ESHUTDOWN;
    }
    engine->refs++;
    if (!engine->live++)
        engine->progress = zs_now(); /* it was idle until now, not stuck */
    engine->stats.ops_submitted++;
    file->refs++;
    file->live[direction]++;
    zs_inode *inode = file->inode;
    if (!inode->first)
        inode->high = 0;
    if (nbytes && offset < inode->high && (direction == ZS_WRITE || inode->writes))
        for (zs_op *other = inode->first; other; other = other->next_live)
            if (overlap(op, other)) {
                op->blockers++;
                other->dependants++;
            }
    if (end > inode->high)
        inode->high = end;
    inode->writes += direction == ZS_WRITE;
    op->prev_live = inode->last;
    if (inode->last)
        inode->last->next_live = op;
    else
        inode->first = op;
    inode->last = op;
    if (!nbytes)
        zs_op_ended(op);
    else if (!op->blockers) {
        make_ready(op);
        zs_wake(engine);
    }
    pthread_mutex_unlock(&engine->mutex);
    *result = op;
    return 0;
}

void zs_op_ended(zs_op *op)
{
    zs_engine *engine = op->engine;
    zs_file *file = op->file;
    zs_inode *inode = file->inode;
    int state = op->done == op->nbytes && !op->error ? ZS_DONE : op->cancelling ? ZS_CANCELLED : ZS_FAILED;
    __atomic_store_n(&op->state, state, __ATOMIC_RELEASE); /* zs_op_done looks without the mutex */
    for (zs_op *other = op->next_live; other && op->dependants; other = other->next_live)
        if (overlap(op, other)) {
            op->dependants--;
            if (--other->blockers == 0) {
                make_ready(other);
                zs_wake(engine);
            }
        }
    inode->writes -= op->direction == ZS_WRITE;
    if (op->prev_live)
        op->prev_live->next_live = op->next_live;
    else
        inode->first = op->next_live;
    if (op->next_live)
        op->next_live->prev_live = op->prev_live;
    else
        inode->last = op->prev_live;
    if (state == ZS_FAILED)
        engine->stats.ops_failed++;
    else if (state == ZS_CANCELLED)
        engine->stats.ops_cancelled++;
    else
        engine->stats.ops_done++;
    *(op->direction == ZS_READ ? &engine->stats.read_nbytes : &engine->stats.written_nbytes) += op->done;
    file->live[op->direction]--;
    engine->live--;
    engine->progress = zs_now();
    if (op->waiters)
        pthread_cond_broadcast(&op->ended);
    if (!engine->live || !file->live[op->direction] || !inode->first) /* what a drain waits for */
        pthread_cond_broadcast(&engine->idle);
    zs_file_unref(file);
    drop_op(op);
}

void zs_unready(zs_op *op)
{
    zs_engine *engine = op->engine;
    int d = op->direction;
    if (!op->ready)
        return;
    op->ready = 0;
    zs_op *before = NULL, *each = engine->ready_first[d];
    for (; each != op; each = each->next_ready)
        before = each;
    *(before ? &before->next_ready : &engine->ready_first[d]) = op->next_ready;
    if (engine->ready_last[d] == op)
        engine->ready_last[d] = before;
}

void zs_cancel(zs_op *op) /* mutex held; only where it has not ended */
{
    if (op->cancelling || op->error || op->issued == op->nbytes)
        return;
    op->cancelling = 1;
    zs_unready(op);
    if (!op->in_flight)
        zs_op_ended(op);
}

int zs_op_cancel(zs_op *op)
{
    if (zs_is_foreign(op->engine))
        return -ECHILD;
    pthread_mutex_lock(&op->engine->mutex);
    if (op->state == ZS_PENDING)
        zs_cancel(op);
    int cancelled = op->cancelling;
    pthread_mutex_unlock(&op->engine->mutex);
    return cancelled;
}

int zs_op_foreign(const zs_op *op) { return zs_is_foreign(op->engine); }

int zs_op_done(zs_op *op) { return __atomic_load_n(&op->state, __ATOMIC_ACQUIRE) != ZS_PENDING; }

int zs_op_wait(zs_op *op, double timeout_s)
{
    if (zs_is_foreign(op->engine))
        return -ECHILD;
    int result = 0;
    pthread_mutex_lock(&op->engine->mutex);
    if (op->state == ZS_PENDING && timeout_s > 0) {
        double deadline = zs_now() + timeout_s;
        op->waiters++;
        while (op->state == ZS_PENDING && zs_timed_wait(&op->ended, &op->engine->mutex, deadline) != ETIMEDOUT) {
        }
        op->waiters--;
    }
    if (op->state == ZS_PENDING)
        result = -ETIMEDOUT;
    pthread_mutex_unlock(&op->engine->mutex);
    return result;
}

void zs_op_status(zs_op *op, zs_op_status_t *status)
{
    int locked = !zs_is_foreign(op->engine) && !pthread_mutex_lock(&op->engine->mutex); /* a child's: for ever? */
    *status = (zs_op_status_t){op->state, op->error, op->nbytes, op->done, op->offset, op->error_offset,
                               op->error_nbytes, op->chunks};
    if (locked)
        pthread_mutex_unlock(&op->engine->mutex);
}

void zs_op_release(zs_op *op)
{
    zs_engine *engine = op->engine;
    if (zs_is_foreign(engine))
        return;
    pthread_mutex_lock(&engine->mutex);
    engine->refs++; /* so that the operation's own reference is not the last */
    drop_op(op);
    pthread_mutex_unlock(&engine->mutex);
    zs_engine_unref(engine);
}
