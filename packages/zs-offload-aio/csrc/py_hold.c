/* What an operation needs alive, and what becomes of it. */
#include "py_io.h"

void state_unref(file_state *state)
{
    if (--state->refs)
        return;
    if (state->lost) {
        PyObject *kind, *value, *trace;
        PyErr_Fetch(&kind, &value, &trace);
        raise_error(state->lost);
        PyErr_WriteUnraisable(state->path);
        PyErr_Restore(kind, value, trace);
    }
    Py_XDECREF(state->path);
    PyMem_Free(state);
}

void hold_release(hold *h)
{
    for (int i = 0; i < h->count; i++)
        PyBuffer_Release(&h->views[i]);
    PyMem_Free(h->views);
    free(h->snapshot);
    h->views = NULL;
    h->snapshot = NULL;
    h->count = 0;
}

void hold_watch(hold *h)
{
    h->next_write = h->file->writes;
    if (h->next_write)
        h->next_write->previous_write = h;
    h->file->writes = h;
}

static void unwatch(hold *h)
{
    if (h->previous_write)
        h->previous_write->next_write = h->next_write;
    else if (h->file && h->file->writes == h)
        h->file->writes = h->next_write;
    if (h->next_write)
        h->next_write->previous_write = h->previous_write;
}

void hold_free(hold *h)
{
    unwatch(h);
    hold_release(h);
    if (h->op)
        zs_op_release(h->op);
    Py_XDECREF(h->finishers);
    if (h->file)
        state_unref(h->file);
    PyMem_Free(h);
}

PyObject *hold_error(hold *h)
{
    file_state *file = h->file;
    zs_op_status_t s;
    zs_op_status(h->op, &s);
    if (s.state == ZS_CANCELLED)
        return make_error(ECANCELED, file->path, s.offset, s.nbytes, s.done_nbytes, file->backend);
    if (s.error == ENODATA) /* said of the request: where the file ends, what was wanted */
        return make_error(ENODATA, file->path, s.offset, s.nbytes, s.error_offset - s.offset, file->backend);
    return make_error(s.error, file->path, s.error_offset, s.error_nbytes, s.done_nbytes, file->backend);
}

/* A write failed and its ticket is gone: the file remembers, and says it at the next flush or close. */
void hold_remember(hold *h)
{
    file_state *file = h->file;
    zs_op_status_t s;
    PyObject *kind, *value, *trace;
    zs_op_status(h->op, &s);
    if (h->direction != ZS_WRITE || s.state != ZS_FAILED || h->seen || file->lost)
        return;
    PyErr_Fetch(&kind, &value, &trace); /* it may be called where an exception is on its way */
    if (!(file->lost = hold_error(h)))
        PyErr_Clear();
    PyErr_Restore(kind, value, trace);
}

void adopt(Engine *engine, hold *h)
{
    h->next = engine->orphans;
    engine->orphans = h;
    engine->orphan_count++;
}

void reap(Engine *self)
{
    hold *kept = NULL, *over = NULL;
    self->orphan_count = 0;
    while (self->orphans) { /* letting go may run any code, this function too: take the list apart first */
        hold *h = self->orphans;
        self->orphans = h->next;
        hold **list = zs_op_done(h->op) ? &over : &kept;
        h->next = *list;
        *list = h;
    }
    while (kept) {
        hold *h = kept;
        kept = h->next;
        adopt(self, h);
    }
    self->reap_at = 2 * self->orphan_count + 16;
    while (over) {
        hold *h = over;
        over = h->next;
        hold_remember(h);
        hold_free(h);
    }
}

int raise_loss(File *self)
{
    reap(self->engine);
    PyObject *lost = self->state->lost;
    self->state->lost = NULL;
    for (hold *h = self->state->writes; h; h = h->next_write) { /* tickets that are kept but not waited for */
        if (!zs_op_done(h->op))
            continue;
        hold_remember(h);
        h->seen = 1; /* one error tells of all of them */
        if (!lost)
            lost = self->state->lost;
        else
            Py_XDECREF(self->state->lost);
        self->state->lost = NULL;
    }
    if (!lost)
        return 0;
    raise_error(lost);
    return -1;
}
