/* An array is (address, numel, dtype name), or any exporter of the buffer protocol. */
#include "py_arrays.h"

#include <string.h>

static const char *const dtype_names[] = {"float32", "bfloat16", "float16"};

static int dtype_of_format(const zs_array *array)
{
    const char *format = array->view.format ? array->view.format : "B";
    const uint16_t one = 1;
    const char native = *(const char *)&one ? '<' : '>';
    if (*format == '@' || *format == '=' || *format == native)
        format++;
    if (strcmp(format, "f") == 0)
        return ZS_F32;
    if (strcmp(format, "e") == 0)
        return ZS_F16;
    if (strcmp(format, "H") == 0)
        return ZS_BF16;
    PyErr_Format(PyExc_TypeError,
                 "%s has elements of format '%s': float32 ('f'), float16 ('e') or the bits of bfloat16 ('H')",
                 array->name, array->view.format ? array->view.format : "B");
    return -1;
}

/* (address, numel, dtype name) of memory that the caller of the function keeps alive */
static int take_address(PyObject *object, zs_array *array)
{
    PyObject *address, *numel, *dtype;
    if (!PyArg_UnpackTuple(object, array->name, 3, 3, &address, &numel, &dtype))
        return -1;
    array->address = PyLong_AsVoidPtr(address);
    array->numel = PyLong_AsLongLong(numel);
    if (PyErr_Occurred())
        return -1;
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(dtype, &length);
    if (!text)
        return -1;
    for (array->dtype = 0; array->dtype < 3; array->dtype++)
        if (strcmp(text, dtype_names[array->dtype]) == 0)
            break;
    if (array->dtype == 3 || array->numel < 0) {
        PyErr_Format(PyExc_TypeError, "%s is %s: float32, bfloat16 or float16", array->name, text);
        return -1;
    }
    if (!array->address)
        array->address = (char *)array; /* an empty tensor has no address; nothing is read from it */
    return 0;
}

static int take_buffer(PyObject *object, zs_array *array)
{
    if (!PyObject_CheckBuffer(object)) {
        PyErr_Format(PyExc_TypeError, "%s: a buffer, an array or a CPU tensor", array->name);
        return -1;
    }
    if (PyObject_GetBuffer(object, &array->view, PyBUF_ND | PyBUF_FORMAT | (array->written ? PyBUF_WRITABLE : 0)) < 0) {
        PyObject *kind, *value, *trace; /* exporters raise BufferError, ValueError or their own */
        PyErr_Fetch(&kind, &value, &trace);
        PyErr_Format(PyExc_ValueError, "%s must be contiguous%s: %S", array->name,
                     array->written ? " and writable" : "", value ? value : kind);
        Py_XDECREF(kind);
        Py_XDECREF(value);
        Py_XDECREF(trace);
        return -1;
    }
    array->held = 1;
    array->dtype = dtype_of_format(array);
    if (array->dtype < 0)
        return -1;
    array->address = array->view.buf ? array->view.buf : (char *)array;
    array->numel = array->view.len / (array->dtype == ZS_F32 ? 4 : 2);
    return 0;
}

int zs_take_array(PyObject *object, zs_array *array)
{
    if (!object || object == Py_None)
        return 0;
    if ((PyTuple_Check(object) ? take_address : take_buffer)(object, array) < 0)
        return -1;
    array->nbytes = array->numel * (array->dtype == ZS_F32 ? 4 : 2);
    return 0;
}

void zs_release_arrays(zs_array *arrays, int count)
{
    for (int k = 0; k < count; k++)
        if (arrays[k].held)
            PyBuffer_Release(&arrays[k].view);
}

static int refuse(PyObject *kind, const char *format, const char *a, const char *b)
{
    PyErr_Format(kind, format, a, b);
    return -1;
}

int zs_check_arrays(int kind, const zs_array *arrays, const zs_step *s)
{
    const zs_array *param = &arrays[PARAM];
    const int first = kind != ZS_SGD || s->has_momentum, second = kind == ZS_ADAMW || kind == ZS_ADAM;
    for (int k = 0; k < ARRAYS; k++)
        if (!arrays[k].address && (k == PARAM || k == GRAD || (k == FIRST && first) || (k == SECOND && second)))
            return refuse(PyExc_TypeError, "%s must not be None", arrays[k].name, "");
    if (param->dtype == ZS_F16)
        return refuse(PyExc_TypeError, "param is float16: float32 or bfloat16", "", "");
    for (int k = 0; k < ARRAYS; k++) {
        const zs_array *array = &arrays[k];
        if (!array->address)
            continue;
        if (array->numel != param->numel) {
            PyErr_Format(PyExc_ValueError, "%s has %lld elements, param %lld", array->name, (long long)array->numel,
                         (long long)param->numel);
            return -1;
        }
        if ((k == FIRST || k == SECOND) && array->dtype != param->dtype) {
            PyErr_Format(PyExc_TypeError, "%s is %s, param %s", array->name, dtype_names[array->dtype],
                         dtype_names[param->dtype]);
            return -1;
        }
        for (int other = 0; other < ARRAYS; other++) {
            const uintptr_t a = (uintptr_t)array->address, b = (uintptr_t)arrays[other].address;
            if (other != k && b && array->nbytes && array->written && a < b + (uintptr_t)arrays[other].nbytes &&
                b < a + (uintptr_t)array->nbytes)
                return refuse(PyExc_ValueError, "%s and %s overlap in memory", array->name, arrays[other].name);
        }
    }
    return 0;
}
