#include "optim.h"

#include <errno.h>
#include <fenv.h>
#include <math.h>
#include <stdlib.h>

#include "pool.h"

enum {
    GRAIN = 1 << 17,        /* elements below which another thread costs more than it saves */
    SPLIT = 1 << 12,        /* parts begin at multiples of this: no cache line and no vector is shared */
    BLOCK = 1 << 14,        /* elements summed in lanes; the blocks' sums are added in order */
    STREAM_NBYTES = 1 << 22, /* of `out`: what is larger would leave the caches before anyone reads it */
    DEFAULT_THREADS = 8,    /* a few saturate the memory */
};

void zs_set_adam(zs_step *s, int decoupled, int64_t step, double lr, double beta1, double beta2, double eps,
                 double weight_decay)
{
    const float weight = (float)(1 - beta1);
    s->from_grad = !(fabsf(weight) < 0.5f); /* torch.lerp's two forms */
    s->lerp = s->from_grad ? weight - 1 : weight;
    s->beta2 = (float)beta2;
    s->grad2 = (float)(1 - beta2);
    s->correction2 = (float)sqrt(1 - pow(beta2, (double)step));
    s->eps = (float)eps;
    s->rate = (float)-(lr / (1 - pow(beta1, (double)step)));
    s->keep = (float)(decoupled ? 1 - lr * weight_decay : 1);
    s->add_decay = !decoupled && weight_decay != 0;
    s->weight_decay = (float)weight_decay;
}

void zs_set_adagrad(zs_step *s, int64_t step, double lr, double lr_decay, double eps, double weight_decay)
{
    s->rate = (float)(lr / (1 + (double)(step - 1) * lr_decay));
    s->eps = (float)eps;
    s->add_decay = weight_decay != 0;
    s->weight_decay = (float)weight_decay;
}

void zs_set_lion(zs_step *s, double lr, double beta1, double beta2, double weight_decay)
{
    s->keep = (float)(1 - lr * weight_decay);
    s->rate = (float)lr;
    s->beta1 = (float)beta1;
    s->grad1 = (float)(1 - beta1);
    s->beta2 = (float)beta2;
    s->grad2 = (float)(1 - beta2);
}

void zs_set_sgd(zs_step *s, int first_step, double lr, double momentum, double dampening, double weight_decay,
                int nesterov)
{
    s->rate = (float)-lr;
    s->has_momentum = momentum != 0;
    s->first_step = first_step;
    s->nesterov = nesterov;
    s->momentum = (float)momentum;
    s->undamped = (float)(1 - dampening);
    s->add_decay = weight_decay != 0;
    s->weight_decay = (float)weight_decay;
}

typedef struct {
    const zs_kernels *kernels;
    int kind, dtype, parts;
    int64_t numel, unit;   /* parts are whole units, but for the last one's end */
    zs_step *step;
    const char *values;
    double *sums;
} job_t;

static int64_t border(const job_t *job, int index)
{
    const int64_t units = (job->numel + job->unit - 1) / job->unit;
    const int64_t at = (units / job->parts * index + units % job->parts * index / job->parts) * job->unit;
    return at < job->numel ? at : job->numel;
}

static int parts_of(int64_t numel, int threads)
{
    int64_t useful = numel / (threads > 0 ? SPLIT : GRAIN);
    if (threads == 0) {
        threads = zs_pool_processors();
        threads = threads < DEFAULT_THREADS ? threads : DEFAULT_THREADS;
    }
    threads = threads < 0 ? -threads : threads;
    useful = useful < threads ? useful : threads;
    useful = useful < ZS_POOL_LIMIT ? useful : ZS_POOL_LIMIT;
    return useful > 1 ? (int)useful : 1;
}

static void step_part(void *context, int index)
{
    const job_t *job = context;
    const int64_t begin = border(job, index), end = border(job, index + 1);
    fenv_t before; /* someone may have asked this thread to flush denormals, or to round another way */
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    if (begin < end)
        job->kernels->step[job->kind](job->step, begin, end);
    fesetenv(&before);
}

void zs_step_run(const zs_kernels *kernels, int kind, zs_step *s, int threads)
{
    const int64_t width = s->out_dtype == ZS_F32 ? 4 : 2;
    s->stream = s->out && s->numel * width >= STREAM_NBYTES && (uintptr_t)s->out % (uintptr_t)width == 0;
    job_t job = {.kernels = kernels, .kind = kind, .step = s, .numel = s->numel, .unit = SPLIT};
    job.parts = parts_of(s->numel, threads);
    zs_pool_run(step_part, &job, job.parts);
}

static void squares_part(void *context, int index)
{
    const job_t *job = context;
    const int64_t end = border(job, index + 1), width = job->dtype == ZS_F32 ? 4 : 2;
    fenv_t before;
    fegetenv(&before);
    fesetenv(FE_DFL_ENV);
    for (int64_t i = border(job, index); i < end; i += BLOCK) {
        const int64_t numel = end - i < BLOCK ? end - i : BLOCK;
        job->sums[i / BLOCK] = job->kernels->squares(job->values + i * width, job->dtype, numel);
    }
    fesetenv(&before);
}

int zs_squares_run(const zs_kernels *kernels, const void *values, int dtype, int64_t numel, int threads, double *sum)
{
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK;
    double few[64];
    double *sums = blocks <= 64 ? few : malloc((size_t)blocks * sizeof *sums);
    if (!sums)
        return -ENOMEM;
    job_t job = {.kernels = kernels, .dtype = dtype, .values = values, .sums = sums, .numel = numel, .unit = BLOCK};
    job.parts = parts_of(numel, threads);
    zs_pool_run(squares_part, &job, job.parts);
    /* In order, with Neumaier's correction: the error does not grow with the number of blocks. */
    double total = 0, lost = 0;
    for (int64_t i = 0; i < blocks; i++) {
        const double next = total + sums[i];
        lost += total >= sums[i] ? (total - next) + sums[i] : (sums[i] - next) + total;
        total = next;
    }
    *sum = isfinite(total) ? total + lost : total; /* inf - inf would hide which it was */
    if (sums != few)
        free(sums);
    return 0;
}
