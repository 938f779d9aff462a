/* view() shows memory that somebody else owns, from_dlpack() that of a capsule; both make a View. */
#include "py_view.h"


static int view_traverse(PyObject *object, visitproc visit, void *arg)
{
    View *self = (View *)object;
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->owner);
    Py_VISIT(self->finish);
    return 0;
}

static void view_dealloc(PyObject *object)
{
    View *self = (View *)object;
    PyTypeObject *type = Py_TYPE(object);
    PyObject *kind, *value, *traceback;
    PyObject_GC_UnTrack(object);
    PyErr_Fetch(&kind, &value, &traceback); /* a deleter may run any code */
    if (self->memory)
        zs_memory_give(self->memory, &self->block);
    if (self->managed && self->managed->deleter)
        self->managed->deleter(self->managed);
    if (self->versioned && self->versioned->deleter)
        self->versioned->deleter(self->versioned);
    Py_XDECREF(self->owner);
    Py_XDECREF(self->finish);
    PyErr_Restore(kind, value, traceback);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    release(object);
    Py_DECREF(type);
}

static int view_getbuffer(PyObject *object, Py_buffer *buffer, int flags)
{
    View *self = (View *)object;
    return PyBuffer_FillInfo(buffer, object, self->address, self->nbytes, self->readonly, flags);
}

PyObject *zs_view_make(PyTypeObject *type, void *address, Py_ssize_t nbytes, int readonly)
{
    View *self = (View *)PyType_GenericAlloc(type, 0);
    if (!self)
        return NULL;
    self->address = address;
    self->nbytes = nbytes;
    self->readonly = readonly;
    return (PyObject *)self;
}

static PyObject *view_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"address", "nbytes", "owner", "readonly", "finish", NULL};
    PyObject *number, *owner, *finish = Py_None;
    Py_ssize_t nbytes;
    int readonly;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OnOp|O:view", names, &number, &nbytes, &owner, &readonly,
                                     &finish))
        return NULL;
    unsigned long long address = PyLong_AsUnsignedLongLong(number);
    if (address == (unsigned long long)-1 && PyErr_Occurred())
        return NULL;
    if (nbytes < 0 || address > UINTPTR_MAX || address + (unsigned long long)nbytes < address || (nbytes && !address)) {
        PyErr_Format(PyExc_ValueError, "no memory of %zd bytes at address %llu", nbytes, address);
        return NULL;
    }
    View *self = (View *)zs_view_make(type, (void *)(uintptr_t)address, nbytes, readonly);
    if (!self)
        return NULL;
    self->owner = Py_NewRef(owner);
    self->finish = finish == Py_None ? NULL : Py_NewRef(finish);
    return (PyObject *)self;
}

static PyObject *view_finish(PyObject *object, void *unused)
{
    View *self = (View *)object;
    (void)unused;
    if (self->finish)
        return Py_NewRef(self->finish);
    PyErr_SetString(PyExc_AttributeError, "finish");
    return NULL;
}

