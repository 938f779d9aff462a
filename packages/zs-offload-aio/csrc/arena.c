/* Aligned memory in arenas; see arena.h. */
#include "arena.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MAP_ANONYMOUS
#define MAP_ANONYMOUS MAP_ANON
#endif

enum { HUGE_PAGE = 2 << 20, STEPS = 8, CLASSES = STEPS * 56 };

struct zs_arena {
    zs_arena *next;
    char *base;
    size_t nbytes, used; /* used: cut off from the front so far */
    int64_t live;        /* blocks in use */
    size_t locked;
};

/* Lies in the block itself while that is free: the list costs no memory of its own. */
typedef struct free_block {
    struct free_block *next;
    zs_arena *arena;
} free_block;

struct zs_memory {
    pthread_mutex_t mutex;
    pid_t owner;
    size_t alignment, arena_nbytes;
    int lock, closed;
    zs_arena *arenas;
    free_block *free[CLASSES];
    zs_memory_stats stats;
};

static size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Eight classes for each doubling, in units of the alignment: at most an eighth is wasted. Gives class and size. */
static int class_of(const zs_memory *memory, size_t nbytes, size_t *rounded)
{
    size_t units = nbytes ? (nbytes - 1) / memory->alignment + 1 : 1;
    int shift = 0;
    while ((units - 1) >> shift >= 2 * STEPS)
        shift++;
    size_t steps = ((units - 1) >> shift) + 1; /* STEPS < steps <= 2 * STEPS where shift > 0 */
    *rounded = (steps << shift) * memory->alignment;
    return shift * STEPS + (int)steps - 1;
}

static int in_child(const zs_memory *memory) { return memory->owner != getpid(); }

/* ---- arenas ---- */

/* A mapping that starts on a huge page: what is too much in front and behind is given back. */
static char *map_aligned(size_t nbytes)
{
    size_t whole = nbytes + HUGE_PAGE;
    char *start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED)
        return NULL;
    char *base = (char *)round_up((uintptr_t)start, HUGE_PAGE);
    if (base > start)
        munmap(start, (size_t)(base - start));
    if (base + nbytes < start + whole)
        munmap(base + nbytes, (size_t)(start + whole - base - nbytes));
    return base;
}

static zs_arena *arena_open(zs_memory *memory, size_t nbytes)
{
    zs_arena *arena = calloc(1, sizeof *arena);
    if (!arena)
        return NULL;
    arena->nbytes = round_up(nbytes, HUGE_PAGE);
    arena->base = map_aligned(arena->nbytes);
    if (!arena->base) {
        free(arena);
        return NULL;
    }
#ifdef MADV_HUGEPAGE
    memory->stats.huge_pages = madvise(arena->base, arena->nbytes, MADV_HUGEPAGE) == 0;
#endif
    if (memory->lock) {
        if (mlock(arena->base, arena->nbytes) == 0)
            arena->locked = arena->nbytes;
        else
            memory->stats.lock_error = errno;
    }
    arena->next = memory->arenas;
    memory->arenas = arena;
    zs_memory_stats *stats = &memory->stats;
    stats->arenas++;
    stats->locked_nbytes += (int64_t)arena->locked;
    stats->mapped_nbytes += (int64_t)arena->nbytes;
    if (stats->mapped_nbytes > stats->peak_mapped_nbytes)
        stats->peak_mapped_nbytes = stats->mapped_nbytes;
    return arena;
}

/* Unmaps the arenas without a block in use. Their free blocks must not be on a list any more. */
static int64_t sweep(zs_memory *memory)
{
    int64_t freed = 0;
    for (zs_arena **link = &memory->arenas; *link;) {
        zs_arena *arena = *link;
        if (arena->live) {
            link = &arena->next;
            continue;
        }
        *link = arena->next;
        munmap(arena->base, arena->nbytes); /* unlocks too */
        memory->stats.arenas--;
        memory->stats.locked_nbytes -= (int64_t)arena->locked;
        memory->stats.mapped_nbytes -= (int64_t)arena->nbytes;
        freed += (int64_t)arena->nbytes;
        free(arena);
    }
    return freed;
}

/* An arena with room for a block, and where none has any a new one. */
static zs_arena *arena_with(zs_memory *memory, size_t nbytes)
{
    if (nbytes > memory->arena_nbytes / 4)
        return arena_open(memory, nbytes);
    for (zs_arena *arena = memory->arenas; arena; arena = arena->next)
        if (arena->nbytes - arena->used >= nbytes)
            return arena;
    return arena_open(memory, memory->arena_nbytes);
}

