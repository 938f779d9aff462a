/* Steps and sums over whole arrays: constants of the formulas from the hyper-parameters, and the split over threads. */
#ifndef ZS_OPTIM_H
#define ZS_OPTIM_H

#include "kernels.h"

/* Fill in the constants; the arrays, dtypes and numel are the caller's. All in fp64, rounded once to fp32. */
void zs_set_adam(zs_step *s, int decoupled, int64_t step, double lr, double beta1, double beta2, double eps,
                 double weight_decay);
void zs_set_adagrad(zs_step *s, int64_t step, double lr, double lr_decay, double eps, double weight_decay);
void zs_set_lion(zs_step *s, double lr, double beta1, double beta2, double weight_decay);
void zs_set_sgd(zs_step *s, int first_step, double lr, double momentum, double dampening, double weight_decay,
                int nesterov);

/* `threads`: so many, where there is a little for each; negative: at most so many, where there is enough for each;
 * 0: as many as there are processors, up to 8, where there is enough for each. */
void zs_step_run(const zs_kernels *kernels, int kind, zs_step *s, int threads);
/* -ENOMEM, or 0. Not finite exactly where an element is not. */
int zs_squares_run(const zs_kernels *kernels, const void *values, int dtype, int64_t numel, int threads, double *sum);

#endif
