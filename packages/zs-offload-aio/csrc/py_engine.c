/* Engine, and the types of this part of the module. */
#include "py_io.h"

#include <fcntl.h>

static int engine_init(Engine *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"backend", "chunk_nbytes", "depth", "threads", NULL};
    const char *backend;
    long long chunk_nbytes = 0;
    int depth = 0, threads = 0, error;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "s|Lii", names, &backend, &chunk_nbytes, &depth, &threads))
        return -1;
    if (self->engine) {
        PyErr_SetString(PyExc_RuntimeError, "an engine is made once");
        return -1;
    }
    char reason[200];
    zs_options options = {zs_backend_from_name(backend), chunk_nbytes, depth, threads};
    Py_BEGIN_ALLOW_THREADS
    error = zs_engine_open(&options, &self->engine, reason, sizeof reason);
    Py_END_ALLOW_THREADS
    if (error == -EINVAL && !*reason) {
        PyErr_SetString(PyExc_ValueError, "an option is out of its range");
        return -1;
    }
    if (error) {
        PyObject *module = PyImport_ImportModule("zs_offload_aio.errors");
        if (module) {
            raise_error(PyObject_CallMethod(module, "unavailable", "iss", -error, backend, reason));
            Py_DECREF(module);
        }
        return -1;
    }
    zs_engine_ref(self->engine); /* valid for as long as this object is, also when another thread closes it */
    return 0;
}

/* After what was issued before; a device has no length to cut. */
static int empty(Engine *self, zs_file *file)
{
    int error;
    if (settle_file(self, file, ZS_ALL_OF_INODE, 120.0))
        return -1;
    Py_BEGIN_ALLOW_THREADS
    error = zs_file_truncate(file, 0);
    Py_END_ALLOW_THREADS
    return error == -EINVAL ? 0 : error;
}

static PyObject *engine_open(Engine *self, PyObject *args)
{
    PyObject *path, *bytes;
    int flags, permissions, direct, error;
    if (!PyArg_ParseTuple(args, "Oiip:open_file", &path, &flags, &permissions, &direct) ||
        !PyUnicode_FSConverter(path, &bytes))
        return NULL;
    if (!usable(self)) {
        Py_DECREF(bytes);
        return NULL;
    }
    zs_file *opened = NULL;
    Py_BEGIN_ALLOW_THREADS
    error = zs_file_open(self->engine, PyBytes_AsString(bytes), flags & ~O_TRUNC, permissions,
                         direct ? ZS_DIRECT_AUTO : ZS_DIRECT_NEVER, &opened);
    Py_END_ALLOW_THREADS
    Py_DECREF(bytes);
    if (!error && flags & O_TRUNC && (error = empty(self, opened)) < 0) {
        zs_file_close(opened);
        if (PyErr_Occurred())
            return NULL;
    }
    if (error == -ECHILD)
        return raise_foreign();
    if (error == -ESHUTDOWN) {
        PyErr_SetString(PyExc_ValueError, "the engine is closed");
        return NULL;
    }
    const char *backend = zs_backend_name(zs_engine_backend(self->engine));
    if (error)
        return raise_error(make_error(-error, path, 0, 0, 0, backend));
    file_state *state = PyMem_Calloc(1, sizeof *state);
    File *file = state && PyUnicode_FSDecoder(path, &state->path) ? PyObject_New(File, self->file_type) : NULL;
    if (!file) {
        if (state)
            Py_XDECREF(state->path);
        PyMem_Free(state);
        zs_file_close(opened);
        return PyErr_Occurred() ? NULL : PyErr_NoMemory();
    }
    state->refs = 1;
    state->backend = backend;
    file->state = state;
    file->file = opened;
    file->engine = (Engine *)Py_NewRef((PyObject *)self);
    zs_file_info_get(opened, &file->info);
    return (PyObject *)file;
}

