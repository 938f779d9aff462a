/* Calibration of chunk size and depth, on the traffic itself.
 *
 * While more is queued than is in flight, each candidate in turn carries a window of at least 32 MiB, three rounds of
 * all of them; what still belongs to the candidate before is not counted, nor is a window in which the queue ran
 * empty, pieces were small, or the other direction was busy. Then the fastest median stays; the first candidate, the
 * usual best, is left only for one that is 5 % faster. No extra I/O, and no file to do it on.
 */
#include "engine.h"

static const struct { int64_t chunk_nbytes; int depth; } CANDIDATES[] = {
    {1 << 20, 32}, {1 << 20, 16}, {2 << 20, 16}, {4 << 20, 8}, {4 << 20, 16}, {512 << 10, 32},
};
enum { COUNT = sizeof CANDIDATES / sizeof *CANDIDATES, ROUNDS = 3 };
enum { MOST_SMALL = 128 }; /* disks queue 256 requests; beyond that submission blocks */
#define WINDOW_NBYTES ((int64_t)32 << 20)

zs_tuner *zs_tuner_get(zs_engine *engine, uint64_t device, int direction)
{
    zs_tuner *tuner = engine->tuners;
    while (tuner && (tuner->device != device || tuner->direction != direction))
        tuner = tuner->next;
    if (tuner || !(tuner = calloc(1, sizeof *tuner)))
        return tuner;
    tuner->device = device;
    tuner->direction = direction;
    tuner->count = COUNT;
    for (int i = 0; i < COUNT; i++) {
        tuner->candidates[i].chunk_nbytes = CANDIDATES[i].chunk_nbytes;
        tuner->candidates[i].depth = CANDIDATES[i].depth;
    }
    tuner->settled = engine->fixed_depth != 0 || engine->backend >= ZS_THREADS; /* threads: their number is the depth */
    tuner->next = engine->tuners;
    engine->tuners = tuner;
    return tuner;
}

int64_t zs_tuner_chunk(const zs_engine *engine, const zs_tuner *tuner)
{
    return engine->fixed_chunk ? engine->fixed_chunk : tuner->candidates[tuner->candidate].chunk_nbytes;
}

int zs_tuner_has_depth(const zs_engine *engine, const zs_tuner *tuner)
{
    if (engine->fixed_depth)
        return engine->in_flight < engine->fixed_depth;
    int64_t chunk_nbytes = tuner->candidates[tuner->candidate].chunk_nbytes;
    int depth = tuner->candidates[tuner->candidate].depth; /* of whole chunks; small requests go as many bytes deep */
    return tuner->in_flight < depth ||
           (tuner->in_flight < MOST_SMALL && tuner->in_flight_nbytes + chunk_nbytes <= depth * chunk_nbytes);
}

static double median(const double rates[ROUNDS])
{
    double a = rates[0], b = rates[1], c = rates[2];
    double low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c > high ? high : c;
}

static void begin_window(zs_tuner *tuner)
{
    tuner->skip = tuner->in_flight;
    tuner->window_nbytes = 0;
    tuner->window_start = 0; /* the clock starts with the first transfer that ends under this candidate */
}

static void settle(zs_tuner *tuner)
{
    int best = 0;
    for (int i = 1; i < tuner->count; i++)
        if (median(tuner->candidates[i].rates) > median(tuner->candidates[best].rates))
            best = i;
    int keep = median(tuner->candidates[best].rates) < 1.05 * median(tuner->candidates[0].rates);
    tuner->candidate = keep ? 0 : best;
    tuner->settled = 1;
}

void zs_tuner_count(zs_engine *engine, zs_tuner *tuner, int64_t nbytes, int saturated, int alone)
{
    (void)engine;
    if (tuner->settled)
        return;
    if (!saturated || !alone) {
        begin_window(tuner);
        return;
    }
    if (tuner->skip > 0) {
        tuner->skip--;
        return;
    }
    if (!tuner->window_start) {
        tuner->window_start = zs_now();
        return;
    }
    tuner->window_nbytes += nbytes;
    if (tuner->window_nbytes < WINDOW_NBYTES)
        return;
    double seconds = zs_now() - tuner->window_start;
    tuner->candidates[tuner->candidate].rates[tuner->round] = (double)tuner->window_nbytes / (seconds > 0 ? seconds : 1e-9);
    tuner->candidates[tuner->candidate].windows++;
    if (++tuner->candidate == tuner->count) {
        tuner->candidate = 0;
        if (++tuner->round == ROUNDS) {
            settle(tuner);
            return;
        }
    }
    begin_window(tuner);
}

int zs_engine_calibrations(zs_engine *engine, zs_calibration *found, int capacity)
{
    int n = 0;
    pthread_mutex_lock(&engine->mutex);
    for (zs_tuner *t = engine->tuners; t; t = t->next, n++) {
        if (n >= capacity)
            continue;
        zs_calibration *c = &found[n];
        *c = (zs_calibration){.device = t->device, .direction = t->direction, .settled = t->settled,
                              .candidates = engine->fixed_depth || engine->backend >= ZS_THREADS ? 0 : t->count};
        c->chunk_nbytes = zs_tuner_chunk(engine, t);
        c->depth = engine->backend >= ZS_THREADS ? engine->thread_count
                   : engine->fixed_depth        ? engine->fixed_depth
                                                : t->candidates[t->candidate].depth;
        for (int i = 0; i < c->candidates; i++) {
            c->tried[i].chunk_nbytes = t->candidates[i].chunk_nbytes;
            c->tried[i].depth = t->candidates[i].depth;
            c->tried[i].windows = t->candidates[i].windows;
            double best = 0; /* of the rounds so far, the middle one once there are three */
            for (int r = 0; r < t->candidates[i].windows && r < ROUNDS; r++)
                best = t->candidates[i].rates[r] > best ? t->candidates[i].rates[r] : best;
            c->tried[i].gb_per_s = 1e-9 * (t->candidates[i].windows >= ROUNDS ? median(t->candidates[i].rates) : best);
        }
    }
    pthread_mutex_unlock(&engine->mutex);
    return n;
}
