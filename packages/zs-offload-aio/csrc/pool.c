#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    pthread_mutex_t turn;   /* held by the caller whose job runs */
    pthread_mutex_t lock;   /* guards what follows */
    pthread_cond_t work, finished;
    unsigned long job;      /* counts up; a worker takes part in each once */
    zs_task task;
    void *context;
    int count, next, running, workers;
} pool_t;

/* One per process: threads are a resource of the process, and two callers at once would only compete for the memory. */
static pool_t pool = {.turn = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
                      .work = PTHREAD_COND_INITIALIZER, .finished = PTHREAD_COND_INITIALIZER};
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* The child of a fork has no worker, and its copies of the locks may be held by threads that do not exist. */
static void in_child(void)
{
    pool = (pool_t){.turn = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
                    .work = PTHREAD_COND_INITIALIZER, .finished = PTHREAD_COND_INITIALIZER};
}

static void register_fork(void) { pthread_atfork(NULL, NULL, in_child); }

/* Which thread runs which index does not matter: the split is by index. Called and left with the lock held. */
static void take_part(void)
{
    while (pool.next < pool.count) {
        const int index = pool.next++;
        pool.running++;
        pthread_mutex_unlock(&pool.lock);
        pool.task(pool.context, index);
        pthread_mutex_lock(&pool.lock);
        pool.running--;
    }
}

static void *work(void *unused)
{
    unsigned long seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.job == seen)
            pthread_cond_wait(&pool.work, &pool.lock);
        seen = pool.job;
        take_part();
        if (!pool.running)
            pthread_cond_signal(&pool.finished);
    }
    return unused;
}

static void grow(int workers)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the program's own threads' to take */
    while (pool.workers < workers) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, work, NULL))
            break;
        pthread_detach(thread);
        pool.workers++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void zs_pool_run(zs_task task, void *context, int count)
{
    if (count <= 1) {
        if (count == 1)
            task(context, 0);
        return;
    }
    pthread_once(&once, register_fork);
    pthread_mutex_lock(&pool.turn);
    pthread_mutex_lock(&pool.lock);
    grow((count < ZS_POOL_LIMIT ? count : ZS_POOL_LIMIT) - 1);
    pool.task = task;
    pool.context = context;
    pool.count = count;
    pool.next = 0;
    pool.job++;
    for (int i = 1; i < count && i <= pool.workers; i++)
        pthread_cond_signal(&pool.work);
    take_part();
    while (pool.running)
        pthread_cond_wait(&pool.finished, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.turn);
}

int zs_pool_processors(void)
{
#ifdef __linux__
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
        return CPU_COUNT(&set);
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 ? (int)online : 1;
}
