/* The arrays of an optimizer step as the module's functions take them. */
#ifndef ZS_PY_ARRAYS_H
#define ZS_PY_ARRAYS_H

#include "py_glue.h"

#include "optim.h"

typedef struct {
    const char *name;
    char *address;   /* NULL: None was given */
    int64_t numel, nbytes;
    int dtype, written, held;
    Py_buffer view;
} zs_array;

enum { PARAM, GRAD, FIRST, SECOND, OUT, ARRAYS };

/* Each returns 0, or -1 with an exception that names the array. */
int zs_take_array(PyObject *object, zs_array *array);        /* NULL is None */
int zs_check_arrays(int kind, const zs_array *arrays, const zs_step *s); /* kinds, sizes, dtypes, overlaps */
void zs_release_arrays(zs_array *arrays, int count);

#endif