/* ---- the interface ---- */

int zs_memory_open(size_t alignment, size_t arena_nbytes, int lock, zs_memory **found)
{
    if (alignment < 64 || alignment > HUGE_PAGE || (alignment & (alignment - 1)) || arena_nbytes > SIZE_MAX / 4)
        return -EINVAL;
    zs_memory *memory = calloc(1, sizeof *memory);
    if (!memory)
        return -ENOMEM;
    int error = pthread_mutex_init(&memory->mutex, NULL);
    if (error) {
        free(memory);
        return -error;
    }
    memory->owner = getpid();
    memory->alignment = alignment;
    memory->arena_nbytes = arena_nbytes ? round_up(arena_nbytes, HUGE_PAGE) : 16 * (size_t)HUGE_PAGE;
    memory->lock = lock;
    *found = memory;
    return 0;
}

int zs_memory_take(zs_memory *memory, size_t nbytes, zs_block *block)
{
    size_t rounded;
    if (in_child(memory))
        return -ECHILD;
    if (nbytes > PTRDIFF_MAX / 2)
        return -ENOMEM;
    int class = class_of(memory, nbytes, &rounded);
    pthread_mutex_lock(&memory->mutex);
    free_block *again = memory->free[class];
    if (again) {
        memory->free[class] = again->next;
        *block = (zs_block){again, rounded, again->arena};
    } else {
        zs_arena *arena = arena_with(memory, rounded);
        if (!arena) {
            pthread_mutex_unlock(&memory->mutex);
            return -ENOMEM;
        }
        *block = (zs_block){arena->base + arena->used, rounded, arena};
        int own = rounded > memory->arena_nbytes / 4; /* nothing else goes into it: it can be unmapped early */
        arena->used = own ? arena->nbytes : arena->used + rounded;
    }
    block->arena->live++;
    zs_memory_stats *stats = &memory->stats;
    stats->in_use_blocks++;
    stats->in_use_nbytes += (int64_t)rounded;
    if (stats->in_use_nbytes > stats->peak_nbytes)
        stats->peak_nbytes = stats->in_use_nbytes;
    pthread_mutex_unlock(&memory->mutex);
    return 0;
}

static void destroy(zs_memory *memory)
{
    pthread_mutex_unlock(&memory->mutex);
    pthread_mutex_destroy(&memory->mutex);
    free(memory);
}

void zs_memory_give(zs_memory *memory, const zs_block *block)
{
    size_t rounded;
    if (in_child(memory))
        return;
    pthread_mutex_lock(&memory->mutex);
    memory->stats.in_use_blocks--;
    memory->stats.in_use_nbytes -= (int64_t)block->nbytes;
    block->arena->live--;
    if (memory->closed) {
        sweep(memory);
        if (!memory->arenas) {
            destroy(memory);
            return;
        }
    } else {
        free_block *again = block->address;
        int class = class_of(memory, block->nbytes, &rounded);
        *again = (free_block){memory->free[class], block->arena};
        memory->free[class] = again;
    }
    pthread_mutex_unlock(&memory->mutex);
}

int64_t zs_memory_trim(zs_memory *memory)
{
    if (in_child(memory))
        return -ECHILD;
    pthread_mutex_lock(&memory->mutex);
    for (int class = 0; class < CLASSES; class++)
        for (free_block **link = &memory->free[class]; *link;) {
            if ((*link)->arena->live)
                link = &(*link)->next;
            else
                *link = (*link)->next;
        }
    int64_t freed = sweep(memory);
    pthread_mutex_unlock(&memory->mutex);
    return freed;
}

void zs_memory_close(zs_memory *memory)
{
    if (in_child(memory))
        return;
    pthread_mutex_lock(&memory->mutex);
    memory->closed = 1;
    memset(memory->free, 0, sizeof memory->free);
    sweep(memory);
    if (!memory->arenas)
        destroy(memory);
    else
        pthread_mutex_unlock(&memory->mutex);
}

void zs_memory_stats_get(zs_memory *memory, zs_memory_stats *stats)
{
    int lock = !in_child(memory); /* in a child nobody else can write, and the lock may be held for ever */
    if (lock)
        pthread_mutex_lock(&memory->mutex);
    *stats = memory->stats;
    if (lock)
        pthread_mutex_unlock(&memory->mutex);
}
