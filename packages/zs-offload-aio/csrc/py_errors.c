/* Exceptions; their classes and texts are in errors.py. */
#include "py_io.h"

PyObject *make_error(int number, PyObject *path, long long offset, long long nbytes, long long done, const char *backend)
{
    PyObject *module = PyImport_ImportModule("zs_offload_aio.errors");
    if (!module)
        return NULL;
    PyObject *error = PyObject_CallMethod(module, "make", "iOLLLs", number, path ? path : Py_None, offset, nbytes, done, backend);
    Py_DECREF(module);
    return error;
}

void *raise_error(PyObject *error)
{
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return NULL;
}

void *raise_foreign(void)
{
    PyErr_SetString(PyExc_RuntimeError, "this engine belongs to the process that made it: create a new Engine after fork");
    return NULL;
}


void *raise_number(int error, File *file)
{
    if (error == -ECHILD)
        return raise_foreign();
    if (error == -ESHUTDOWN) {
        if (file->engine->closed)
            PyErr_SetString(PyExc_ValueError, "the engine is closed");
        else
            PyErr_Format(PyExc_ValueError, "the file is closed: %R", file->state->path);
        return NULL;
    }
    return raise_error(make_error(-error, file->state->path, 0, 0, 0, file->state->backend));
}

int usable(Engine *self)
{
    if (!self->engine || self->closed) {
        PyErr_SetString(PyExc_ValueError, "the engine is closed");
        return 0;
    }
    if (zs_engine_foreign(self->engine)) {
        raise_foreign();
        return 0;
    }
    return 1;
}

int usable_file(File *self)
{
    if (!usable(self->engine))
        return 0;
    if (!self->file) {
        PyErr_Format(PyExc_ValueError, "the file is closed: %R", self->state->path);
        return 0;
    }
    return 1;
}
