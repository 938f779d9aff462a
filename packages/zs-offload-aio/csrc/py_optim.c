/* The optimizer functions of the module: arrays and numbers in, one pass without the GIL. Numbers are checked by
 * optim.py and torch.py; here is what memory safety needs, and every check comes before anything is written. */
#include "py_arrays.h"

static const zs_kernels *kernels_named(const char *isa)
{
    char message[256];
    const zs_kernels *kernels = zs_kernels_named(isa, message, sizeof message);
    if (!kernels)
        PyErr_SetString(PyExc_ValueError, message);
    return kernels;
}

/* Takes the arrays (objects in the order of the enum) into `s`. */
static int prepare(int kind, PyObject **objects, const char *first, const char *second, zs_step *s, zs_array *arrays)
{
    const char *const names[ARRAYS] = {"param", "grad", first, second, "out"};
    for (int k = 0; k < ARRAYS; k++)
        arrays[k] = (zs_array){.name = names[k], .written = k != GRAD};
    for (int k = 0; k < ARRAYS; k++)
        if (zs_take_array(objects[k], &arrays[k]) < 0)
            return -1;
    if (zs_check_arrays(kind, arrays, s) < 0)
        return -1;
    s->param = arrays[PARAM].address;
    s->grad = arrays[GRAD].address;
    s->first = arrays[FIRST].address;
    s->second = arrays[SECOND].address;
    s->out = arrays[OUT].address;
    s->numel = arrays[PARAM].numel;
    s->state_dtype = arrays[PARAM].dtype;
    s->grad_dtype = arrays[GRAD].dtype;
    s->out_dtype = arrays[OUT].dtype;
    return 0;
}

static PyObject *run(int kind, PyObject **objects, const char *first, const char *second, zs_step *s, int threads,
                     const char *isa)
{
    zs_array arrays[ARRAYS];
    const zs_kernels *kernels = kernels_named(isa);
    if (!kernels)
        return NULL;
    const int good = prepare(kind, objects, first, second, s, arrays) == 0;
    if (good) {
        Py_BEGIN_ALLOW_THREADS
        zs_step_run(kernels, kind, s, threads);
        Py_END_ALLOW_THREADS
    }
    zs_release_arrays(arrays, ARRAYS);
    if (!good)
        return NULL;
    Py_RETURN_NONE;
}

static int adam_numbers(PyObject *arguments, int decoupled, PyObject **o, zs_step *s, int *threads, const char **isa)
{
    long long step;
    double lr, beta1, beta2, eps, weight_decay;
    if (!PyArg_ParseTuple(arguments, "OOOOOLdddddfiz", &o[PARAM], &o[GRAD], &o[FIRST], &o[SECOND], &o[OUT], &step, &lr,
                          &beta1, &beta2, &eps, &weight_decay, &s->factor, threads, isa))
        return -1;
    zs_set_adam(s, decoupled, step, lr, beta1, beta2, eps, weight_decay);
    return 0;
}

static PyObject *adam(PyObject *arguments, int decoupled)
{
    PyObject *o[ARRAYS];
    zs_step s = {0};
    int threads;
    const char *isa;
    if (adam_numbers(arguments, decoupled, o, &s, &threads, &isa) < 0)
        return NULL;
    return run(decoupled ? ZS_ADAMW : ZS_ADAM, o, "exp_avg", "exp_avg_sq", &s, threads, isa);
}

static PyObject *py_adamw(PyObject *module, PyObject *arguments)
{
    (void)module;
    return adam(arguments, 1);
}

static PyObject *py_adam(PyObject *module, PyObject *arguments)
{
    (void)module;
    return adam(arguments, 0);
}

static PyObject *py_adagrad(PyObject *module, PyObject *arguments)
{
    PyObject *o[ARRAYS] = {NULL};
    zs_step s = {0};
    long long step;
    double lr, lr_decay, eps, weight_decay;
    int threads;
    const char *isa;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOLddddfiz", &o[PARAM], &o[GRAD], &o[FIRST], &o[OUT], &step, &lr, &lr_decay,
                          &eps, &weight_decay, &s.factor, &threads, &isa))
        return NULL;
    zs_set_adagrad(&s, step, lr, lr_decay, eps, weight_decay);
    return run(ZS_ADAGRAD, o, "sum", NULL, &s, threads, isa);
}

static PyObject *py_lion(PyObject *module, PyObject *arguments)
{
    PyObject *o[ARRAYS] = {NULL};
    zs_step s = {0};
    double lr, beta1, beta2, weight_decay;
    int threads;
    const char *isa;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOddddfiz", &o[PARAM], &o[GRAD], &o[FIRST], &o[OUT], &lr, &beta1, &beta2,
                          &weight_decay, &s.factor, &threads, &isa))
        return NULL;
    zs_set_lion(&s, lr, beta1, beta2, weight_decay);
    return run(ZS_LION, o, "exp_avg", NULL, &s, threads, isa);
}

static PyObject *py_sgd(PyObject *module, PyObject *arguments)
{
    PyObject *o[ARRAYS] = {NULL};
    zs_step s = {0};
    double lr, momentum, dampening, weight_decay;
    int first_step, nesterov, threads;
    const char *isa;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "OOOOpddddpfiz", &o[PARAM], &o[GRAD], &o[FIRST], &o[OUT], &first_step, &lr,
                          &momentum, &dampening, &weight_decay, &nesterov, &s.factor, &threads, &isa))
        return NULL;
    zs_set_sgd(&s, first_step, lr, momentum, dampening, weight_decay, nesterov);
    return run(ZS_SGD, o, "momentum_buffer", NULL, &s, threads, isa);
}

