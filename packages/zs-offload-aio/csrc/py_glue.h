/* What the parts of the extension module share. Limited API of CPython 3.11; heap types only. */
#ifndef ZS_PY_GLUE_H
#define ZS_PY_GLUE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

int zs_add_engine(PyObject *module);  /* py_engine.c: Engine, File, Ticket */
int zs_add_buffers(PyObject *module); /* py_buffers.c: Pool, view, from_dlpack */
int zs_add_optim(PyObject *module);   /* py_optim.c: adamw, adagrad, lion, sgd, sum_of_squares, isas */

#endif
