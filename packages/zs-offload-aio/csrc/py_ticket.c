/* Ticket: one operation. */
#include "py_io.h"

#include <unistd.h>

static void ticket_settled(Ticket *self)
{
    if (!self->released) {
        self->released = 1;
        hold_release(self->hold);
    }
}

static PyObject *ticket_outcome(Ticket *self)
{
    hold *h = self->hold;
    zs_op_status_t s;
    zs_op_status(h->op, &s);
    if (s.state != ZS_DONE) {
        h->seen = 1;
        ticket_settled(self);
        return raise_error(hold_error(h));
    }
    while (h->finishers && PyList_Size(h->finishers)) { /* each once; whoever comes meanwhile waits for it */
        if (h->finishing) {
            Py_BEGIN_ALLOW_THREADS
            usleep(1000);
            Py_END_ALLOW_THREADS
            if (PyErr_CheckSignals())
                return NULL;
            continue;
        }
        PyObject *finish = Py_NewRef(PyList_GetItem(h->finishers, 0));
        h->finishing = 1;
        PyObject *result = PyObject_CallNoArgs(finish);
        h->finishing = 0;
        Py_DECREF(finish);
        if (!result || PySequence_DelItem(h->finishers, 0)) {
            Py_XDECREF(result);
            return NULL;
        }
        Py_DECREF(result);
    }
    ticket_settled(self);
    return PyLong_FromLongLong(s.nbytes);
}

static PyObject *ticket_wait_for(Ticket *self, double timeout_s)
{
    double left = timeout_s;
    if (zs_op_foreign(self->hold->op))
        return raise_foreign();
    while (!zs_op_done(self->hold->op)) {
        double slice = left < SLICE_S ? left : SLICE_S;
        int error;
        Py_BEGIN_ALLOW_THREADS
        error = zs_op_wait(self->hold->op, slice);
        Py_END_ALLOW_THREADS
        if (error == -ECHILD)
            return raise_foreign();
        if (PyErr_CheckSignals())
            return NULL;
        left -= slice;
        if (error == -ETIMEDOUT && left <= 0) {
            zs_op_status_t s;
            char text[120];
            zs_op_status(self->hold->op, &s);
            snprintf(text, sizeof text, "not done after timeout_s=%g: %lld of %lld bytes", timeout_s, (long long)s.done_nbytes,
                     (long long)s.nbytes);
            PyErr_Format(PyExc_TimeoutError, "%s, offset %lld of %R; it goes on", text, (long long)s.offset,
                         self->hold->file->path);
            return NULL;
        }
    }
    return ticket_outcome(self);
}

static PyObject *ticket_wait(Ticket *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"timeout_s", NULL};
    double timeout_s = 120.0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|d:wait", names, &timeout_s))
        return NULL;
    if (!(timeout_s >= 0)) {
        PyErr_Format(PyExc_ValueError, "timeout_s must not be negative");
        return NULL;
    }
    return ticket_wait_for(self, timeout_s);
}

static PyObject *ticket_result(Ticket *self, PyObject *unused)
{
    (void)unused;
    return ticket_wait_for(self, 0.0);
}

static PyObject *ticket_cancel(Ticket *self, PyObject *unused)
{
    (void)unused;
    int cancelled = zs_op_cancel(self->hold->op);
    return cancelled == -ECHILD ? raise_foreign() : PyBool_FromLong(cancelled);
}

static PyObject *ticket_done(Ticket *self, void *unused)
{
    (void)unused;
    if (zs_op_foreign(self->hold->op))
        return raise_foreign();
    return PyBool_FromLong(zs_op_done(self->hold->op));
}

static PyObject *ticket_number(Ticket *self, void *which)
{
    zs_op_status_t s;
    if (zs_op_foreign(self->hold->op))
        return raise_foreign();
    zs_op_status(self->hold->op, &s);
    switch ((intptr_t)which) {
    case 0:
        return PyLong_FromLongLong(s.nbytes);
    case 1:
        return PyLong_FromLongLong(s.done_nbytes);
    default:
        return PyLong_FromLongLong(s.chunks);
    }
}

static PyObject *ticket_state(Ticket *self, void *unused)
{
    (void)unused;
    static const char *const STATES[] = {"pending", "done", "failed", "cancelled"};
    zs_op_status_t s;
    if (zs_op_foreign(self->hold->op))
        return raise_foreign();
    zs_op_status(self->hold->op, &s);
    return PyUnicode_FromString(STATES[s.state]);
}

static void ticket_dealloc(PyObject *object)
{
    Ticket *self = (Ticket *)object;
    PyTypeObject *type = Py_TYPE(object);
    hold *h = self->hold;
    if (h && !zs_op_done(h->op))
        adopt(self->engine, h);
    else if (h) {
        hold_remember(h);
        hold_free(h);
    }
    Py_XDECREF((PyObject *)self->engine);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF((PyObject *)type);
}

static PyMethodDef ticket_methods[] = {
    {"wait", (PyCFunction)(void (*)(void))ticket_wait, METH_VARARGS | METH_KEYWORDS, NULL},
    {"result", (PyCFunction)ticket_result, METH_NOARGS, NULL},
    {"cancel", (PyCFunction)ticket_cancel, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef ticket_values[] = {
    {"done", (getter)ticket_done, NULL, NULL, NULL},
    {"state", (getter)ticket_state, NULL, NULL, NULL},
    {"nbytes", (getter)ticket_number, NULL, NULL, (void *)0},
    {"done_nbytes", (getter)ticket_number, NULL, NULL, (void *)1},
    {"chunks", (getter)ticket_number, NULL, NULL, (void *)2},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot ticket_slots[] = {
    {Py_tp_dealloc, ticket_dealloc}, {Py_tp_methods, ticket_methods}, {Py_tp_getset, ticket_values},
    {Py_tp_doc, "One transfer. It holds its buffer until it is done."}, {0, NULL},
};

PyType_Spec ticket_spec = {
    "zs_offload_aio._core.Ticket", sizeof(Ticket), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, ticket_slots,
};
