/* Products with packed matrices, in float and in int8, and how matrices are packed. */
#pragma once
#include "storage.h"

typedef enum { STORE, ADD, GATE } Epilogue;

/* Where a product goes. `columns` is how many floats of a row may be written. */
typedef struct {
    Epilogue epilogue;
    float *out;
    size_t stride, columns;
} Target;

INLINE void finish(const Target *t, float *row, size_t panel, __m256 a, __m256 b) {
    if (t->epilogue == GATE) {
        _mm256_storeu_ps(row + panel * (PANEL / 2), _mm256_mul_ps(silu8(a), b));
        return;
    }
    float *out = row + panel * PANEL;
    if (t->epilogue == ADD) {
        a = _mm256_add_ps(_mm256_loadu_ps(out), a);
        b = _mm256_add_ps(_mm256_loadu_ps(out + 8), b);
    }
    if (panel * PANEL + PANEL <= t->columns) {
        _mm256_storeu_ps(out, a);
        _mm256_storeu_ps(out + 8, b);
    } else {
        float tail[PANEL];
        _mm256_storeu_ps(tail, a);
        _mm256_storeu_ps(tail + 8, b);
        memcpy(out, tail, (t->columns - panel * PANEL) * sizeof(float));
    }
}

/* Weights that memory is asked for while others are used: from `next` on, `advance` bytes in a turn of the loop. */
typedef struct {
    const char *next;
    size_t advance;
} Ahead;

enum { NEAR = 2048 }; /* bytes between what is asked for and what is used, of floats */

INLINE void ask(Ahead *ahead) {
    _mm_prefetch(ahead->next, _MM_HINT_T0);
    ahead->next += ahead->advance;
}

/* One pass over a panel, `step` bytes in a turn, asks for what comes `near` behind it. Several passes ask for a share
 * of the next panel each, so that memory is as busy while the panel is used again as it was in the first pass. */
INLINE Ahead ahead_of(const char *panel, size_t panel_bytes, size_t step, size_t near, int pass, int passes) {
    if (passes == 1) return (Ahead){panel + near, step};
    return (Ahead){panel + panel_bytes + panel_bytes / passes * pass, step / passes};
}

/* What input `k` adds to the sums: its weights are w[halves], 8 columns each. */
INLINE void add_input(const int rows, const int halves, __m256 acc[][4], const float *a, size_t lda, size_t k,
                      const __m256 *w, float *keep) {
    if (keep)
#pragma GCC unroll 4
        for (int h = 0; h < halves; h++) _mm256_store_ps(keep + k * PANEL + 8 * h, w[h]);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m256 x = _mm256_broadcast_ss(a + r * lda + k);
#pragma GCC unroll 4
        for (int h = 0; h < halves; h++) acc[r][h] = _mm256_fmadd_ps(x, w[h], acc[r][h]);
    }
}

/* Rows from `a` times the panel at `w`; or one row times two panels of BLOCKS, whose four sums wait less for the FMA
 * before (the other storages wait for memory instead). `ahead` is for float panels; the compact ones ask for a group at
 * a time. `keep`: where the weights are wanted in float, too, for the blocks of rows that follow. */
INLINE void product_f32(const int rows, const int panels, const Storage storage, const float *a, size_t lda,
                        const Matrix *m, const char *w, size_t panel, const Target *t, float *out, Ahead ahead,
                        float *keep) {
    const int halves = 2 * panels;
    const size_t end = (size_t)m->k, size = panel_bytes(storage, end);
    const char *const next_panel = w + size;
    __m256 acc[MAX_ROWS][4], now[4];
#define EACH_HALF _Pragma("GCC unroll 4") for (int h = 0; h < halves; h++)
#define AT(h) w + (h) / 2 * size, (h) % 2
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) EACH_HALF acc[r][h] = _mm256_setzero_ps();
    for (size_t k = 0; storage == FLOAT32 && k < end; k++, w += PANEL * sizeof(float)) {
        ask(&ahead);
        EACH_HALF now[h] = load_float(AT(h));
        add_input(rows, halves, acc, a, lda, k, now, NULL);
    }
    for (size_t k = 0; storage != FLOAT32 && k < end;) {
        const size_t stop = k + GROUP < end ? k + GROUP : end;
        const char *next = w + NEAR;
        if (panels == 2 && next >= next_panel) next += size;
        for (size_t line = 0; line < panel_bytes(storage, GROUP); line += 64)
            for (int p = 0; p < panels; p++) _mm_prefetch(next + p * size + line, _MM_HINT_T0);
        if (storage == BFLOAT16) {
            for (; k < stop; k++, w += PANEL * sizeof(uint16_t)) {
                EACH_HALF now[h] = load_bfloat16(AT(h));
                add_input(rows, halves, acc, a, lda, k, now, keep);
            }
            continue;
        }
        Affine affine[4];
        EACH_HALF affine[h] = load_affine(AT(h));
        w += AFFINE_BYTES;
        for (; k < stop; k++, w += PANEL) {
            EACH_HALF now[h] = weights(load_codes(AT(h)), affine[h]);
            add_input(rows, halves, acc, a, lda, k, now, keep);
        }
    }
