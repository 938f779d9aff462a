/* AVX-512 with the instruction that rounds to bf16, which flushes denormals and keeps a NaN's payload: vectors that
 * have such an element go the other way. */
#include "kernels.h"

#ifdef ZS_X86
#define ZS_TARGET target("avx512f,avx512dq,avx512bf16")
#include "kernels_avx512.h"

enum { QUIET_NAN = 0x01, DENORMAL = 0x20, SIGNALING_NAN = 0x80 };

ZS_INLINE __m256i to_bf16(V x)
{
    if (__builtin_expect(_mm512_fpclass_ps_mask(x, QUIET_NAN | DENORMAL | SIGNALING_NAN), 0))
        return to_bf16_integers(x);
    return (__m256i)_mm512_cvtneps_pbh(x);
}

static int supported(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

#include "kernels_body.h"

ZS_TABLE(avx512bf16)
#endif
