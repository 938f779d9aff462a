/* The thread pool: each worker takes a chunk and carries it by pread or pwrite. With one worker it is the plain loop. */
#include "engine.h"

#include <signal.h>
#include <stdio.h>

int zs_spawn(pthread_t *thread, void *(*run)(void *), void *argument)
{
    sigset_t all, before;
    sigfillset(&all); /* signals are the program's own threads' business */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}

static void *work(void *argument)
{
    zs_engine *engine = argument;
    pthread_mutex_lock(&engine->mutex);
    for (;;) {
        zs_chunk *c;
        while (!(c = zs_next_chunk(engine)) && !engine->stop)
            pthread_cond_wait(&engine->work, &engine->mutex);
        if (!c)
            break;
        zs_wake(engine); /* there may be more, for the next one */
        pthread_mutex_unlock(&engine->mutex);
        int error = zs_prepare(engine, c);
        if (error)
            zs_chunk_over(engine, c, -error);
        else
            zs_transfer(engine, c);
        pthread_mutex_lock(&engine->mutex);
    }
    pthread_mutex_unlock(&engine->mutex);
    return NULL;
}

int zs_threads_start(zs_engine *engine, int count, char *reason, size_t size)
{
    engine->threads = calloc((size_t)count, sizeof *engine->threads);
    if (!engine->threads)
        return -ENOMEM;
    int error = 0;
    while (engine->thread_count < count && !error) {
        error = zs_spawn(&engine->threads[engine->thread_count], work, engine);
        engine->thread_count += !error;
    }
    if (engine->thread_count) /* fewer than asked for do as well */
        return 0;
    snprintf(reason, size, "no thread could be started: %s", strerror(-error));
    return error;
}
