/* The extension module: gathers its parts. */
#include "py_glue.h"

static int exec_module(PyObject *module)
{
    if (zs_add_engine(module) < 0 || zs_add_buffers(module) < 0 || zs_add_optim(module) < 0)
        return -1;
    return 0;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, exec_module}, {0, NULL}};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_core", "Asynchronous files, aligned memory and optimizer kernels.", 0, NULL, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__core(void) { return PyModuleDef_Init(&definition); }
