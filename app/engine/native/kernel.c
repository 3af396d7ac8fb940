/* One forward step of a Llama-family decoder over a ragged batch, on x86-64 with AVX2 and FMA.
 *
 * Every number of a row is computed in an order that depends on that row alone, so a row's logits are the same bits
 * whatever else is in the batch, however its prompt was chunked and whichever thread did it:
 *   - an output of a product accumulates over k upwards, for any number of rows: in float with one FMA a term, in
 *     int8 exactly over 4096 inputs at a time;
 *   - a query goes over its keys by position upwards;
 *   - everything else works on one row at a time.
 * It needs -ffp-contract=off: the compiler must not decide per call site which multiplications it fuses.
 */
#include "pool.h"

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
    run_all_phases(d);
    return OK;
}

/* ---- Life of a decoder ---- */

EXPORT void softprompt_destroy(Decoder *d) {
    if (!d) return;
    stop_workers(d);
    void *owned[] = {d->x, d->normed, d->qkv, d->attended, d->gated, d->quantized, d->row_scale, d->scores,
                     d->expanded, d->row_span, d->row_position, d->logit_row, d->blocks, d->last_blocks, d->workers, d};
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
    const Layer *l = model->layers;
    d->expanded_stride = PANEL * pad16(max_int(model->hidden, max_int(l->o.k, model->intermediate)));
    bool ok = grow(&d->expanded, num_threads * d->expanded_stride * sizeof(float));
    if (start_workers(d) && ok && d->num_phases < MAX_PHASES) return d;
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
