/* Any processor: one element at a time, `fmaf` where the formula fuses. The reference for the other sets. */
#include "kernels.h"

#include <math.h>
#include <string.h>

#define ZS_FUNCTION static
#define ZS_INLINE static inline
#define LANES 1   /* fp32 elements of a vector V */
#define DOUBLES 1 /* vectors D that hold as many fp64 */
typedef float V;
typedef double D;

ZS_INLINE V v_set(float x) { return x; }
ZS_INLINE V v_add(V a, V b) { return a + b; }
ZS_INLINE V v_sub(V a, V b) { return a - b; }
ZS_INLINE V v_mul(V a, V b) { return a * b; }
ZS_INLINE V v_div(V a, V b) { return a / b; }
ZS_INLINE V v_sqrt(V a) { return sqrtf(a); }
ZS_INLINE V v_fma(V a, V b, V c) { return fmaf(a, b, c); }
/* magnitude * sign(x), where the sign of zero and of NaN is 0, as torch.sign has it */
ZS_INLINE V v_signed(V magnitude, V x) { return x > 0 ? magnitude : x < 0 ? -magnitude : 0; }

ZS_INLINE uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

ZS_INLINE float of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

ZS_INLINE uint16_t load16(const void *from)
{
    uint16_t bits;
    memcpy(&bits, from, 2);
    return bits;
}

ZS_INLINE V v_load(const void *from)
{
    V x;
    memcpy(&x, from, 4);
    return x;
}

ZS_INLINE void v_store(void *to, V x) { memcpy(to, &x, 4); }
ZS_INLINE V v_load_bf16(const void *from) { return of_bits((uint32_t)load16(from) << 16); }

/* To nearest, ties to even; every NaN becomes 0xffff, which is what torch's vector code makes of it. */
ZS_INLINE void v_store_bf16(void *to, V x)
{
    uint32_t bits = bits_of(x);
    uint16_t half = x != x ? 0xffff : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    memcpy(to, &half, 2);
}

ZS_INLINE V v_load_f16(const void *from)
{
    const uint32_t half = load16(from), sign = (half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
    if (exponent == 31) /* infinity, or a NaN made quiet as F16C does */
        return of_bits(sign | 0x7f800000 | fraction << 13 | (fraction ? 0x400000 : 0));
    if (exponent)
        return of_bits(sign | (exponent + 112) << 23 | fraction << 13);
    const float tiny = (float)fraction * 0x1p-24f; /* exact */
    return of_bits(sign | bits_of(tiny));
}

ZS_INLINE void v_store_f16(void *to, V x)
{
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t half;
    if (rest > 0x7f800000) { /* NaN: quiet, the upper bits of its payload kept */
        half = 0x7e00 | (rest >> 13 & 0x3ff);
    } else if (rest >= 0x477ff000) { /* rounds to 65536 or more */
        half = 0x7c00;
    } else if (rest < 0x38800000) { /* below 2**-14: the sum's last bit is worth 2**-24, the denormals' unit */
        half = bits_of(of_bits(rest) + 0.5f) - 0x3f000000;
    } else {
        half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    }
    const uint16_t value = (uint16_t)(sign | half);
    memcpy(to, &value, 2);
}

/* There is no portable way past the caches. */
ZS_INLINE void v_stream(int dtype, void *to, V low, V high)
{
    if (dtype == ZS_F32) {
        v_store(to, low);
        v_store((char *)to + 4, high);
    } else if (dtype == ZS_BF16) {
        v_store_bf16(to, low);
        v_store_bf16((char *)to + 2, high);
    } else {
        v_store_f16(to, low);
        v_store_f16((char *)to + 2, high);
    }
}

ZS_INLINE void v_fence(void) {}
ZS_INLINE D d_zero(void) { return 0; }
ZS_INLINE void d_add_squares(V x, D *sums) { sums[0] += (double)x * (double)x; }

static int supported(void) { return 1; }

#include "kernels_body.h"

ZS_TABLE(portable)
