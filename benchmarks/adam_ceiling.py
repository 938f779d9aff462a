"""The ceiling of an optimizer step: a C loop that reads and writes the same memory and computes next to nothing."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

SOURCE = r"""
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

typedef struct { float *p, *m, *v; const void *g; uint16_t *out; long begin, end; int half; float factor; } part_t;

static float gradient(const part_t *t, long i)
{
    if (!t->half)
        return ((const float *)t->g)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)t->g)[i] << 16;
    float g;
    memcpy(&g, &bits, 4);
    return g;
}

/* 32 elements: the copy leaves as whole lines, past the caches where the processor can, as the kernels' does */
static inline __attribute__((always_inline)) void lines(const part_t *t, const int half, const int copy)
{
    part_t local = *t;
    local.half = half;
    float *p = t->p, *m = t->m, *v = t->v;
    for (long i = t->begin; i < t->end; i += 32) {
        uint16_t cut[32] __attribute__((aligned(64)));
        for (int k = 0; k < 32; k++) {
            const float x = gradient(&local, i + k) * t->factor;
            const float q = p[i + k] - x;
            m[i + k] += x;
            v[i + k] += x;
            p[i + k] = q;
            uint32_t bits;
            memcpy(&bits, &q, 4);
            cut[k] = (uint16_t)(bits >> 16);
        }
        if (copy) {
#if defined(__SSE2__)
            for (int k = 0; k < 32; k += 8)
                _mm_stream_si128((__m128i *)(t->out + i + k), _mm_load_si128((const __m128i *)(cut + k)));
#else
            memcpy(t->out + i, cut, sizeof cut);
#endif
        }
    }
}

static void *work(void *given)
{
    const part_t *t = given;
    if (t->out)
        t->half ? lines(t, 1, 1) : lines(t, 0, 1);
    else
        t->half ? lines(t, 1, 0) : lines(t, 0, 0);
    return 0;
}

void ceiling(float *p, float *m, float *v, const void *g, uint16_t *out, long numel, int half, float factor,
             int threads)
{
    pthread_t ids[64];
    part_t parts[64];
    const long step = numel / threads / 32 * 32;
    for (int k = 0; k < threads; k++) {
        parts[k] = (part_t){p, m, v, g, out, k * step, k == threads - 1 ? numel : (k + 1) * step, half, factor};
        if (k)
            pthread_create(&ids[k], 0, work, &parts[k]);
    }
    work(&parts[0]);
    for (int k = 1; k < threads; k++)
        pthread_join(ids[k], 0);
}
"""

Loop = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int], None]


def build(folder: Path) -> Loop | str:
    """The loop as `loop(p, m, v, grad, out, threads)`, which changes no state; or why there is none.

    `numel` must be a multiple of 32, `out` bf16 on a 64-byte line.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return "no C compiler"
    source, library = folder / "ceiling.c", folder / "ceiling.so"
    source.write_text(SOURCE)
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return f"{compiler} failed: {done.stderr.strip().splitlines()[-1:]}"
    function = ctypes.CDLL(str(library)).ceiling
    function.restype = None

    def loop(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, out: Tensor | None, threads: int) -> None:
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (p, m, v, grad)]
        copy = ctypes.c_void_p(None if out is None else out.data_ptr())
        function(*pointers, copy, ctypes.c_long(p.numel()), int(grad.element_size() == 2), ctypes.c_float(0.0), threads)

    return loop
