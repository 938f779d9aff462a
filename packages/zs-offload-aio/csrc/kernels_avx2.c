/* AVX2 with FMA and F16C: eight elements at a time. */
#include "kernels.h"

#ifdef ZS_X86
#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#define ZS_TARGET target("avx2,fma,f16c")
#define ZS_FUNCTION static __attribute__((ZS_TARGET))
#define ZS_INLINE static inline __attribute__((always_inline, ZS_TARGET))
#define LANES 8
#define DOUBLES 2
typedef __m256 V;
typedef __m256d D;

ZS_INLINE V v_set(float x) { return _mm256_set1_ps(x); }
ZS_INLINE V v_add(V a, V b) { return _mm256_add_ps(a, b); }
ZS_INLINE V v_sub(V a, V b) { return _mm256_sub_ps(a, b); }
ZS_INLINE V v_mul(V a, V b) { return _mm256_mul_ps(a, b); }
ZS_INLINE V v_div(V a, V b) { return _mm256_div_ps(a, b); }
ZS_INLINE V v_sqrt(V a) { return _mm256_sqrt_ps(a); }
ZS_INLINE V v_fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }

ZS_INLINE V v_signed(V magnitude, V x)
{
    V sign = _mm256_and_ps(x, v_set(-0.0f)), zero = v_set(0);
    return _mm256_and_ps(_mm256_xor_ps(magnitude, sign), _mm256_cmp_ps(x, zero, _CMP_NEQ_OQ));
}

ZS_INLINE V v_load(const void *from) { return _mm256_loadu_ps(from); }
ZS_INLINE void v_store(void *to, V x) { _mm256_storeu_ps(to, x); }

ZS_INLINE V v_load_bf16(const void *from)
{
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

/* To nearest, ties to even, in integers, so that denormals stay; every NaN becomes 0xffff, as torch has it. */
ZS_INLINE __m128i to_bf16(V x)
{
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    bits = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    bits = _mm256_srli_epi32(_mm256_or_si256(bits, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

ZS_INLINE __m128i to_f16(V x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
ZS_INLINE void v_store_bf16(void *to, V x) { _mm_storeu_si128(to, to_bf16(x)); }
ZS_INLINE V v_load_f16(const void *from) { return _mm256_cvtph_ps(_mm_loadu_si128(from)); }
ZS_INLINE void v_store_f16(void *to, V x) { _mm_storeu_si128(to, to_f16(x)); }

ZS_INLINE void v_stream(int dtype, void *to, V low, V high)
{
    if (dtype == ZS_F32) {
        _mm256_stream_ps(to, low);
        _mm256_stream_ps((float *)to + LANES, high);
    } else if (dtype == ZS_BF16) {
        _mm256_stream_si256(to, _mm256_set_m128i(to_bf16(high), to_bf16(low)));
    } else {
        _mm256_stream_si256(to, _mm256_set_m128i(to_f16(high), to_f16(low)));
    }
}

ZS_INLINE void v_fence(void) { _mm_sfence(); }
ZS_INLINE D d_zero(void) { return _mm256_setzero_pd(); }

ZS_INLINE void d_add_squares(V x, D *sums)
{
    D low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    sums[0] = _mm256_fmadd_pd(low, low, sums[0]);
    sums[1] = _mm256_fmadd_pd(high, high, sums[1]);
}

static int supported(void)
{
    unsigned a, b, c, d; /* F16C by its bit: not every compiler's __builtin_cpu_supports knows the name */
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}

#include "kernels_body.h"

ZS_TABLE(avx2)
#endif
