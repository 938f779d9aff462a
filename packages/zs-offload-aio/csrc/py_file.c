/* File. */
#include "py_io.h"

static PyObject *file_read(File *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", "offset", NULL};
    PyObject *buffer, *offset = NULL;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O:read", names, &buffer, &offset))
        return NULL;
    return request(self, buffer, offset, ZS_READ, 0);
}

static PyObject *file_write(File *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"buffer", "offset", "snapshot", NULL};
    PyObject *buffer, *offset = NULL;
    int snapshot = 0;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "O|O$p:write", names, &buffer, &offset, &snapshot))
        return NULL;
    return request(self, buffer, offset, ZS_WRITE, snapshot);
}

static PyObject *file_preallocate(File *self, PyObject *size)
{
    long long nbytes;
    int allocated = 0, error;
    if (!usable_file(self) || offset_of(size, &nbytes))
        return NULL;
    zs_file *file = self->file; /* another thread may close it meanwhile */
    zs_file_ref(file);
    Py_BEGIN_ALLOW_THREADS
    error = zs_file_preallocate(file, nbytes, &allocated);
    Py_END_ALLOW_THREADS
    zs_file_release(file);
    if (error == -ECHILD)
        return raise_foreign();
    if (error)
        return raise_error(make_error(-error, self->state->path, 0, nbytes, 0, self->state->backend));
    return PyBool_FromLong(allocated);
}

static PyObject *file_truncate(File *self, PyObject *size)
{
    long long nbytes;
    int error;
    if (!usable_file(self) || offset_of(size, &nbytes) ||
        settle_file(self->engine, self->file, ZS_ALL_OF_INODE, 120.0) || !usable_file(self))
        return NULL;
    zs_file *file = self->file; /* another thread may close it meanwhile */
    zs_file_ref(file);
    Py_BEGIN_ALLOW_THREADS
    error = zs_file_truncate(file, nbytes);
    Py_END_ALLOW_THREADS
    zs_file_release(file);
    if (error == -ECHILD)
        return raise_foreign();
    if (error)
        return raise_error(make_error(-error, self->state->path, nbytes, 0, 0, self->state->backend));
    Py_RETURN_NONE;
}

static PyObject *file_flush(File *self, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"level", "timeout_s", NULL};
    static const char *const LEVELS[] = {"none", "data", "full"};
    const char *text = "data";
    double timeout_s = 120.0;
    int level = 0, error;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|s$d:flush", names, &text, &timeout_s) || !usable_file(self))
        return NULL;
    while (level < 3 && strcmp(text, LEVELS[level]))
        level++;
    if (level == 3) {
        PyErr_Format(PyExc_ValueError, "level '%s': one of none, data, full", text);
        return NULL;
    }
    if (settle_file(self->engine, self->file, ZS_WRITE, timeout_s) || raise_loss(self) || !usable_file(self))
        return NULL;
    zs_file *file = self->file; /* another thread may close it meanwhile */
    zs_file_ref(file);
    Py_BEGIN_ALLOW_THREADS
    error = zs_file_flush(file, level);
    Py_END_ALLOW_THREADS
    zs_file_release(file);
    if (error)
        return raise_number(error, self);
    Py_RETURN_NONE;
}

static PyObject *file_close(File *self, PyObject *unused)
{
    (void)unused;
    if (!self->file)
        Py_RETURN_NONE;
    if (zs_engine_foreign(self->engine->engine))
        return raise_foreign();
    for (int direction = ZS_WRITE; direction >= ZS_READ && self->file; direction--)
        if (settle_file(self->engine, self->file, direction, 120.0))
            return NULL;
    zs_file *file = self->file;
    self->file = NULL;
    if (file)
        zs_file_close(file);
    if (raise_loss(self))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *file_enter(PyObject *self, PyObject *unused)
{
    (void)unused;
    return Py_NewRef(self);
}

static PyObject *file_exit(File *self, PyObject *args)
{
    (void)args;
    return file_close(self, NULL);
}

static PyObject *file_value(File *self, void *which)
{
    switch ((intptr_t)which) {
    case 0:
        return Py_NewRef(self->state->path);
    case 1:
        return PyUnicode_FromString(self->info.direct ? "direct" : "buffered");
    case 2:
        return PyUnicode_FromString(self->info.reason);
    case 3:
        return PyLong_FromLong(self->info.offset_align);
    case 4:
        return PyLong_FromLong(self->info.memory_align);
    case 5:
        return PyBool_FromLong(self->file == NULL);
    default:
        break;
    }
    zs_file_info info;
    if (!usable_file(self))
        return NULL;
    int error = zs_file_info_get(self->file, &info);
    return error ? raise_number(error, self) : PyLong_FromLongLong(info.nbytes);
}

static void file_dealloc(PyObject *object)
{
    File *self = (File *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->file)
        zs_file_close(self->file); /* operations in flight keep what they need */
    state_unref(self->state);
    Py_XDECREF((PyObject *)self->engine);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF((PyObject *)type);
}

static PyMethodDef file_methods[] = {
    {"read", (PyCFunction)(void (*)(void))file_read, METH_VARARGS | METH_KEYWORDS, NULL},
    {"write", (PyCFunction)(void (*)(void))file_write, METH_VARARGS | METH_KEYWORDS, NULL},
    {"preallocate", (PyCFunction)file_preallocate, METH_O, NULL},
    {"truncate", (PyCFunction)file_truncate, METH_O, NULL},
    {"flush", (PyCFunction)(void (*)(void))file_flush, METH_VARARGS | METH_KEYWORDS, NULL},
    {"close", (PyCFunction)file_close, METH_NOARGS, NULL},
    {"__enter__", file_enter, METH_NOARGS, NULL},
    {"__exit__", (PyCFunction)file_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef file_values[] = {
    {"path", (getter)file_value, NULL, NULL, (void *)0},
    {"mode", (getter)file_value, NULL, NULL, (void *)1},
    {"reason", (getter)file_value, NULL, NULL, (void *)2},
    {"offset_alignment", (getter)file_value, NULL, NULL, (void *)3},
    {"memory_alignment", (getter)file_value, NULL, NULL, (void *)4},
    {"closed", (getter)file_value, NULL, NULL, (void *)5},
    {"size", (getter)file_value, NULL, NULL, (void *)6},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot file_slots[] = {
    {Py_tp_dealloc, file_dealloc}, {Py_tp_methods, file_methods}, {Py_tp_getset, file_values},
    {Py_tp_doc, "A file of an engine."}, {0, NULL},
};

PyType_Spec file_spec = {
    "zs_offload_aio._core.File", sizeof(File), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, file_slots,
};
