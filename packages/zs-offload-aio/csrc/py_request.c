/* A read or a write: buffers taken, segments made, submitted. */
#include "py_io.h"

/* One buffer into the hold: by the buffer protocol, or else by what the adapters make of it. */
static int take_buffer(hold *h, PyObject *object)
{
    int flags = h->direction == ZS_READ ? PyBUF_WRITABLE : PyBUF_SIMPLE;
    if (PyObject_CheckBuffer(object)) {
        Py_buffer *view = &h->views[h->count];
        if (!PyObject_GetBuffer(object, view, flags | PyBUF_ND | PyBUF_FORMAT)) {
            if (!view->format || !strchr(view->format, 'O')) {
                h->count++;
                return 0;
            }
            PyBuffer_Release(view); /* pointers to Python objects are nobody's bytes */
        }
        PyErr_Clear(); /* the adapters say why, in their own words */
    }
    PyObject *module = PyImport_ImportModule("zs_offload_aio.adapters");
    if (!module)
        return -1;
    PyObject *adapter = PyObject_GetAttrString(module, "as_buffer");
    Py_DECREF(module);
    PyObject *args = adapter ? PyTuple_Pack(1, object) : NULL;
    PyObject *kwargs = args ? Py_BuildValue("{s:O}", "writable", h->direction == ZS_READ ? Py_True : Py_False) : NULL;
    PyObject *host = kwargs ? PyObject_Call(adapter, args, kwargs) : NULL;
    Py_XDECREF(adapter);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    if (!host)
        return -1;
    int result = PyObject_GetBuffer(host, &h->views[h->count], flags);
    if (!result) {
        h->count++;
        PyObject *finish = h->direction == ZS_READ ? PyObject_GetAttrString(host, "finish") : NULL;
        if (finish) {
            if (!h->finishers)
                h->finishers = PyList_New(0);
            if (!h->finishers || PyList_Append(h->finishers, finish))
                result = -1;
            Py_DECREF(finish);
        } else
            PyErr_Clear();
    }
    Py_DECREF(host);
    return result;
}

static int take_buffers(hold *h, PyObject *object)
{
    int many = PyList_Check(object) || PyTuple_Check(object);
    Py_ssize_t n = many ? PySequence_Size(object) : 1;
    h->views = PyMem_Calloc((size_t)(n ? n : 1), sizeof *h->views);
    if (!h->views) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *item = many ? PySequence_GetItem(object, i) : object;
        if (!item)
            return -1;
        int result = take_buffer(h, item);
        if (many)
            Py_DECREF(item);
        if (result)
            return -1;
    }
    return 0;
}

/* The bytes as they are now, so that the caller may go on changing them. */
static int take_snapshot(hold *h, zs_segment *segments, int *count)
{
    int64_t total = 0;
    for (int i = 0; i < *count; i++)
        total += segments[i].nbytes;
    if (posix_memalign(&h->snapshot, 4096, (size_t)(total ? total : 1))) {
        h->snapshot = NULL;
        PyErr_NoMemory();
        return -1;
    }
    Py_BEGIN_ALLOW_THREADS
    char *to = h->snapshot;
    for (int i = 0; i < *count; i++) {
        memcpy(to, segments[i].address, (size_t)segments[i].nbytes);
        to += segments[i].nbytes;
    }
    Py_END_ALLOW_THREADS
    for (int i = 0; i < h->count; i++)
        PyBuffer_Release(&h->views[i]);
    h->count = 0;
    segments[0] = (zs_segment){h->snapshot, total};
    *count = 1;
    return 0;
}

int offset_of(PyObject *object, long long *offset)
{
    int overflow = 0;
    PyObject *number = PyNumber_Index(object);
    if (!number)
        return -1;
    *offset = PyLong_AsLongLongAndOverflow(number, &overflow);
    Py_DECREF(number);
    if (*offset == -1 && PyErr_Occurred())
        return -1;
    if (overflow || *offset < 0) {
        PyErr_Format(PyExc_ValueError, "offset %R: from 0 to 2**63 - 1", object);
        return -1;
    }
    return 0;
}

PyObject *request(File *self, PyObject *buffers, PyObject *offset_object, int direction, int snapshot)
{
    long long offset = 0;
    if (!usable_file(self) || (offset_object && offset_of(offset_object, &offset)))
        return NULL;
    if (self->engine->orphan_count >= self->engine->reap_at)
        reap(self->engine);
    hold *h = PyMem_Calloc(1, sizeof *h);
    if (!h)
        return PyErr_NoMemory();
    h->direction = direction;
    h->file = self->state;
    h->file->refs++;
    zs_segment *segments = NULL;
    Ticket *ticket = NULL;
    if (take_buffers(h, buffers))
        goto failed;
    int count = h->count;
    segments = PyMem_Malloc(sizeof *segments * (size_t)(count ? count : 1));
    if (!segments) {
        PyErr_NoMemory();
        goto failed;
    }
    for (int i = 0; i < count; i++)
        segments[i] = (zs_segment){h->views[i].buf, h->views[i].len};
    if (snapshot && count && take_snapshot(h, segments, &count))
        goto failed;
    ticket = PyObject_New(Ticket, self->engine->ticket_type);
    if (!ticket)
        goto failed;
    ticket->hold = NULL;
    ticket->engine = (Engine *)Py_NewRef((PyObject *)self->engine);
    ticket->released = 0;
    if (!usable_file(self)) /* an adapter ran Python code, which may have closed it */
        goto failed;
    int error = zs_submit(self->file, direction, segments, count, offset, &h->op);
    if (error) {
        if (error == -EBADF)
            PyErr_Format(PyExc_ValueError, "the file is open for reading only: %R", self->state->path);
        else if (error == -EOVERFLOW || error == -EINVAL)
            PyErr_Format(PyExc_ValueError, "offset %lld and the request's bytes end beyond 2**63 - 1", offset);
        else
            raise_number(error, self);
        goto failed;
    }
    PyMem_Free(segments);
    if (direction == ZS_WRITE)
        hold_watch(h);
    ticket->hold = h;
    return (PyObject *)ticket;
failed:
    PyMem_Free(segments);
    Py_XDECREF((PyObject *)ticket);
    hold_free(h);
    return NULL;
}
