/* Aligned memory that is cheap to take again: huge-page friendly arenas, size classes, a high-water mark. No Python.
 *
 *   zs_memory_open -> zs_memory_take -> zs_memory_give -> zs_memory_close
 *
 * Threads: every function may be called from any thread.
 * Lifetime: a block stays valid until it is given back, also after zs_memory_close; a mapping goes with its last block.
 * Fork: the child may use the blocks that it inherited; take is -ECHILD there, and give and close do nothing: another
 * thread of the parent may have held the lock at the moment of the fork.
 */
#ifndef ZS_ARENA_H
#define ZS_ARENA_H

#include <stddef.h>
#include <stdint.h>

typedef struct zs_memory zs_memory;
typedef struct zs_arena zs_arena;

typedef struct {
    void *address;
    size_t nbytes;    /* of the size class: at least what was asked for */
    zs_arena *arena;  /* where it was cut from */
} zs_block;

typedef struct {
    int64_t in_use_nbytes, in_use_blocks; /* taken and not given back; bytes as rounded up to size classes */
    int64_t peak_nbytes;                  /* the most that in_use_nbytes ever was */
    int64_t mapped_nbytes, peak_mapped_nbytes;
    int64_t arenas;                       /* mappings, those of single big blocks included */
    int64_t locked_nbytes;
    int lock_error;                       /* errno of the last mlock that failed, or 0 */
    int huge_pages;                       /* 1: the kernel took the advice to use them */
} zs_memory_stats;

/* `alignment`: a power of two from 64 to 2 MiB. `arena_nbytes`: 0 for 32 MiB, else rounded up to 2 MiB; blocks above a
 * quarter of it get a mapping of their own. `lock` 1: mlock; where that is refused the memory is used unlocked, and the
 * stats say so. */
int zs_memory_open(size_t alignment, size_t arena_nbytes, int lock, zs_memory **memory);
int zs_memory_take(zs_memory *memory, size_t nbytes, zs_block *block); /* contents undefined; -ENOMEM, -ECHILD */
void zs_memory_give(zs_memory *memory, const zs_block *block);
int64_t zs_memory_trim(zs_memory *memory); /* unmaps what holds no block in use: number of bytes, or -ECHILD */
void zs_memory_close(zs_memory *memory);   /* once, and the handle is gone; blocks may still be given back */
void zs_memory_stats_get(zs_memory *memory, zs_memory_stats *stats);

#endif