static PyObject *engine_drain(Engine *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"timeout_s", NULL};
    double timeout_s = 120.0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|d:drain", names, &timeout_s) || !usable(self) ||
        settle_engine(self, timeout_s))
        return NULL;
    reap(self);
    Py_RETURN_NONE;
}

static PyObject *engine_close(Engine *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"timeout_s", NULL};
    double timeout_s = 120.0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|d:close", names, &timeout_s))
        return NULL;
    if (!self->engine || self->closed)
        Py_RETURN_NONE;
    if (!usable(self))
        return NULL;
    zs_engine_begin_close(self->engine);
    if (settle_engine(self, timeout_s))
        return NULL;
    if (self->closed) /* another thread was faster */
        Py_RETURN_NONE;
    self->closed = 1;
    reap(self);
    Py_BEGIN_ALLOW_THREADS
    zs_engine_close(self->engine);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static int set(PyObject *dict, const char *name, PyObject *value)
{
    int result = value ? PyDict_SetItemString(dict, name, value) : -1;
    Py_XDECREF(value);
    return result;
}

static PyObject *calibration_list(Engine *self)
{
    zs_calibration found[32];
    int n = zs_engine_calibrations(self->engine, found, 32);
    PyObject *list = PyList_New(0);
    for (int i = 0; list && i < (n < 32 ? n : 32); i++) {
        zs_calibration *c = &found[i];
        PyObject *tried = PyList_New(0);
        for (int k = 0; tried && k < c->candidates; k++) {
            PyObject *one = Py_BuildValue("{s:L,s:i,s:d,s:i}", "chunk_nbytes", (long long)c->tried[k].chunk_nbytes, "depth",
                                          c->tried[k].depth, "gb_per_s", c->tried[k].gb_per_s, "windows", c->tried[k].windows);
            if (!one || PyList_Append(tried, one))
                Py_CLEAR(tried);
            Py_XDECREF(one);
        }
        PyObject *entry = tried ? Py_BuildValue("{s:K,s:s,s:O,s:L,s:i,s:N}", "device", (unsigned long long)c->device, "direction",
                                                c->direction == ZS_READ ? "read" : "write", "settled",
                                                c->settled ? Py_True : Py_False, "chunk_nbytes",
                                                (long long)c->chunk_nbytes, "depth", c->depth, "tried", tried)
                                : NULL;
        if (!entry || PyList_Append(list, entry))
            Py_CLEAR(list);
        Py_XDECREF(entry);
    }
    return list;
}

static PyObject *engine_stats(Engine *self, PyObject *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    reap(self);
    zs_stats s;
    zs_engine_stats(self->engine, &s);
    const struct { const char *name; int64_t value; } numbers[] = {
        {"read_nbytes", s.read_nbytes}, {"written_nbytes", s.written_nbytes}, {"bounced_nbytes", s.bounced_nbytes},
        {"buffered_nbytes", s.buffered_nbytes}, {"transfers", s.transfers}, {"retried", s.retried},
        {"short_transfers", s.short_transfers}, {"downgraded", s.downgraded}, {"ops_submitted", s.ops_submitted},
        {"ops_done", s.ops_done}, {"ops_failed", s.ops_failed}, {"ops_cancelled", s.ops_cancelled},
        {"in_flight", s.in_flight}, {"peak_depth", s.peak_depth},
    };
    PyObject *dict = PyDict_New();
    for (size_t i = 0; dict && i < sizeof numbers / sizeof *numbers; i++)
        if (set(dict, numbers[i].name, PyLong_FromLongLong(numbers[i].value)))
            Py_CLEAR(dict);
    if (dict && (set(dict, "backend", PyUnicode_FromString(zs_backend_name(zs_engine_backend(self->engine)))) ||
                 set(dict, "calibration", calibration_list(self))))
        Py_CLEAR(dict);
    return dict;
}

static PyObject *engine_backend(Engine *self, void *unused)
{
    (void)unused;
    if (!usable(self))
        return NULL;
    return PyUnicode_FromString(zs_backend_name(zs_engine_backend(self->engine)));
}

