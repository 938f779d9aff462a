/* An exporter of bytes: an address, a length, and what is to be done when the last buffer taken of it is gone. */
#ifndef ZS_PY_VIEW_H
#define ZS_PY_VIEW_H

#include "arena.h"
#include "dlpack.h"
#include "py_glue.h"

typedef struct {
    PyObject_HEAD
    char *address;
    Py_ssize_t nbytes;
    int readonly;
    PyObject *owner;  /* kept; may be NULL */
    PyObject *finish; /* callable for after a transfer into this memory; may be NULL */
    zs_memory *memory; /* `block` is of it; else NULL */
    zs_block block;
    dlpack_managed *managed;     /* at most one of these two is set; its deleter is due */
    dlpack_versioned *versioned;
} View;

PyObject *zs_view_make(PyTypeObject *type, void *address, Py_ssize_t nbytes, int readonly);
int zs_is_view_type(PyObject *object);
int zs_add_view(PyObject *module); /* `view` and `from_dlpack` */

#endif