static void name_parameter(Py_ssize_t index)
{
    PyObject *kind, *value, *trace;
    PyErr_Fetch(&kind, &value, &trace);
    PyErr_Format(kind, "parameter %zd: %S", index, value ? value : kind);
    Py_XDECREF(kind);
    Py_XDECREF(value);
    Py_XDECREF(trace);
}

static int adam_kind(PyObject *item, Py_ssize_t *number, PyObject **arguments)
{
    int decoupled;
    if (!item || !PyArg_ParseTuple(item, "npO", number, &decoupled, arguments))
        return -1;
    return decoupled ? ZS_ADAMW : ZS_ADAM;
}

/* A list of (number, adamw or adam, its arguments); all are checked before the first runs. `arrays`, `steps`: room. */
static int run_many(PyObject *list, Py_ssize_t count, zs_array *arrays, zs_step *steps)
{
    int threads = 1;
    const char *isa = NULL;
    Py_ssize_t number;
    PyObject *arguments;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *o[ARRAYS];
        const int kind = adam_kind(PyList_GetItem(list, i), &number, &arguments);
        if (kind < 0 || adam_numbers(arguments, kind == ZS_ADAMW, o, &steps[i], &threads, &isa) < 0)
            return -1;
        steps[i].kind = kind;
        if (prepare(kind, o, "exp_avg", "exp_avg_sq", &steps[i], arrays + i * ARRAYS) < 0) {
            name_parameter(number);
            return -1;
        }
    }
    const zs_kernels *kernels = kernels_named(isa);
    if (!kernels)
        return -1;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < count; i++)
        zs_step_run(kernels, steps[i].kind, &steps[i], threads);
    Py_END_ALLOW_THREADS
    return 0;
}

static PyObject *py_adam_many(PyObject *module, PyObject *arguments)
{
    PyObject *list;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "O", &list))
        return NULL;
    const Py_ssize_t count = PyList_Size(list);
    if (count < 0)
        return NULL;
    zs_array *arrays = PyMem_Calloc((size_t)count * ARRAYS + 1, sizeof *arrays);
    zs_step *steps = PyMem_Calloc((size_t)count + 1, sizeof *steps);
    if (!arrays || !steps) {
        PyMem_Free(arrays);
        PyMem_Free(steps);
        return PyErr_NoMemory();
    }
    const int error = run_many(list, count, arrays, steps);
    zs_release_arrays(arrays, (int)count * ARRAYS);
    PyMem_Free(arrays);
    PyMem_Free(steps);
    if (error)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *py_sum_of_squares(PyObject *module, PyObject *arguments)
{
    PyObject *object;
    zs_array array = {.name = "grad"};
    int threads, error = 0;
    const char *isa;
    double sum = 0;
    (void)module;
    if (!PyArg_ParseTuple(arguments, "Oiz", &object, &threads, &isa))
        return NULL;
    const zs_kernels *kernels = kernels_named(isa);
    if (!kernels)
        return NULL;
    const int good = zs_take_array(object, &array) == 0;
    if (good && array.address) {
        Py_BEGIN_ALLOW_THREADS
        error = zs_squares_run(kernels, array.address, array.dtype, array.numel, threads, &sum);
        Py_END_ALLOW_THREADS
    }
    zs_release_arrays(&array, 1);
    if (!good)
        return NULL;
    if (!array.address)
        return PyErr_Format(PyExc_TypeError, "grad must not be None");
    return error ? PyErr_NoMemory() : PyFloat_FromDouble(sum);
}

static PyObject *py_isas(PyObject *module, PyObject *unused)
{
    int count;
    const zs_kernels *const *all = zs_kernels_all(&count);
    PyObject *names = PyList_New(0);
    (void)module, (void)unused;
    for (int i = 0; names && i < count; i++) {
        if (!all[i]->supported())
            continue;
        PyObject *name = PyUnicode_FromString(all[i]->name);
        if (!name || PyList_Append(names, name) < 0)
            Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

static PyObject *py_isa(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    const zs_kernels *kernels = kernels_named(NULL);
    return kernels ? PyUnicode_FromString(kernels->name) : NULL;
}

static PyMethodDef methods[] = {
    {"adamw", py_adamw, METH_VARARGS, "One AdamW step on flat memory; optim.adamw is the public one."},
    {"adam", py_adam, METH_VARARGS, "One Adam step on flat memory; optim.adam is the public one."},
    {"adam_many", py_adam_many, METH_VARARGS, "Steps of adamw and adam: a list of (number, adamw?, arguments)."},
    {"adagrad", py_adagrad, METH_VARARGS, "One Adagrad step on flat memory; optim.adagrad is the public one."},
    {"lion", py_lion, METH_VARARGS, "One Lion step on flat memory; optim.lion is the public one."},
    {"sgd", py_sgd, METH_VARARGS, "One SGD step on flat memory; optim.sgd is the public one."},
    {"sum_of_squares", py_sum_of_squares, METH_VARARGS, "The sum of the squares, in fp64."},
    {"isas", py_isas, METH_NOARGS, "The instruction sets that this processor has, the best first."},
    {"isa", py_isa, METH_NOARGS, "The instruction set that is used: $ZS_ISA, or the best."},
    {NULL, NULL, 0, NULL},
};

int zs_add_optim(PyObject *module) { return PyModule_AddFunctions(module, methods); }
