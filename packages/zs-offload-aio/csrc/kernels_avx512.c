/* AVX-512, the foundation only. */
#include "kernels.h"

#ifdef ZS_X86
#define ZS_TARGET target("avx512f")
#include "kernels_avx512.h"

ZS_INLINE __m256i to_bf16(V x) { return to_bf16_integers(x); }

static int supported(void) { return __builtin_cpu_supports("avx512f"); }

#include "kernels_body.h"

ZS_TABLE(avx512)
#endif