static PyGetSetDef view_getset[] = {
    {"finish", view_finish, NULL, "What to call after a read into the memory; absent if there is nothing.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot view_slots[] = {
    {Py_tp_doc, "view(address, nbytes, owner, readonly, finish=None)\n--\n\n"
                "Memory that `owner` keeps alive, as a buffer of bytes; `owner` is held while any buffer of it lives."},
    {Py_tp_new, view_new},
    {Py_tp_dealloc, view_dealloc},
    {Py_tp_traverse, view_traverse},
    {Py_tp_getset, view_getset},
    {Py_bf_getbuffer, view_getbuffer},
    {0, NULL},
};

static PyType_Spec view_spec = {
    "zs_offload_aio._core.View", sizeof(View), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_IMMUTABLETYPE, view_slots,
};

/* ---- DLPack ---- */

/* The bytes of a tensor: 0, or -1 with TypeError where they are not one run of host memory. */
static int dlpack_extent(const dlpack_tensor *tensor, uint64_t flags, char **address, Py_ssize_t *nbytes)
{
    int64_t numel = 1, expected = 1, bits, found;
    int32_t device = tensor->device.type;
    if (device != DLPACK_CPU && device != DLPACK_CUDA_HOST && device != DLPACK_ROCM_HOST) {
        PyErr_Format(PyExc_TypeError, "DLPack: the memory is on device type %d, not on the host", (int)device);
        return -1;
    }
    int bad = tensor->ndim < 0 || (tensor->ndim && !tensor->shape) || !tensor->dtype.bits || !tensor->dtype.lanes;
    for (int i = 0; !bad && i < tensor->ndim; i++)
        bad = tensor->shape[i] < 0 || __builtin_mul_overflow(numel, tensor->shape[i], &numel);
    for (int i = bad ? 0 : tensor->ndim; numel && tensor->strides && i-- > 0;) {
        if (tensor->shape[i] != 1 && tensor->strides[i] != expected) {
            PyErr_SetString(PyExc_TypeError, "DLPack: not contiguous (row-major)");
            return -1;
        }
        expected *= tensor->shape[i];
    }
    bits = (int64_t)tensor->dtype.bits * tensor->dtype.lanes;
    if (flags & DLPACK_SUBBYTE_PADDED)
        bits = (bits + 7) / 8 * 8;
    bad = bad || __builtin_mul_overflow(numel, bits, &found) || found > PY_SSIZE_T_MAX - 7;
    found = bad ? 0 : (found + 7) / 8;
    uintptr_t start = (uintptr_t)tensor->data, end;
    bad = bad || __builtin_add_overflow(start, (uintptr_t)tensor->byte_offset, &start);
    bad = bad || __builtin_add_overflow(start, (uintptr_t)found, &end) || (found && !tensor->data);
    if (bad) {
        PyErr_SetString(PyExc_TypeError, "DLPack: the shape, dtype or address makes no sense");
        return -1;
    }
    *address = (char *)start;
    *nbytes = (Py_ssize_t)found;
    return 0;
}

static PyObject *from_dlpack(PyObject *type, PyObject *arguments)
{
    PyObject *capsule;
    int readonly;
    char *address;
    Py_ssize_t nbytes;
    dlpack_managed *managed = NULL;
    dlpack_versioned *versioned = NULL;
    if (!PyArg_ParseTuple(arguments, "Op:from_dlpack", &capsule, &readonly))
        return NULL;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned"))
        versioned = PyCapsule_GetPointer(capsule, "dltensor_versioned");
    else if (PyCapsule_IsValid(capsule, "dltensor"))
        managed = PyCapsule_GetPointer(capsule, "dltensor");
    else {
        PyErr_SetString(PyExc_TypeError, "not a DLPack capsule, or one that was consumed already");
        return NULL;
    }
    if (versioned && versioned->version.major != 1) {
        PyErr_Format(PyExc_TypeError, "DLPack: version %u of the interface, 1 is understood", versioned->version.major);
        return NULL;
    }
    uint64_t flags = versioned ? versioned->flags : 0;
    if (dlpack_extent(versioned ? &versioned->tensor : &managed->tensor, flags, &address, &nbytes) < 0)
        return NULL; /* the capsule is untouched, so that its own destructor calls the deleter */
    if (versioned) /* what is read into a copy would be lost */
        readonly = (flags & (DLPACK_READ_ONLY | DLPACK_IS_COPIED)) != 0;
    View *self = (View *)zs_view_make((PyTypeObject *)type, address, nbytes, readonly);
    if (!self)
        return NULL;
    if (PyCapsule_SetName(capsule, versioned ? "used_dltensor_versioned" : "used_dltensor") < 0) {
        Py_DECREF(self);
        return NULL;
    }
    self->managed = managed; /* from here on the deleter is ours to call */
    self->versioned = versioned;
    return (PyObject *)self;
}

/* ---- the module's part ---- */

static PyMethodDef from_dlpack_method = {
    "from_dlpack", from_dlpack, METH_VARARGS,
    "from_dlpack(capsule, readonly_default, /)\n--\n\nThe memory of a capsule as a buffer of bytes; consumes it.",
};

int zs_is_view_type(PyObject *object)
{
    return PyType_Check(object) && PyType_GetSlot((PyTypeObject *)object, Py_tp_dealloc) == (void *)view_dealloc;
}

int zs_add_view(PyObject *module)
{
    PyObject *view = PyType_FromModuleAndSpec(module, &view_spec, NULL);
    if (!view)
        return -1;
    /* Bound to the type, which it makes instances of: so no state of the module is needed. */
    PyObject *function = PyCFunction_NewEx(&from_dlpack_method, view, NULL);
    int error = function ? PyModule_AddObjectRef(module, "from_dlpack", function) : -1;
    if (!error)
        error = PyModule_AddObjectRef(module, "View", view);
    Py_XDECREF(function);
    Py_DECREF(view);
    return error;
}
