/* The formulas, once. A file per instruction set defines the vector (see kernels_portable.c for the list), includes
 * this, and closes with ZS_TABLE.
 *
 * adamw, adam and adagrad are torch's fused CPU kernels as its AVX2 and AVX-512 builds come out of the compiler: the
 * multiply-adds below are those that it contracts. sgd is torch.optim.SGD on its vector bodies. lion fuses nothing.
 */

#define ZS_CUT (2 * LANES) /* elements of an iteration */

typedef struct { V param, first, second; } state_t;

/* One optimizer on one vector; `kind` is a constant wherever this is inlined. */
ZS_INLINE void update(const int kind, const zs_step *s, V g, state_t *x)
{
    V p = x->param, m = x->first;
    if (kind == ZS_ADAMW || kind == ZS_LION)
        p = v_mul(p, v_set(s->keep));
    else if (s->add_decay)
        g = v_fma(p, v_set(s->weight_decay), g);
    if (kind == ZS_ADAMW || kind == ZS_ADAM) {
        m = v_fma(v_set(s->lerp), v_sub(g, m), s->from_grad ? g : m);
        V v = v_fma(v_mul(v_set(s->grad2), g), g, v_mul(x->second, v_set(s->beta2)));
        V root = v_add(v_div(v_sqrt(v), v_set(s->correction2)), v_set(s->eps));
        p = v_add(p, v_div(v_mul(v_set(s->rate), m), root));
        x->second = v;
    } else if (kind == ZS_ADAGRAD) {
        m = v_fma(g, g, m);
        p = v_sub(p, v_div(v_mul(v_set(s->rate), g), v_add(v_sqrt(m), v_set(s->eps))));
    } else if (kind == ZS_LION) {
        V u = v_add(v_mul(m, v_set(s->beta1)), v_mul(g, v_set(s->grad1)));
        p = v_sub(p, v_signed(v_set(s->rate), u));
        m = v_add(v_mul(m, v_set(s->beta2)), v_mul(g, v_set(s->grad2)));
    } else {
        if (s->has_momentum) {
            m = s->first_step ? g : v_fma(g, v_set(s->undamped), v_mul(m, v_set(s->momentum)));
            g = s->nesterov ? v_fma(m, v_set(s->momentum), g) : m;
        }
        p = v_fma(g, v_set(s->rate), p);
    }
    x->param = p;
    x->first = m;
}

static const uint8_t nbytes_of[] = {4, 2, 2};

ZS_INLINE V load(const int dtype, const void *base, int64_t i)
{
    if (dtype == ZS_F32)
        return v_load((const char *)base + 4 * i);
    return dtype == ZS_BF16 ? v_load_bf16((const char *)base + 2 * i) : v_load_f16((const char *)base + 2 * i);
}

ZS_INLINE void store(const int dtype, void *base, int64_t i, V x)
{
    if (dtype == ZS_F32)
        v_store((char *)base + 4 * i, x);
    else if (dtype == ZS_BF16)
        v_store_bf16((char *)base + 2 * i, x);
    else
        v_store_f16((char *)base + 2 * i, x);
}

ZS_INLINE V one_vector(const int kind, const int states, const int grads, const zs_step *s, int64_t i)
{
    const int second = kind == ZS_ADAMW || kind == ZS_ADAM, first = kind != ZS_SGD || s->has_momentum;
    state_t x = {load(states, s->param, i), v_set(0), v_set(0)};
    if (first)
        x.first = load(states, s->first, i);
    if (second)
        x.second = load(states, s->second, i);
    update(kind, s, v_mul(load(grads, s->grad, i), v_set(s->factor)), &x);
    if (first)
        store(states, s->first, i, x.first);
    if (second)
        store(states, s->second, i, x.second);
    store(states, s->param, i, x.param);
    if (states == ZS_BF16) /* the copy is that of the rounded parameter */
        x.param = load(states, s->param, i);
    return x.param;
}

/* The lines of an iteration half a page on. The processor's own prefetching stops at the border of a page and starts
 * anew in the next, on four streams at once; this saved 13 to 19 % of the time where it was measured. */
ZS_INLINE void ahead(const void *base, int64_t i, const int dtype)
{
    const int64_t width = dtype == ZS_F32 ? 4 : 2;
    for (int k = 0; LANES > 1 && k < ZS_CUT * width; k += 64)
        __builtin_prefetch((const char *)base + i * width + k + 2048);
}

/* [begin, end) must be whole iterations, and `out` aligned where it is streamed. */
ZS_INLINE void body(const int kind, const int states, const int grads, const zs_step *s, int64_t begin, int64_t end)
{
    const int out = s->out ? s->out_dtype : -1;
    for (int64_t i = begin; i < end; i += ZS_CUT) {
        ahead(s->param, i, states);
        if (kind != ZS_SGD || s->has_momentum)
            ahead(s->first, i, states);
        if (kind == ZS_ADAMW || kind == ZS_ADAM)
            ahead(s->second, i, states);
        ahead(s->grad, i, grads);
        V low = one_vector(kind, states, grads, s, i);
        V high = one_vector(kind, states, grads, s, i + LANES);
        if (out < 0)
            continue;
        if (s->stream) {
            v_stream(out, (char *)s->out + (out == ZS_F32 ? 4 : 2) * i, low, high);
        } else {
            store(out, s->out, i, low);
            store(out, s->out, i + LANES, high);
        }
    }
}