static PyObject *engine_closed(Engine *self, void *unused)
{
    (void)unused;
    return PyBool_FromLong(self->closed || !self->engine);
}

static void engine_dealloc(PyObject *object)
{
    Engine *self = (Engine *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->engine) { /* what is in flight goes to memory that is given back next: wait for it */
        Py_BEGIN_ALLOW_THREADS
        if (!self->closed)
            zs_engine_close(self->engine);
        Py_END_ALLOW_THREADS
    }
    while (self->orphans) {
        hold *h = self->orphans;
        self->orphans = h->next;
        hold_remember(h);
        hold_free(h);
    }
    if (self->engine)
        zs_engine_unref(self->engine);
    Py_XDECREF((PyObject *)self->file_type);
    Py_XDECREF((PyObject *)self->ticket_type);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF((PyObject *)type);
}

static PyObject *engine_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    (void)args;
    (void)kwargs;
    PyObject *module = PyImport_ImportModule("zs_offload_aio._core");
    if (!module)
        return NULL;
    Engine *self = (Engine *)((allocfunc)PyType_GetSlot(type, Py_tp_alloc))(type, 0);
    if (self) {
        self->file_type = (PyTypeObject *)PyObject_GetAttrString(module, "File");
        self->ticket_type = (PyTypeObject *)PyObject_GetAttrString(module, "Ticket");
        if (!self->file_type || !self->ticket_type)
            {
            Py_DECREF((PyObject *)self);
            self = NULL;
        }
    }
    Py_DECREF(module);
    return (PyObject *)self;
}

static PyMethodDef engine_methods[] = {
    {"open_file", (PyCFunction)engine_open, METH_VARARGS, NULL},
    {"drain", (PyCFunction)(void (*)(void))engine_drain, METH_VARARGS | METH_KEYWORDS, NULL},
    {"stats", (PyCFunction)engine_stats, METH_NOARGS, NULL},
    {"close", (PyCFunction)(void (*)(void))engine_close, METH_VARARGS | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef engine_values[] = {
    {"backend", (getter)engine_backend, NULL, NULL, NULL},
    {"closed", (getter)engine_closed, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot engine_slots[] = {
    {Py_tp_new, engine_new}, {Py_tp_init, engine_init}, {Py_tp_dealloc, engine_dealloc},
    {Py_tp_methods, engine_methods}, {Py_tp_getset, engine_values},
    {Py_tp_doc, "The engine in C."}, {0, NULL},
};

PyType_Spec engine_spec = {
    "zs_offload_aio._core.Engine", sizeof(Engine), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, engine_slots,
};

static PyObject *probe(PyObject *module, PyObject *name)
{
    (void)module;
    char reason[200] = "";
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (!bytes)
        return NULL;
    int backend = zs_backend_from_name(PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    if (backend < 0) {
        PyErr_Format(PyExc_ValueError, "no backend is called %R", name);
        return NULL;
    }
    int error;
    Py_BEGIN_ALLOW_THREADS
    error = zs_backend_probe(backend, reason, sizeof reason);
    Py_END_ALLOW_THREADS
    return PyUnicode_FromString(error ? *reason ? reason : strerror(-error) : "");
}

static PyMethodDef functions[] = {
    {"probe", probe, METH_O, "Why a backend does not work here; empty where it does. It is tried with an I/O."},
    {NULL, NULL, 0, NULL},
};

static int add_type(PyObject *module, PyType_Spec *spec, const char *name)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (!type)
        return -1;
    int result = PyModule_AddObjectRef(module, name, type);
    Py_DECREF(type);
    return result;
}

int zs_add_engine(PyObject *module)
{
    return add_type(module, &engine_spec, "Engine") || add_type(module, &file_spec, "File") ||
                   add_type(module, &ticket_spec, "Ticket") || PyModule_AddFunctions(module, functions)
               ? -1
               : 0;
}
