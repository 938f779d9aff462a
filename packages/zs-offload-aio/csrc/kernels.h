/* Optimizer kernels on flat memory: the contract between the formulas, the instruction sets and their callers.
 * No Python in here.
 *
 * A kernel does one pass over [begin, end): loads the gradient, the parameter and its moments, computes in fp32, stores
 * them, and writes the copy. The same bits come out on every instruction set and however the elements are cut:
 * every operation rounds once, multiply-adds are fused exactly where kernels_body.h says so, and what does not fill a
 * vector goes through the same vector code on padded scratch memory. The exception is which NaN a NaN is.
 */
#ifndef ZS_KERNELS_H
#define ZS_KERNELS_H

#include <stdint.h>

enum { ZS_ADAMW = 0, ZS_ADAM = 1, ZS_ADAGRAD = 2, ZS_LION = 3, ZS_SGD = 4, ZS_KINDS = 5 };
enum { ZS_F32 = 0, ZS_BF16 = 1, ZS_F16 = 2 };

/* Arrays need the alignment of nothing: no kernel assumes more than byte addresses. */
typedef struct {
    void *param;
    void *first;       /* exp_avg; sum of Adagrad; momentum buffer, or NULL */
    void *second;      /* exp_avg_sq, or NULL */
    const void *grad;
    void *out;         /* or NULL */
    int64_t numel;
    int kind; /* where several kinds are in one list */
    int state_dtype;   /* of param, first and second: ZS_F32 or ZS_BF16 */
    int grad_dtype, out_dtype;
    int stream;        /* write `out` past the caches: it will not be read soon */

    float factor;      /* g = grad * factor */
    int add_decay;     /* whether g = fma(param, weight_decay, g) */
    float weight_decay;
    float keep;        /* AdamW, Lion: param *= keep; 1 where there is no decay */
    int from_grad;     /* of the linear interpolation of exp_avg: it starts at the gradient, not at the average */
    float lerp;        /* its weight */
    float beta1, grad1;        /* Lion: update = m * beta1 + g * grad1 */
    float beta2, grad2;        /* Adam: v = fma(grad2 * g, g, v * beta2); Lion: m = m * beta2 + g * grad2 */
    float correction2;         /* sqrt(1 - beta2 ** step) */
    float eps;
    float rate;                /* Adam: -lr / (1 - beta1 ** step); Adagrad: decayed lr; Lion: lr; SGD: -lr */
    int has_momentum, first_step, nesterov;
    float momentum, undamped;  /* SGD: buffer = fma(g, undamped, buffer * momentum) */
} zs_step;

/* One kind on elements [begin, end). */
typedef void (*zs_step_fn)(const zs_step *step, int64_t begin, int64_t end);
/* Sum of the squares of `numel` elements, in fp64; in lanes of a fixed number, so that the order is always the same. */
typedef double (*zs_squares_fn)(const void *values, int dtype, int64_t numel);

typedef struct {
    const char *name;
    int (*supported)(void);
    zs_step_fn step[ZS_KINDS];
    zs_squares_fn squares;
} zs_kernels;

enum { ZS_SQUARE_LANES = 32 };

extern const zs_kernels zs_kernels_portable;
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__) && !defined(ZS_PORTABLE_ONLY)
#define ZS_X86 1
extern const zs_kernels zs_kernels_avx512bf16, zs_kernels_avx512, zs_kernels_avx2;
#endif

/* Every build ends with the portable one. */
const zs_kernels *const *zs_kernels_all(int *count);
/* By name; NULL and "": $ZS_ISA, else the best. Where it fails, NULL and a message. */
const zs_kernels *zs_kernels_named(const char *name, char *message, int size);

#endif
