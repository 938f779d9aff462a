/* Pool: aligned blocks as memoryviews. A block goes back when the last buffer of it is gone, the pool closed or not. */
#include "py_view.h"

#include <errno.h>
#include <string.h>

typedef struct {
    PyObject_HEAD
    zs_memory *memory; /* NULL once closed */
    int takers;        /* threads inside of take, which runs without the GIL; the last one closes what close() left */
    int closing;
    PyTypeObject *view;
    Py_ssize_t alignment;
} Pool;

static PyObject *memory_error(int error, Py_ssize_t nbytes)
{
    if (error == -ECHILD)
        PyErr_SetString(PyExc_RuntimeError, "this Pool belongs to the parent process: create a new Pool after fork");
    else
        PyErr_Format(PyExc_MemoryError, "no %zd bytes of aligned memory: %s", nbytes, strerror(-error));
    return NULL;
}

static PyObject *pool_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"alignment", "arena_nbytes", "lock", NULL};
    Py_ssize_t alignment = 4096, arena_nbytes = 0;
    int lock = 0;
    zs_memory *memory;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|nnp:Pool", names, &alignment, &arena_nbytes, &lock))
        return NULL;
    PyObject *module = PyType_GetModule(type);
    PyObject *view = module ? PyObject_GetAttrString(module, "View") : NULL;
    if (!view)
        return NULL;
    if (!zs_is_view_type(view)) {
        PyErr_SetString(PyExc_TypeError, "_core.view was replaced");
        Py_DECREF(view);
        return NULL;
    }
    int error = arena_nbytes < 0 ? -EINVAL : zs_memory_open((size_t)alignment, (size_t)arena_nbytes, lock, &memory);
    if (error == -EINVAL)
        PyErr_Format(PyExc_ValueError,
                     "alignment must be a power of two from 64 to 2097152, arena_nbytes not negative: %zd, %zd",
                     alignment, arena_nbytes);
    else if (error)
        memory_error(error, (Py_ssize_t)sizeof(void *));
    Pool *self = error ? NULL : (Pool *)PyType_GenericAlloc(type, 0);
    if (!self) {
        if (!error)
            zs_memory_close(memory);
        Py_DECREF(view);
        return NULL;
    }
    self->memory = memory;
    self->view = (PyTypeObject *)view;
    self->alignment = alignment;
    return (PyObject *)self;
}

static void settle(Pool *self)
{
    if (!self->closing || self->takers || !self->memory)
        return;
    zs_memory_close(self->memory);
    self->memory = NULL;
}

static PyObject *pool_close(PyObject *object, PyObject *unused)
{
    Pool *self = (Pool *)object;
    (void)unused;
    self->closing = 1;
    settle(self);
    Py_RETURN_NONE;
}

