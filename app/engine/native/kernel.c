/* One forward step of a Llama-family decoder over a ragged batch, on x86-64 with AVX2 and FMA.
 *
 * Every number of a row is computed in an order that depends on that row alone, so a row's logits are the same bits
 * whatever else is in the batch, however its prompt was chunked and whichever thread did it:
 *   - an output of a product accumulates over k upwards, with one FMA a term, for any number of rows;
 *   - a query goes over its keys by position upwards;
 *   - everything else works on one row at a time.
 * It needs -ffp-contract=off: the compiler must not decide per call site which multiplications it fuses.
 */
#include "attention.h"
#include "products.h"

/* ---- The step: phases in order, each cut into chunks that any thread takes ---- */

INLINE Kind phase_kind(const Decoder *d, int phase) {
    if (phase == 0) return EMBED;
    if (phase >= d->num_phases - 2) return phase == d->num_phases - 1 ? HEAD : FINAL_NORM;
    return (Kind)(NORM + (phase - 1) % KINDS_PER_LAYER);
}

/* Rows of a phase: behind the last layer's keys and values only those that want logits. */
INLINE int phase_rows(const Decoder *d, int phase) {
    int first_of_last_layer = 1 + (d->model.num_layers - 1) * KINDS_PER_LAYER;
    return phase >= first_of_last_layer + (ATTEND - NORM) ? d->num_logits : d->num_rows;
}

static const Matrix *phase_matrix(const Decoder *d, Kind kind, int layer) {
    const Layer *l = &d->model.layers[layer];
    switch (kind) {
        case QKV: return &l->qkv;
        case O: case QUANT_O: return &l->o;
        case GATE_UP: return &l->gate_up;
        case DOWN: case QUANT_DOWN: return &l->down;
        case HEAD: return &d->model.head;
        default: return NULL;
    }
}

/* What a phase has to do, in units (rows, panels, or blocks of queries per key/value head), and units per chunk. */
static int phase_units(const Decoder *d, int phase, int *per_chunk) {
    int rows = phase_rows(d, phase), units = rows, heads;
    Kind kind = phase_kind(d, phase);
    const Matrix *m;
    *per_chunk = ROWS_PER_CHUNK;
    switch (kind) {
        case QUANT_O: case QUANT_DOWN:
            units = d->model.quantized ? rows : 0;
            break;
        case ATTEND:
            units = (rows == d->num_rows ? d->num_blocks : d->num_last_blocks) * d->model.kv_heads;
            /* One thread reads all heads of a block, unless there are too few blocks for all threads. */
            heads = d->model.kv_heads;
            *per_chunk = units < 4 * d->num_threads * heads ? (heads + d->num_threads - 1) / d->num_threads : heads;
            break;
        case QKV: case O: case GATE_UP: case DOWN: case HEAD:
            m = phase_matrix(d, kind, 0);
            units = rows ? m->n / PANEL : 0;
            *per_chunk = max_int(1, min_int(16, units / (d->num_threads * 8)));
            break;
        default:
            break;
    }
    *per_chunk = max_int(*per_chunk, units / MAX_CHUNKS + 1);
    return units;
}

static void run_rows(Decoder *d, Kind kind, int layer, int from, int to) {
    const Model *m = &d->model;
    const Layer *l = &m->layers[layer];
    const size_t hidden = pad16(m->hidden);
    for (int row = from; row < to; row++) {
        float *x = d->x + row * hidden, *normed = d->normed + row * hidden;
        int16_t *q = d->quantized;
        switch (kind) {
            case EMBED: {
                const Span *s = &d->spans[d->row_span[row]];
                size_t i = d->row_position[row] - s->start;
                const float *source = s->embeddings ? s->embeddings + i * m->hidden
                                                    : m->embedding + (size_t)d->ids[s->ids + i] * m->hidden;
                memcpy(x, source, m->hidden * sizeof(float));
                break;
            }
            case ROPE:
                rope_row(d, layer, row);
                break;
            case QUANT_O:
                quantize(d->attended + row * pad16(l->o.k), q + row * pad16(l->o.k), &d->row_scale[row], l->o.k);
                break;
            case QUANT_DOWN:
                quantize(d->gated + row * pad16(l->down.k), q + row * pad16(l->down.k), &d->row_scale[row], l->down.k);
                break;
            default:
                rms_norm(x, kind == NORM ? l->attention_norm : kind == MLP_NORM ? l->mlp_norm : m->norm, normed,
                         m->hidden, m->eps);
                if (m->quantized) quantize(normed, q + row * hidden, &d->row_scale[row], m->hidden);
        }
    }
}

/* Rows of scores that a thread needs at once: a block's queries of one head, or one query's heads. */
INLINE size_t score_rows(const Model *m) { return max_int(m->num_heads, QUERY_BLOCK * (m->num_heads / m->kv_heads)); }

