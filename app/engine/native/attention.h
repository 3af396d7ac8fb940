/* Norms, rotary positions and attention over the paged cache. */
#pragma once
#include "vector.h"

/* Inputs and weights are padded with zeros, so whole vectors do. */
static void rms_norm(const float *x, const float *weight, float *out, size_t n, float eps) {
    __m256 squares = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        squares = _mm256_fmadd_ps(v, v, squares);
    }
    __m256 scale = _mm256_set1_ps(1.0f / sqrtf(sum8(squares) / (float)n + eps));
    for (size_t i = 0; i < n; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), scale);
        _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_loadu_ps(weight + i), v));
    }
}

/* The two halves of a head turn against each other; scaled on the way. */
static void rotate(float *head, const float *cos, const float *sin, int half, float scale) {
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = (a * cos[i] - b * sin[i]) * scale;
        head[i + half] = (b * cos[i] + a * sin[i]) * scale;
    }
}

INLINE size_t kv_width(const Model *m) { return (size_t)m->kv_heads * m->head_dim; }

/* Keys of a layer; its values follow at `kv_plane`. */
INLINE size_t kv_plane(const Model *m) { return (size_t)m->num_blocks * m->block_size * kv_width(m); }

INLINE size_t slot_of(const Decoder *d, const Span *span, int position) {
    const Model *m = &d->model;
    return (size_t)d->tables[span->table + position / m->block_size] * m->block_size + position % m->block_size;
}

/* Norms of heads, rotation; keys and values go to the cache, queries stay where they are. */
static void rope_row(const Decoder *d, int layer_index, int row) {
    const Model *m = &d->model;
    const Layer *layer = &m->layers[layer_index];
    int dim = m->head_dim, half = dim / 2, position = d->row_position[row];
    const float *cos = m->cos + (size_t)position * half, *sin = m->sin + (size_t)position * half;
    float *q = d->qkv + row * pad16(m->layers->qkv.n), *k = q + (size_t)m->num_heads * dim;
    for (int h = 0; h < m->num_heads; h++, q += dim) {
        if (layer->q_norm) rms_norm(q, layer->q_norm, q, dim, m->eps);
        rotate(q, cos, sin, half, m->attention_scale);
    }
    size_t width = kv_width(m), slot = slot_of(d, &d->spans[d->row_span[row]], position);
    float *keys = m->kv + 2 * layer_index * kv_plane(m) + slot * width;
    memcpy(keys + kv_plane(m), k + width, width * sizeof(float));
    for (int h = 0; h < m->kv_heads; h++, k += dim) {
        if (layer->k_norm) rms_norm(k, layer->k_norm, k, dim, m->eps);
        rotate(k, cos, sin, half, 1.0f);
        memcpy(keys + h * dim, k, dim * sizeof(float));
    }
}

/* ---- Attention ---- */

/* Scores of up to 3 query heads against n keys, 4 at a time. The last group repeats the last key: nothing behind a
 * row's end is read. `out` has room for 3 floats more. */
INLINE void score(const int heads, const float *q, size_t dim, const float *keys, const size_t *offsets, int n,
                  float *out, size_t stride) {
    for (int j = 0; j < n; j += 4) {
        const float *k[4];
        __m256 acc[3][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) k[i] = keys + offsets[min_int(j + i, n - 1)];
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) acc[h][i] = _mm256_setzero_ps();
        for (size_t c = 0; c < dim; c += 8)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m256 key = _mm256_loadu_ps(k[i] + c);
#pragma GCC unroll 3
                for (int h = 0; h < heads; h++)
                    acc[h][i] = _mm256_fmadd_ps(_mm256_loadu_ps(q + h * dim + c), key, acc[h][i]);
            }
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++) {
            __m256 s = _mm256_hadd_ps(_mm256_hadd_ps(acc[h][0], acc[h][1]), _mm256_hadd_ps(acc[h][2], acc[h][3]));
            _mm_storeu_ps(out + h * stride + j, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
        }
    }
}

/* out += sum over n keys of p * value, `vectors` registers of every head at once. */
INLINE void mix_columns(const int heads, const int vectors, const float *p, size_t stride, const float *values,
                        const size_t *offsets, int n, float *out, size_t dim) {
    __m256 acc[3][4];
#pragma GCC unroll 3
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) acc[h][i] = _mm256_loadu_ps(out + h * dim + 8 * i);
    for (int j = 0; j < n; j++) {
        const float *value = values + offsets[j];
        __m256 w[3];
#pragma GCC unroll 3
        for (int h = 0; h < heads; h++) w[h] = _mm256_broadcast_ss(p + h * stride + j);
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) {
            __m256 v = _mm256_loadu_ps(value + 8 * i);
#pragma GCC unroll 3
            for (int h = 0; h < heads; h++) acc[h][i] = _mm256_fmadd_ps(w[h], v, acc[h][i]);
        }
    }