/* Fewer elements than an iteration: the body on a padded copy. */
ZS_FUNCTION void ragged(zs_step_fn whole, const zs_step *s, int64_t begin, int64_t end)
{
    char memory[5][4 * ZS_CUT];
    zs_step copy = *s;
    const size_t n = (size_t)(end - begin), state = nbytes_of[s->state_dtype], grad = nbytes_of[s->grad_dtype];
    void *from[3] = {s->param, s->first, s->second};
    memset(memory, 0, sizeof memory);
    for (int k = 0; k < 3; k++)
        if (from[k])
            memcpy(memory[k], (char *)from[k] + state * (size_t)begin, state * n);
    memcpy(memory[3], (const char *)s->grad + grad * (size_t)begin, grad * n);
    copy.param = memory[0];
    copy.first = from[1] ? memory[1] : NULL;
    copy.second = from[2] ? memory[2] : NULL;
    copy.grad = memory[3];
    copy.out = s->out ? memory[4] : NULL;
    copy.stream = 0;
    whole(&copy, 0, ZS_CUT);
    for (int k = 0; k < 3; k++)
        if (from[k])
            memcpy((char *)from[k] + state * (size_t)begin, memory[k], state * n);
    if (s->out) {
        const size_t width = nbytes_of[s->out_dtype];
        memcpy((char *)s->out + width * (size_t)begin, memory[4], width * n);
    }
}

/* Elements before the first whole cache line of `out`, where it is streamed. */
ZS_FUNCTION int64_t before_line(const zs_step *s, int64_t begin)
{
    const uintptr_t width = nbytes_of[s->out_dtype], address = (uintptr_t)s->out + width * (uintptr_t)begin;
    return (int64_t)((-address & 63) / width);
}

#define ZS_KIND(name, kind)                                                                                            \
    ZS_FUNCTION void name##_whole(const zs_step *s, int64_t begin, int64_t end)                                        \
    {                                                                                                                  \
        switch (s->state_dtype * 3 + s->grad_dtype) {                                                                  \
        case 0: body(kind, ZS_F32, ZS_F32, s, begin, end); break;                                                      \
        case 1: body(kind, ZS_F32, ZS_BF16, s, begin, end); break;                                                     \
        case 2: body(kind, ZS_F32, ZS_F16, s, begin, end); break;                                                      \
        case 3: body(kind, ZS_BF16, ZS_F32, s, begin, end); break;                                                     \
        case 4: body(kind, ZS_BF16, ZS_BF16, s, begin, end); break;                                                    \
        default: body(kind, ZS_BF16, ZS_F16, s, begin, end);                                                           \
        }                                                                                                              \
    }                                                                                                                  \
    ZS_FUNCTION void name(const zs_step *s, int64_t begin, int64_t end)                                                \
    {                                                                                                                  \
        int64_t first = begin;                                                                                         \
        if (s->stream && (first += before_line(s, begin)) > end)                                                       \
            first = end;                                                                                               \
        for (; begin < first; begin += ZS_CUT)                                                                         \
            ragged(name##_whole, s, begin, first - begin < ZS_CUT ? first : begin + ZS_CUT);                           \
        const int64_t last = first + (end - first) / ZS_CUT * ZS_CUT;                                                  \
        name##_whole(s, first, last);                                                                                  \
        if (s->stream)                                                                                                 \
            v_fence();                                                                                                 \
        if (last < end)                                                                                                \
            ragged(name##_whole, s, last, end);                                                                        \
    }

ZS_KIND(step_adamw, ZS_ADAMW)
ZS_KIND(step_adam, ZS_ADAM)
ZS_KIND(step_adagrad, ZS_ADAGRAD)
ZS_KIND(step_lion, ZS_LION)
ZS_KIND(step_sgd, ZS_SGD)

/* Element i is added to lane i % 32. The square of an fp32 is exact in fp64, fused or not. */
ZS_INLINE void squares_of(const int dtype, const void *values, int64_t numel, double *lanes)
{
    D sums[ZS_SQUARE_LANES / LANES * DOUBLES];
    for (int k = 0; k < ZS_SQUARE_LANES / LANES * DOUBLES; k++)
        sums[k] = d_zero();
    int64_t i = 0;
    for (; i + ZS_SQUARE_LANES <= numel; i += ZS_SQUARE_LANES)
        for (int k = 0; k < ZS_SQUARE_LANES / LANES; k++)
            d_add_squares(load(dtype, values, i + k * LANES), sums + k * DOUBLES);
    if (i < numel) {
        char rest[4 * ZS_SQUARE_LANES] = {0};
        const size_t width = nbytes_of[dtype];
        memcpy(rest, (const char *)values + width * (size_t)i, width * (size_t)(numel - i));
        for (int k = 0; k < ZS_SQUARE_LANES / LANES; k++)
            d_add_squares(load(dtype, rest, k * LANES), sums + k * DOUBLES);
    }
    memcpy(lanes, sums, sizeof sums);
}

ZS_FUNCTION double squares(const void *values, int dtype, int64_t numel)
{
    double lanes[ZS_SQUARE_LANES];
    if (dtype == ZS_F32)
        squares_of(ZS_F32, values, numel, lanes);
    else if (dtype == ZS_BF16)
        squares_of(ZS_BF16, values, numel, lanes);
    else
        squares_of(ZS_F16, values, numel, lanes);
    for (int width = ZS_SQUARE_LANES / 2; width; width /= 2)
        for (int k = 0; k < width; k++)
            lanes[k] += lanes[k + width];
    return lanes[0];
}

#define ZS_TABLE(isa)                                                                                                  \
    const zs_kernels zs_kernels_##isa = {                                                                              \
        #isa, supported, {step_adamw, step_adam, step_adagrad, step_lion, step_sgd}, squares};