static void run_chunk(Decoder *d, const int phase, const int chunk, const int thread) {
    const Model *m = &d->model;
    const Kind kind = phase_kind(d, phase);
    const int layer = kind >= NORM && kind <= DOWN ? (phase - 1) / KINDS_PER_LAYER : 0;
    const Layer *l = &m->layers[layer];
    int per_chunk, units = phase_units(d, phase, &per_chunk), rows = phase_rows(d, phase);
    const int from = chunk * per_chunk, to = min_int(from + per_chunk, units);
    const size_t hidden = pad16(m->hidden);
    switch (kind) {
        case QKV:
            product(d, &l->qkv, d->normed, rows, (Target){STORE, d->qkv, l->qkv.n, l->qkv.n}, from, to);
            break;
        case O:
            product(d, &l->o, d->attended, rows, (Target){ADD, d->x, hidden, hidden}, from, to);
            break;
        case GATE_UP:
            product(d, &l->gate_up, d->normed, rows, (Target){GATE, d->gated, pad16(m->intermediate), 0}, from, to);
            break;
        case DOWN:
            product(d, &l->down, d->gated, rows, (Target){ADD, d->x, hidden, hidden}, from, to);
            break;
        case HEAD:
            product(d, &m->head, d->normed, rows, (Target){STORE, d->logits, m->vocab, m->vocab}, from, to);
            break;
        case ATTEND: {
            const QueryBlock *blocks = rows == d->num_rows ? d->blocks : d->last_blocks;
            for (int i = from, next; i < to; i = next) {
                const QueryBlock *block = &blocks[i / m->kv_heads];
                const int head = i % m->kv_heads;
                /* Several queries share what they read of one head: then its scores fill the scratch memory. */
                const int last = block->count > 1 ? head + 1 : min_int(m->kv_heads, head + to - i);
                attend(d, layer, block, head, last, d->scores + thread * score_rows(m) * d->score_stride + 8);
                next = i + last - head;
            }
            break;
        }
        default:
            run_rows(d, kind, layer, from, to);
    }
}

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

/* ---- The batch ---- */

static int check(const Model *m, const Span *spans, int num_spans, const int32_t *tables, const int32_t *ids) {
    for (int i = 0; i < num_spans; i++) {
        const Span *s = &spans[i];
        if (s->start < 0 || s->end <= s->start || s->end > m->max_positions || s->num_logits < 0 ||
            s->num_logits > s->end - s->start)
            return BAD_POSITION;
        if (s->num_blocks * m->block_size < s->end) return BAD_BLOCK;
        for (int64_t b = 0; b * m->block_size < s->end; b++)
            if (tables[s->table + b] < 0 || tables[s->table + b] >= m->num_blocks) return BAD_BLOCK;
        for (int64_t j = 0; !s->embeddings && j < s->end - s->start; j++)
            if (ids[s->ids + j] < 0 || ids[s->ids + j] >= m->vocab) return BAD_TOKEN;
    }
    return OK;
}

static bool grow(void *pointer, size_t bytes) {
    void **p = pointer;
    free(*p);
    *p = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (*p) memset(*p, 0, bytes);
    return *p != NULL;
}

static bool reserve(Decoder *d, size_t rows, size_t context) {
    const Model *m = &d->model;
    const Layer *l = m->layers;
    if (context + 32 > d->score_stride) {
        d->score_stride = 0;
        size_t stride = pad16(context + context / 2 + 32);
        if (!grow(&d->scores, d->num_threads * score_rows(m) * stride * sizeof(float))) return false;
        d->score_stride = stride;
    }
    if (rows > d->row_capacity) {
        d->row_capacity = 0;
        size_t width = max_int(pad16(m->hidden), max_int(pad16(l->o.k), pad16(m->intermediate)));
        if (!grow(&d->x, rows * pad16(m->hidden) * sizeof(float)) ||
            !grow(&d->normed, rows * pad16(m->hidden) * sizeof(float)) ||
            !grow(&d->qkv, rows * l->qkv.n * sizeof(float)) ||
            !grow(&d->attended, rows * pad16(l->o.k) * sizeof(float)) ||
            !grow(&d->gated, rows * pad16(m->intermediate) * sizeof(float)) ||
            !grow(&d->quantized, m->quantized ? rows * width * sizeof(int16_t) : 64) ||
            !grow(&d->row_scale, rows * sizeof(float)) || !grow(&d->row_span, rows * sizeof(int32_t)) ||
            !grow(&d->row_position, rows * sizeof(int32_t)) || !grow(&d->logit_row, rows * sizeof(int32_t)) ||
            !grow(&d->blocks, rows * sizeof(QueryBlock)) || !grow(&d->last_blocks, rows * sizeof(QueryBlock)))
            return false;
        d->row_capacity = rows;
    }
    return true;
}