#undef AT
#undef EACH_HALF
    for (int p = 0; p < panels; p++) {
        const float *bias = m->bias + (panel + p) * PANEL;
        __m256 b0 = _mm256_loadu_ps(bias), b1 = _mm256_loadu_ps(bias + 8);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++)
            finish(t, out + r * t->stride, panel + p, _mm256_add_ps(acc[r][2 * p], b0),
                   _mm256_add_ps(acc[r][2 * p + 1], b1));
    }
}

/* GCC would keep a second copy of every sum in the loop, and run out of registers. */
INLINE __m256i add_in_place(__m256i sum, __m256i term) {
    __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(term));
    return sum;
}

/* Inputs, in pairs, whose products are summed in int32: 4096, for which activations keep 13 bits. */
enum { EXACT_PAIRS = 2048 };

/* Sums of int16 x int8 products in int32, exact (see `activation_limit`); longer ones go on in float, upwards. */
INLINE void product_i8(const int rows, const int16_t *a, size_t lda, const float *a_scale, const Matrix *m,
                       const int8_t *w, size_t panel, const Target *t, float *out, Ahead ahead) {
    size_t pairs = ((size_t)m->k + 1) / 2;
    __m256i acc[MAX_ROWS][2];
    __m256 sum[MAX_ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm256_setzero_ps();
    for (size_t k = 0, end; k < pairs;) {
        if (k)
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                sum[r][0] = _mm256_add_ps(sum[r][0], _mm256_cvtepi32_ps(acc[r][0]));
                sum[r][1] = _mm256_add_ps(sum[r][1], _mm256_cvtepi32_ps(acc[r][1]));
                acc[r][0] = acc[r][1] = _mm256_setzero_si256();
            }
        for (end = k + EXACT_PAIRS < pairs ? k + EXACT_PAIRS : pairs; k < end; k++, w += 2 * PANEL) {
            __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)w));
            __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + 16)));
            ask(&ahead);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                int32_t pair;
                memcpy(&pair, a + r * lda + 2 * k, sizeof pair);
                __m256i x = _mm256_set1_epi32(pair);
                acc[r][0] = add_in_place(acc[r][0], _mm256_madd_epi16(x, w0));
                acc[r][1] = add_in_place(acc[r][1], _mm256_madd_epi16(x, w1));
            }
        }
    }
    const float *bias = m->bias + panel * PANEL, *scale = m->scale + panel * PANEL;
    __m256 b0 = _mm256_loadu_ps(bias), b1 = _mm256_loadu_ps(bias + 8);
    __m256 s0 = _mm256_loadu_ps(scale), s1 = _mm256_loadu_ps(scale + 8);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        __m256 s = _mm256_set1_ps(a_scale[r]);
        __m256 y0 = _mm256_add_ps(sum[r][0], _mm256_cvtepi32_ps(acc[r][0]));
        __m256 y1 = _mm256_add_ps(sum[r][1], _mm256_cvtepi32_ps(acc[r][1]));
        y0 = _mm256_mul_ps(_mm256_mul_ps(y0, s), s0);
        y1 = _mm256_mul_ps(_mm256_mul_ps(y1, s), s1);
        finish(t, out + r * t->stride, panel, _mm256_add_ps(y0, b0), _mm256_add_ps(y1, b1));
    }
}

#define ROW_COUNTS(CALL) \
    switch (rows) { \
        case 1: CALL(1); break; \
        case 2: CALL(2); break; \
        case 3: CALL(3); break; \
        case 4: CALL(4); break; \
        case 5: CALL(5); break; \
        default: CALL(6); break; \
    }

/* A block of rows times one panel, or one row times two. */
INLINE void pass_f32(const Storage storage, int rows, int panels, const float *a, size_t lda, const Matrix *m,
                     const char *w, size_t panel, const Target *t, float *out, Ahead ahead, float *keep) {
#define CALL(count) product_f32(count, 1, storage, a, lda, m, w, panel, t, out, ahead, keep)
    if (panels == 1 || storage != BLOCKS) ROW_COUNTS(CALL)
    else product_f32(1, 2, storage, a, lda, m, w, panel, t, out, ahead, NULL);
#undef CALL
}

/* Panels [from, to) for all rows: a panel comes from memory once, and the rows pass over it. Where it takes several
 * passes, the first one leaves the weights in `expanded`, in float, for the others. */
