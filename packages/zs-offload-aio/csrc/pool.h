/* A few threads of the process for the kernels: they sleep between jobs, and a fork's child starts its own. */
#ifndef ZS_POOL_H
#define ZS_POOL_H

typedef void (*zs_task)(void *context, int index);

/* task(context, 0 .. count - 1), the caller taking part; returns when all are done. Callers take turns. Where no more
 * threads can be had, fewer do the work. */
void zs_pool_run(zs_task task, void *context, int count);
int zs_pool_processors(void); /* that this process may run on; at least 1 */

enum { ZS_POOL_LIMIT = 256 };

#endif
