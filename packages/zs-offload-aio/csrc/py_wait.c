/* Waiting without the lock of the interpreter, in slices, so that signals are heard. */
#include "py_io.h"

static int stalled(Engine *engine, double timeout_s)
{
    if (PyErr_CheckSignals())
        return -1;
    double quiet = zs_engine_quiet_s(engine->engine);
    if (quiet <= timeout_s)
        return 0;
    char text[120];
    snprintf(text, sizeof text, "no transfer ended for %.1f s (timeout_s=%g): the device does not answer", quiet, timeout_s);
    PyErr_SetString(PyExc_TimeoutError, text);
    return -1;
}

/* Until operations of the file ended, see zs_file_drain; bounded by the time in which nothing moves. */
int settle_file(Engine *engine, zs_file *file, int which, double timeout_s)
{
    int error, stuck = 0;
    zs_file_ref(file); /* another thread may close it meanwhile */
    do {
        Py_BEGIN_ALLOW_THREADS
        error = zs_file_drain(file, which, SLICE_S);
        Py_END_ALLOW_THREADS
        stuck = error == -ETIMEDOUT && stalled(engine, timeout_s);
    } while (error == -ETIMEDOUT && !stuck);
    zs_file_release(file);
    if (error && !stuck)
        raise_foreign(); /* the only other answer */
    return error;
}

int settle_engine(Engine *self, double timeout_s)
{
    int error;
    do {
        Py_BEGIN_ALLOW_THREADS
        error = zs_engine_drain(self->engine, SLICE_S);
        Py_END_ALLOW_THREADS
        if (error == -ETIMEDOUT && stalled(self, timeout_s))
            return -1;
    } while (error == -ETIMEDOUT);
    if (error == -ECHILD)
        raise_foreign();
    return error;
}