#pragma GCC unroll 3
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int i = 0; i < vectors; i++) _mm256_storeu_ps(out + h * dim + 8 * i, acc[h][i]);
}

INLINE void mix(const int heads, const float *p, size_t stride, const float *values, const size_t *offsets, int n,
                float *out, size_t dim) {
    size_t c = 0;
    for (; c + 32 <= dim; c += 32) mix_columns(heads, 4, p, stride, values + c, offsets, n, out + c, dim);
    for (; c < dim; c += 8) mix_columns(heads, 1, p, stride, values + c, offsets, n, out + c, dim);
}

/* Scores to weights that are not yet divided by their sum, which is returned. `s` has room for 7 floats more. */
static float softmax(float *s, int n) {
    for (int i = n; i < n + 7; i++) s[i] = -INFINITY;
    __m256 top = _mm256_loadu_ps(s);
    for (int i = 8; i < n; i += 8) top = _mm256_max_ps(top, _mm256_loadu_ps(s + i));
    float lanes[8], largest = -INFINITY;
    _mm256_storeu_ps(lanes, top);
    for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
    __m256 sum = _mm256_setzero_ps(), shift = _mm256_set1_ps(largest);
    for (int i = 0; i < n; i += 8) {
        __m256 e = exp8(_mm256_sub_ps(_mm256_loadu_ps(s + i), shift));
        _mm256_storeu_ps(s + i, e);
        sum = _mm256_add_ps(sum, e);
    }
    return sum8(sum);
}

#define HEAD_COUNTS(CALL) \
    switch (min_int(3, group - h)) { \
        case 1: CALL(1); break; \
        case 2: CALL(2); break; \
        default: CALL(3); break; \
    }

/* The query heads of the key/value heads [head, last_head), for a few consecutive positions of one row. All heads of a
 * slot lie side by side: going over them together, in small steps, reads memory in order. */
static void attend(const Decoder *d, int layer_index, const QueryBlock *block, int head, int last_head, float *scores) {
    const Model *m = &d->model;
    const Span *span = &d->spans[block->span];
    const size_t dim = m->head_dim, width = kv_width(m), stride = d->score_stride;
    const float *keys = m->kv + 2 * layer_index * kv_plane(m), *values = keys + kv_plane(m);
    const int window = (int)m->layers[layer_index].window, group = m->num_heads / m->kv_heads;
    const size_t q_stride = pad16(m->layers->qkv.n), out_stride = pad16((size_t)m->num_heads * dim);
    const float *q = d->qkv + block->query_row * q_stride;
    float *out = d->attended + block->out_row * out_stride;
    const int end = block->first + block->count, begin = window ? max_int(0, block->first - window + 1) : 0;
    const int step = last_head - head > 1 ? KEY_TILE / 4 : KEY_TILE;
    size_t offsets[KEY_TILE];
    for (int pass = 0; pass < 2; pass++) {
        for (int tile = begin; tile < end; tile += step) {
            const int tile_end = min_int(tile + step, end);
            for (int j = tile; j < tile_end; j++) offsets[j - tile] = slot_of(d, span, j) * width;
            for (int kv = head; kv < last_head; kv++)
                for (int i = 0; i < block->count; i++) {
                    const int position = block->first + i, lowest = window ? max_int(0, position - window + 1) : 0;
                    const int from = max_int(lowest, tile), n = min_int(position + 1, tile_end) - from;
                    if (n <= 0) continue;
                    const size_t *where = offsets + (from - tile);
                    const float *k = keys + kv * dim, *v = values + kv * dim;
                    for (int h = 0; h < group; h += 3) {
                        const size_t column = ((size_t)kv * group + h) * dim;
                        const float *query = q + i * q_stride + column;
                        float *o = out + i * out_stride + column;
                        float *s = scores + (((kv - head) * block->count + i) * group + h) * stride + (from - lowest);
#define SCORE(count) score(count, query, dim, k, where, n, s, stride)
#define MIX(count) mix(count, s, stride, v, where, n, o, dim)
                        if (pass == 0)
                            HEAD_COUNTS(SCORE)
                        else
                            HEAD_COUNTS(MIX)
                    }
                }
        }
        for (int kv = head; kv < last_head; kv++)
            for (int i = 0; i < block->count; i++) {
                const int position = block->first + i, n = window ? min_int(window, position + 1) : position + 1;
                for (int h = 0; h < group; h++) {
                    float *o = out + i * out_stride + ((size_t)kv * group + h) * dim;
                    float *s = scores + (((kv - head) * block->count + i) * group + h) * stride;
                    if (pass == 0) {
                        s[-1] = softmax(s, n); /* the sum, in the gap before the row of scores */
                        memset(o, 0, dim * sizeof(float));
                    } else {
                        for (size_t c = 0; c < dim; c++) o[c] /= s[-1];
                    }
                }
            }
    }
}