static void product(const Decoder *d, const Matrix *m, const float *in, int num_rows, Target t, size_t from,
                    size_t to, float *expanded) {
    const Storage storage = m->storage;
    const bool compact = storage == BLOCKS || storage == BFLOAT16;
    const int blocks = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
    const size_t lda = pad16(m->k), size = panel_bytes(storage, m->k);
    for (size_t panel = from, taken; panel < to; panel += taken) {
        taken = storage == BLOCKS && num_rows == 1 && panel + 1 < to ? 2 : 1;
        for (int b = 0; b < blocks; b++) {
            /* Blocks of equal size: 4 + 4 rows are faster than 6 + 2. */
            size_t first = (size_t)num_rows * b / blocks;
            int rows = (int)((size_t)num_rows * (b + 1) / blocks - first);
            float *out = t.out + first * t.stride, *keep = blocks > 1 ? expanded : NULL;
            const char *w = (const char *)m->panels + panel * size;
            const float *a = in + first * lda;
            Ahead ahead = {w, 0};
            if (compact && b) w = (const char *)expanded;
            else if (!compact)
                ahead = storage == INT8 ? ahead_of(w, size, 2 * PANEL, 1024, b, blocks)
                                        : ahead_of(w, size, PANEL * sizeof(float), NEAR, b, blocks);
#define CALL(count) product_i8(count, d->quantized + first * lda, lda, d->row_scale + first, m, (const int8_t *)w, \
                               panel, &t, out, ahead)
#define PASS(storage) pass_f32(storage, rows, (int)taken, a, lda, m, w, panel, &t, out, ahead, keep)
            if (storage == INT8) ROW_COUNTS(CALL)
            else if (storage == FLOAT32 || b) PASS(FLOAT32);
            else if (storage == BFLOAT16) PASS(BFLOAT16);
            else PASS(BLOCKS);
#undef PASS
#undef CALL
        }
    }
}

/* The largest |q| of a quantised activation such that what is summed in int32, k products with weights of at most 127
 * or those of EXACT_PAIRS, fits: 4127 at least, 13 bits with the sign. */
INLINE float activation_limit(int k) {
    int limit = INT32_MAX / (127 * (min_int(k, 2 * EXACT_PAIRS) + 1));
    return (float)min_int(limit, INT16_MAX);
}

/* A row to int16, x = q * scale. A row that is not finite becomes zeros with a NaN scale: NaN out, in that row only. */
static void quantize(const float *x, int16_t *out, float *scale, int k) {
    const __m256i magnitude = _mm256_set1_epi32(INT32_MAX);
    __m256i largest = _mm256_setzero_si256(); /* the bits of a float's magnitude order as integers, NaN on top */
    size_t n = pad16(k);
    for (size_t i = 0; i < n; i += 8)
        largest = _mm256_max_epi32(largest, _mm256_and_si256(_mm256_loadu_si256((const __m256i *)(x + i)), magnitude));
    int32_t lanes[8], bits = 0;
    _mm256_storeu_si256((__m256i *)lanes, largest);
    for (int i = 0; i < 8; i++) bits = max_int(bits, lanes[i]);
    float top;
    memcpy(&top, &bits, sizeof top);
    bool finite = bits < 0x7f800000;
    if (!finite || top < 1e-30f) { /* below, 1 / top would overflow */
        *scale = finite ? 0.0f : NAN;
        memset(out, 0, n * sizeof *out);
        return;
    }
    float limit = activation_limit(k);
    *scale = top / limit;
    __m256 inverse = _mm256_set1_ps(limit / top);
    for (size_t i = 0; i < n; i += 16) {
        __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse));
        __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), inverse));
        _mm256_storeu_si256((__m256i *)(out + i), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }
}

/* ---- Packing ---- */

INLINE float largest_magnitude(const float *w, int64_t k) {
    float top = 0;
    for (int64_t i = 0; i < k; i++) top = fabsf(w[i]) > top ? fabsf(w[i]) : top;
    return top;
}

static void pack_int8(const float *w, size_t k, size_t column, char *panel, float *scale) {
    float top = largest_magnitude(w, k);
    *scale = top / 127;
    float inverse = top > 1e-30f ? 127 / top : 0; /* below, it would overflow */
    for (size_t i = 0; i < k; i++)
        panel[i / 2 * PANEL * 2 + column * 2 + i % 2] = (char)rintf(w[i] * inverse);
}

EXPORT size_t softprompt_panel_bytes(int32_t storage, int64_t k) { return panel_bytes(storage, k); }

/* Rows of a matrix [rows][k] into zeroed panels: row r becomes output column first + r / 8 * step + r % 8.
 * `step` is 8, or 16 for two matrices whose columns alternate. False, and the panels are unfinished, if the storage
 * would change a weight (INT8 may). */
EXPORT bool softprompt_pack(const float *w, int64_t rows, int64_t k, int64_t first, int64_t step, int32_t storage,
                            void *panels, float *scale) {
    for (int64_t r = 0; r < rows; r++, w += k) {
        int64_t column = first + r / 8 * step + r % 8;
        char *panel = (char *)panels + column / PANEL * panel_bytes(storage, k);
        if (storage == INT8) pack_int8(w, k, column % PANEL, panel, &scale[column]);
        else if (!pack_exactly(storage, w, k, column % PANEL, panel)) return false;
    }
    return true;
}
