/* The Python face of the engine: what Engine, File and Ticket share.
 *
 * Buffers are held until their operation ended, whoever drops what: a ticket that is dropped before leaves them to its
 * engine, which lets go of them at a later call, and tells a write's error at the file's next flush or close.
 */
#ifndef ZS_PY_IO_H
#define ZS_PY_IO_H

#include "py_glue.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "zs_aio.h"

#define SLICE_S 0.05 /* between two looks at Python's signals */

typedef struct { /* what a File and its operations share: an operation must not keep File and Engine alive */
    int refs;
    PyObject *path, *lost; /* lost: the error of a write whose ticket was dropped */
    const char *backend;
    struct hold *writes;   /* whose tickets, or engines, are there */
} file_state;

typedef struct hold { /* what one operation needs alive */
    struct hold *next;
    struct hold *next_write, *previous_write;
    zs_op *op;
    file_state *file;
    Py_buffer *views;
    int count;
    PyObject *finishers; /* list of callables for after a successful read, or NULL */
    void *snapshot;
    int direction, seen; /* seen: its error was raised */
    int finishing;       /* a thread is running a finisher */
} hold;

typedef struct {
    PyObject_HEAD
    zs_engine *engine;
    hold *orphans;
    int orphan_count, reap_at; /* looked through when there are that many */
    PyTypeObject *file_type, *ticket_type;
    int closed;
} Engine;

typedef struct {
    PyObject_HEAD
    zs_file *file;
    Engine *engine;
    file_state *state;
    zs_file_info info;
} File;

typedef struct {
    PyObject_HEAD
    hold *hold;
    Engine *engine;
    int released; /* the buffers are let go of */
} Ticket;

/* py_errors.c: each sets an exception and returns NULL, but make_error */
PyObject *make_error(int number, PyObject *path, long long offset, long long nbytes, long long done, const char *backend);
void *raise_error(PyObject *error);
void *raise_foreign(void);
void *raise_number(int error, File *file); /* of a call that is about a file as a whole */
int usable(Engine *self);                  /* neither closed nor another process's; 0: an exception is set */
int usable_file(File *self);

/* py_hold.c */
void state_unref(file_state *state); /* with an error that was never told: to the hook for those */
void hold_release(hold *h); /* the buffers only */
void hold_free(hold *h);
void hold_watch(hold *h); /* a write: its file asks how it ended before it says that all is well */
PyObject *hold_error(hold *h);
void hold_remember(hold *h); /* a write that failed and whose ticket is gone: the file tells it later */
void adopt(Engine *engine, hold *h);
void reap(Engine *self);     /* lets go of what adopted operations held, where they ended */
int raise_loss(File *self);

/* py_request.c */
PyObject *request(File *self, PyObject *buffers, PyObject *offset, int direction, int snapshot);
int offset_of(PyObject *object, long long *offset);

/* py_wait.c: bounded by the time in which no transfer ends; Ctrl-C is heard within SLICE_S */
int settle_file(Engine *engine, zs_file *file, int which, double timeout_s);
int settle_engine(Engine *self, double timeout_s);

extern PyType_Spec ticket_spec, file_spec, engine_spec;

#endif
