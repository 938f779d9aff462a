/* What the AVX-512 sets share: sixteen elements at a time. The includer defines ZS_TARGET and then to_bf16. */
#include <immintrin.h>
#include <string.h>

#define ZS_FUNCTION static __attribute__((ZS_TARGET))
#define ZS_INLINE static inline __attribute__((always_inline, ZS_TARGET))
#define LANES 16
#define DOUBLES 2
typedef __m512 V;
typedef __m512d D;

ZS_INLINE V v_set(float x) { return _mm512_set1_ps(x); }
ZS_INLINE V v_add(V a, V b) { return _mm512_add_ps(a, b); }
ZS_INLINE V v_sub(V a, V b) { return _mm512_sub_ps(a, b); }
ZS_INLINE V v_mul(V a, V b) { return _mm512_mul_ps(a, b); }
ZS_INLINE V v_div(V a, V b) { return _mm512_div_ps(a, b); }
ZS_INLINE V v_sqrt(V a) { return _mm512_sqrt_ps(a); }
ZS_INLINE V v_fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }

ZS_INLINE V v_signed(V magnitude, V x)
{
    __m512i sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32((int)0x80000000));
    __mmask16 nonzero = _mm512_cmp_ps_mask(x, v_set(0), _CMP_NEQ_OQ);
    return _mm512_castsi512_ps(_mm512_maskz_xor_epi32(nonzero, _mm512_castps_si512(magnitude), sign));
}

ZS_INLINE V v_load(const void *from) { return _mm512_loadu_ps(from); }
ZS_INLINE void v_store(void *to, V x) { _mm512_storeu_ps(to, x); }

ZS_INLINE V v_load_bf16(const void *from)
{
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

/* To nearest, ties to even, in integers, so that denormals stay; every NaN becomes 0xffff, as torch has it. */
ZS_INLINE __m256i to_bf16_integers(V x)
{
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    bits = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0xffff));
    return _mm512_cvtepi32_epi16(bits);
}

ZS_INLINE __m256i to_bf16(V x);
ZS_INLINE __m256i to_f16(V x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
ZS_INLINE void v_store_bf16(void *to, V x) { _mm256_storeu_si256(to, to_bf16(x)); }
ZS_INLINE V v_load_f16(const void *from) { return _mm512_cvtph_ps(_mm256_loadu_si256(from)); }
ZS_INLINE void v_store_f16(void *to, V x) { _mm256_storeu_si256(to, to_f16(x)); }

ZS_INLINE __m512i both(__m256i low, __m256i high)
{
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

ZS_INLINE void v_stream(int dtype, void *to, V low, V high)
{
    if (dtype == ZS_F32) {
        _mm512_stream_ps(to, low);
        _mm512_stream_ps((float *)to + LANES, high);
    } else if (dtype == ZS_BF16) {
        _mm512_stream_si512(to, both(to_bf16(low), to_bf16(high)));
    } else {
        _mm512_stream_si512(to, both(to_f16(low), to_f16(high)));
    }
}

ZS_INLINE void v_fence(void) { _mm_sfence(); }
ZS_INLINE D d_zero(void) { return _mm512_setzero_pd(); }

ZS_INLINE void d_add_squares(V x, D *sums)
{
    __m256d halves = _mm512_extractf64x4_pd(_mm512_castps_pd(x), 1);
    D low = _mm512_cvtps_pd(_mm512_castps512_ps256(x)), high = _mm512_cvtps_pd(_mm256_castpd_ps(halves));
    sums[0] = _mm512_fmadd_pd(low, low, sums[0]);
    sums[1] = _mm512_fmadd_pd(high, high, sums[1]);
}