static void pool_dealloc(PyObject *object)
{
    Pool *self = (Pool *)object;
    PyTypeObject *type = Py_TYPE(object);
    if (self->memory)
        zs_memory_close(self->memory);
    Py_XDECREF((PyObject *)self->view);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static zs_memory *pool_memory(PyObject *object)
{
    Pool *self = (Pool *)object;
    if (!self->closing)
        return self->memory;
    PyErr_SetString(PyExc_ValueError, "the pool is closed");
    return NULL;
}

static PyObject *pool_buffer(PyObject *object, PyObject *argument)
{
    Pool *self = (Pool *)object;
    Py_ssize_t nbytes = PyNumber_AsSsize_t(argument, PyExc_OverflowError); /* may run code, so it goes first */
    zs_memory *memory = nbytes == -1 && PyErr_Occurred() ? NULL : pool_memory(object);
    if (!memory)
        return NULL;
    if (nbytes < 0) {
        PyErr_Format(PyExc_ValueError, "nbytes must not be negative: %zd", nbytes);
        return NULL;
    }
    zs_block block;
    int error;
    self->takers++;
    Py_BEGIN_ALLOW_THREADS /* locking a big mapping takes its time */
    error = zs_memory_take(memory, (size_t)nbytes, &block);
    Py_END_ALLOW_THREADS
    self->takers--;
    if (error) {
        settle(self);
        return memory_error(error, nbytes);
    }
    View *view = (View *)zs_view_make(self->view, block.address, nbytes, 0);
    if (!view)
        zs_memory_give(memory, &block);
    settle(self); /* after this, `memory` lives only as long as its blocks */
    if (!view)
        return NULL;
    view->memory = memory;
    view->block = block;
    PyObject *shown = PyMemoryView_FromObject((PyObject *)view);
    Py_DECREF(view);
    return shown;
}

static PyObject *pool_trim(PyObject *object, PyObject *unused)
{
    zs_memory *memory = pool_memory(object);
    (void)unused;
    int64_t freed = memory ? zs_memory_trim(memory) : 0;
    if (!memory)
        return NULL;
    return freed < 0 ? memory_error((int)freed, 0) : PyLong_FromLongLong(freed);
}

static PyObject *pool_stats(PyObject *object, PyObject *unused)
{
    zs_memory *memory = pool_memory(object);
    zs_memory_stats stats;
    (void)unused;
    if (!memory)
        return NULL;
    zs_memory_stats_get(memory, &stats);
    return Py_BuildValue(
        "{sLsLsLsLsLsLsLsssO}", "in_use_nbytes", (long long)stats.in_use_nbytes, "in_use_blocks",
        (long long)stats.in_use_blocks, "peak_nbytes", (long long)stats.peak_nbytes, "mapped_nbytes",
        (long long)stats.mapped_nbytes, "peak_mapped_nbytes", (long long)stats.peak_mapped_nbytes, "arenas",
        (long long)stats.arenas, "locked_nbytes", (long long)stats.locked_nbytes, "lock_failure",
        stats.lock_error ? strerror(stats.lock_error) : "", "huge_pages", stats.huge_pages ? Py_True : Py_False);
}

static PyObject *pool_alignment(PyObject *object, void *unused)
{
    (void)unused;
    return PyLong_FromSsize_t(((Pool *)object)->alignment);
}

static PyObject *pool_closed(PyObject *object, void *unused)
{
    (void)unused;
    return PyBool_FromLong(((Pool *)object)->closing);
}

static PyMethodDef pool_methods[] = {
    {"buffer", pool_buffer, METH_O, "buffer($self, nbytes, /)\n--\n\nA writable memoryview of `nbytes` aligned bytes."},
    {"trim", pool_trim, METH_NOARGS, "trim($self, /)\n--\n\nUnmap what holds nothing in use; the number of bytes."},
    {"stats", pool_stats, METH_NOARGS, "stats($self, /)\n--\n\nNumbers of bytes and arenas, and why locking failed."},
    {"close", pool_close, METH_NOARGS, "close($self, /)\n--\n\nNo more buffers; those handed out stay valid."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef pool_getset[] = {
    {"alignment", pool_alignment, NULL, "Of every buffer's first byte.", NULL},
    {"closed", pool_closed, NULL, "Whether close() was called.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot pool_slots[] = {
    {Py_tp_doc, "Pool(alignment=4096, arena_nbytes=0, lock=False)\n--\n\nAligned memory; see zs_offload_aio.Pool."},
    {Py_tp_new, pool_new},
    {Py_tp_dealloc, pool_dealloc},
    {Py_tp_methods, pool_methods},
    {Py_tp_getset, pool_getset},
    {0, NULL},
};

static PyType_Spec pool_spec = {
    "zs_offload_aio._core.Pool", sizeof(Pool), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE, pool_slots,
};

int zs_add_buffers(PyObject *module)
{
    if (zs_add_view(module) < 0)
        return -1;
    PyObject *pool = PyType_FromModuleAndSpec(module, &pool_spec, NULL);
    int error = pool ? PyModule_AddObjectRef(module, "Pool", pool) : -1;
    Py_XDECREF(pool);
    return error;
}
