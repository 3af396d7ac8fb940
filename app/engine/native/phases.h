/* What a step does: phases in order, each cut into chunks that any thread takes. */
#pragma once
#include "attention.h"
#include "products.h"

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
    float *expanded = d->expanded + thread * d->expanded_stride;
    switch (kind) {
        case QKV:
            product(d, &l->qkv, d->normed, rows, (Target){STORE, d->qkv, l->qkv.n, l->qkv.n}, from, to, expanded);
            break;
        case O:
            product(d, &l->o, d->attended, rows, (Target){ADD, d->x, hidden, m->hidden}, from, to, expanded);
            break;
        case GATE_UP:
            product(d, &l->gate_up, d->normed, rows, (Target){GATE, d->gated, pad16(m->intermediate), 0}, from, to,
                    expanded);
            break;
        case DOWN:
            product(d, &l->down, d->gated, rows, (Target){ADD, d->x, hidden, m->hidden}, from, to, expanded);
            break;
        case HEAD:
            product(d, &m->head, d->normed, rows, (Target){STORE, d->logits, m->vocab, m->vocab}, from, to, expanded);
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
