/* The threads that run a step's phases. Who finishes a phase opens the next one. */
#pragma once
#include "phases.h"

/* Open `phase` to all threads, or the next one that has work. What is a single chunk is done here and now, by the
 * thread that finished the phase before: at few rows a handover would cost more than the work. */
static void advance(Decoder *d, int phase, int thread) {
    for (;; phase++) {
        int chunks = 0;
#ifdef PROFILE
        struct timespec t;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        uint64_t now = t.tv_sec * 1000000000ull + t.tv_nsec;
        if (phase > 0) d->nanoseconds[phase_kind(d, phase - 1)] += now - d->opened;
        d->opened = now;
#endif
        if (phase < d->num_phases) {
            /* Rows that want no logits end here; the residuals of the others move up. */
            if (phase_rows(d, phase) != d->num_rows && phase_kind(d, phase) == ATTEND)
                for (int i = 0; i < d->num_logits; i++)
                    memmove(d->x + i * pad16(d->model.hidden), d->x + d->logit_row[i] * pad16(d->model.hidden),
                            d->model.hidden * sizeof(float));
            int per_chunk, units = phase_units(d, phase, &per_chunk);
            chunks = (units + per_chunk - 1) / per_chunk;
            if (chunks == 0) continue;
            if (chunks == 1) {
                run_chunk(d, phase, 0, thread);
                continue;
            }
        }
        atomic_store_explicit(&d->remaining, chunks, memory_order_relaxed);
        atomic_store_explicit(&d->ticket, ticket_of(d->step, phase, chunks), memory_order_release);
        return;
    }
}

/* Take one chunk of the open phase and run it; false if there is none to take. */
static bool work(Decoder *d, int thread) {
    uint64_t t = atomic_load_explicit(&d->ticket, memory_order_acquire);
    if ((t & MAX_CHUNKS) >= (t >> 16 & MAX_CHUNKS)) return false;
    if (!atomic_compare_exchange_strong_explicit(&d->ticket, &t, t + 1, memory_order_acq_rel, memory_order_relaxed))
        return true;
    int phase = (int)(t >> 32 & MAX_PHASES);
    run_chunk(d, phase, (int)(t & MAX_CHUNKS), thread);
    if (atomic_fetch_sub_explicit(&d->remaining, 1, memory_order_acq_rel) == 1) advance(d, phase + 1, thread);
    return true;
}

INLINE bool is_idle(const Decoder *d) {
    uint64_t t = atomic_load_explicit(&d->ticket, memory_order_acquire);
    return (int)(t >> 32 & MAX_PHASES) >= d->num_phases;
}

/* Between phases a wait is short; on a machine with other work it may not be, so the core is offered to that. */
INLINE void relax(int *waits) {
    if (++*waits % 1024) _mm_pause();
    else sched_yield();
}

/* Rounding as ever, tiny numbers are 0: in every thread the same, whatever the caller has set. */
enum { FLOAT_MODE = 0x9fc0 };

static void *worker_main(void *argument) {
    Worker *self = argument;
    Decoder *d = self->decoder;
    _mm_setcsr(FLOAT_MODE);
    for (;;) {
        pthread_mutex_lock(&d->mutex);
        while (is_idle(d) && !d->closing) pthread_cond_wait(&d->wake, &d->mutex);
        bool closing = d->closing;
        pthread_mutex_unlock(&d->mutex);
        if (closing) return NULL;
        for (int waits = 0; !is_idle(d);)
            if (work(d, self->index)) waits = 0;
            else relax(&waits);
    }
}

/* The whole step, in the caller's thread and the workers; the caller's float mode is as before afterwards. */
static void run_all_phases(Decoder *d) {
    const unsigned int mode = _mm_getcsr();
    _mm_setcsr(FLOAT_MODE);
    advance(d, 0, 0);
    if (d->num_workers && !is_idle(d)) {
        pthread_mutex_lock(&d->mutex);
        pthread_cond_broadcast(&d->wake);
        pthread_mutex_unlock(&d->mutex);
    }
    for (int waits = 0; !is_idle(d);)
        if (work(d, 0)) waits = 0;
        else relax(&waits);
    _mm_setcsr(mode);
}

/* num_threads - 1 of them; false if memory or threads are short. Either way `stop_workers` has to follow. */
static bool start_workers(Decoder *d) {
    pthread_mutex_init(&d->mutex, NULL);
    pthread_cond_init(&d->wake, NULL);
    atomic_init(&d->remaining, 0);
    atomic_init(&d->ticket, ticket_of(0, d->num_phases, 0));
    d->workers = calloc(d->num_threads, sizeof *d->workers);
    /* Signals are for Python's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = d->workers != NULL;
    for (int i = 1; ok && i < d->num_threads; i++) {
        Worker *w = &d->workers[d->num_workers];
        *w = (Worker){.decoder = d, .index = i};
        ok = pthread_create(&w->thread, NULL, worker_main, w) == 0;
        d->num_workers += ok;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return ok;
}

static void stop_workers(Decoder *d) {
    pthread_mutex_lock(&d->mutex);
    d->closing = true;
    pthread_cond_broadcast(&d->wake);
    pthread_mutex_unlock(&d->mutex);
    for (int i = 0; i < d->num_workers; i++) pthread_join(d->workers[i].thread, NULL);
    pthread_mutex_destroy(&d->mutex);
    pthread_cond_destroy(&d->wake);
}
