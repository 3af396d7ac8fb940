/* What Python hands over, and what a decoder keeps. */
#pragma once
#include <immintrin.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

enum {
    PANEL = 16,        /* output columns that are stored, and computed, together */
    MAX_ROWS = 6,      /* of a register block: 6 x 16 floats are 12 of the 16 registers */
    QUERY_BLOCK = 8,   /* queries of one row that share what they read of the cache */
    KEY_TILE = 64,     /* keys that stay in the L1 cache while the queries of a block pass over them */
    ROWS_PER_CHUNK = 4 /* of the phases that work row by row */
};

enum { OK, NO_MEMORY, BAD_TOKEN, BAD_BLOCK, BAD_POSITION };

/* ---- What Python hands over: decoder.py mirrors these ---- */

/* How the weights of a matrix are held. All but INT8 hold float32 weights, bit for bit: see storage.h. */
typedef enum { FLOAT32, INT8, BFLOAT16, BLOCKS } Storage;

typedef struct {
    const void *panels; /* [n / 16] of `panel_bytes`, padded with zeros */
    const float *scale; /* [n] of INT8 */
    const float *bias;  /* [n], zeros where the model has none */
    int32_t n, k;       /* n is a multiple of 16 */
    int32_t storage;
} Matrix;

typedef struct {
    Matrix qkv, o, gate_up, down; /* gate_up: 8 columns of gate, then the same 8 of up, in every panel */
    const float *attention_norm, *mlp_norm; /* [hidden], padded with zeros to a multiple of 16 */
    const float *q_norm, *k_norm;           /* [head_dim] or NULL */
    int64_t window;                         /* 0: none */
} Layer;

typedef struct {
    const Layer *layers;
    Matrix head;
    const float *embedding; /* [vocab][hidden] */
    const float *norm;      /* padded as the other norms */
    const float *cos, *sin; /* [max_positions][head_dim / 2] */
    float *kv;              /* [layers][2][num_blocks * block_size][kv_heads][head_dim] */
    int32_t num_layers, hidden, num_heads, kv_heads, head_dim, intermediate, vocab, max_positions;
    int32_t num_blocks, block_size, quantized;
    float eps, attention_scale;
} Model;

typedef struct {
    int64_t start, end, num_logits;
    int64_t table, num_blocks; /* offset into the block tables, and how many entries */
    int64_t ids;               /* offset into the token ids */
    const float *embeddings;   /* [end - start][hidden] instead of ids, or NULL */
} Span;

/* ---- Inside ---- */

typedef struct {
    int32_t span, first, count; /* positions [first, first + count) of that span */
    int32_t query_row, out_row;
} QueryBlock;

/* Kinds of phases: NORM to DOWN once a layer. */
typedef enum {
    EMBED, NORM, QKV, ROPE, ATTEND, QUANT_O, O, MLP_NORM, GATE_UP, QUANT_DOWN, DOWN, FINAL_NORM, HEAD
} Kind;
enum { KINDS_PER_LAYER = DOWN - NORM + 1 };

typedef struct Decoder Decoder;
typedef struct {
    Decoder *decoder;
    pthread_t thread;
    int index;
} Worker;

struct Decoder {
    Model model;
    int num_phases, num_threads;

    /* The batch of the step. */
    const Span *spans;
    const int32_t *tables, *ids;
    float *logits;
    int num_spans, num_rows, num_logits, num_blocks, num_last_blocks;
    QueryBlock *blocks, *last_blocks; /* last_blocks: of the last layer, only rows that want logits */
    int32_t *row_span, *row_position, *logit_row;

    /* Activations, [rows][width padded to 16 floats]. The padding of x stays zero: what a row leaves there, a NaN
     * among it, would be the next one's. Other padding is either never written or written anew for every row. */
    float *x, *normed, *qkv, *attended, *gated;
    int16_t *quantized;
    float *row_scale;
    float *scores;   /* [threads][score_rows][score_stride] */
    float *expanded; /* [threads][expanded_stride]: a panel in float */
    size_t row_capacity, score_stride, expanded_stride;

    /* The open phase, its number of chunks and the next one to take, in one word: see `ticket_of`. */
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic int remaining;
    uint32_t step;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    bool closing;
    int num_workers;
    Worker *workers;
#ifdef PROFILE
    uint64_t nanoseconds[HEAD + 1], opened;
#endif
};

enum { MAX_CHUNKS = 0xffff, MAX_PHASES = 0xffff };

/* step 16 | phase 16 | chunks 16 | next chunk 16. Who takes a chunk by compare-and-swap knows all of them, and a thread
 * that slept through a phase or a step takes nothing by mistake. */
INLINE uint64_t ticket_of(uint32_t step, int phase, int chunks) {
    return (uint64_t)(step & 0xffff) << 48 | (uint64_t)phase << 32 | (uint64_t)chunks << 16;
}

INLINE size_t pad16(size_t n) { return (n + 15) & ~(size_t)15; }
INLINE int min_int(int a, int b) { return a < b ? a : b; }
INLINE int max_int(int a, int b) { return a > b ? a : b; }