/* Blocks for positions [from, end) of a span, whose queries stand from `query_row` on; returns how many. */
static int query_blocks(QueryBlock *blocks, int span, int from, int end, int query_row, int out_row) {
    int count = 0;
    for (int first = from; first < end; first += QUERY_BLOCK)
        blocks[count++] = (QueryBlock){span, first, min_int(QUERY_BLOCK, end - first), query_row + first - from,
                                       out_row + first - from};
    return count;
}

static void lay_out(Decoder *d) {
    int row = 0, logit = 0;
    d->num_blocks = d->num_last_blocks = 0;
    for (int i = 0; i < d->num_spans; i++) {
        const Span *s = &d->spans[i];
        int start = (int)s->start, end = (int)s->end, from = end - (int)s->num_logits;
        d->num_blocks += query_blocks(d->blocks + d->num_blocks, i, start, end, row, row);
        d->num_last_blocks +=
            query_blocks(d->last_blocks + d->num_last_blocks, i, from, end, row + from - start, logit);
        for (int position = start; position < end; position++, row++) {
            d->row_span[row] = i;
            d->row_position[row] = position;
            if (position >= from) d->logit_row[logit++] = row;
        }
    }
}

EXPORT int softprompt_step(Decoder *d, const Span *spans, int num_spans, const int32_t *tables, const int32_t *ids,
                           float *logits) {
    int error = check(&d->model, spans, num_spans, tables, ids);
    if (error) return error;
    int64_t rows = 0, wanted = 0, context = 0;
    for (int i = 0; i < num_spans; i++) {
        rows += spans[i].end - spans[i].start;
        wanted += spans[i].num_logits;
        context = spans[i].end > context ? spans[i].end : context;
    }
    if (rows == 0) return OK;
    if (rows > INT32_MAX / 2 || !reserve(d, rows, context)) return NO_MEMORY;
    d->spans = spans, d->num_spans = num_spans, d->tables = tables, d->ids = ids, d->logits = logits;
    d->num_rows = (int)rows, d->num_logits = (int)wanted;
    lay_out(d);
    d->step++;
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
    return OK;
}

/* ---- Life of a decoder ---- */

EXPORT void softprompt_destroy(Decoder *d) {
    if (!d) return;
    pthread_mutex_lock(&d->mutex);
    d->closing = true;
    pthread_cond_broadcast(&d->wake);
    pthread_mutex_unlock(&d->mutex);
    for (int i = 0; i < d->num_workers; i++) pthread_join(d->workers[i].thread, NULL);
    pthread_mutex_destroy(&d->mutex);
    pthread_cond_destroy(&d->wake);
    void *owned[] = {d->x, d->normed, d->qkv, d->attended, d->gated, d->quantized, d->row_scale, d->scores,
                     d->row_span, d->row_position, d->logit_row, d->blocks, d->last_blocks, d->workers, d};
    for (size_t i = 0; i < sizeof owned / sizeof *owned; i++) free(owned[i]);
}

/* `model` is copied; what it points to must outlive the decoder. NULL if memory or threads are short. */
EXPORT Decoder *softprompt_create(const Model *model, int num_threads) {
    Decoder *d = aligned_alloc(64, (sizeof *d + 63) / 64 * 64);
    if (!d) return NULL;
    memset(d, 0, sizeof *d);
    d->model = *model;
    d->num_phases = 1 + model->num_layers * KINDS_PER_LAYER + 2;
    d->num_threads = num_threads;
    pthread_mutex_init(&d->mutex, NULL);
    pthread_cond_init(&d->wake, NULL);
    atomic_init(&d->remaining, 0);
    atomic_init(&d->ticket, ticket_of(0, d->num_phases, 0));
    d->workers = calloc(num_threads, sizeof *d->workers);
    /* Signals are for Python's threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = d->workers && d->num_phases < MAX_PHASES;
    for (int i = 1; ok && i < num_threads; i++) {
        Worker *w = &d->workers[d->num_workers];
        *w = (Worker){.decoder = d, .index = i};
        ok = pthread_create(&w->thread, NULL, worker_main, w) == 0;
        d->num_workers += ok;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (ok) return d;
    softprompt_destroy(d);
    return NULL;
}

/* Large pages save address translations. For memory that nobody has touched yet. */
EXPORT void softprompt_use_large_pages(void *memory, size_t bytes) {
    const uintptr_t page = 2 << 20;
    uintptr_t from = ((uintptr_t)memory + page - 1) / page * page, to = ((uintptr_t)memory + bytes) / page * page;
    if (to > from) madvise((void *)from, to - from, MADV_HUGEPAGE);
}

#ifdef PROFILE
/* CPU time by kind of phase; with one thread only. */
EXPORT uint64_t *softprompt_profile(Decoder *d) { return d->nanoseconds; }
#endif
