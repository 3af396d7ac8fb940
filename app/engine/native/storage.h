/* Float32 weights in fewer bytes, not a bit of them lost.
 *
 * A step of few rows takes as long as its weights take from memory, and few checkpoints use all bits of a float32: most
 * were bfloat16 once, and quantised ones (GGUF) are code * scale + minimum, with a scale and a minimum per 32 inputs.
 * Such a matrix is held as it once was, and each weight is made anew whenever it is used. The same expansion runs when
 * it is packed, where each weight has to come back the same bits; else the matrix is held in another way.
 *
 * A panel, of 16 columns:
 *   FLOAT32   float [k][16]
 *   BFLOAT16  uint16_t [k][16], the upper half of the float
 *   BLOCKS    per group of 32 inputs: float16 scale[16], minimum[16]; int8_t code[inputs][16]
 *   INT8      int8_t [k / 2][16][2], of `quantization=int8`, which loses what it loses
 */
#pragma once
#include "vector.h"

enum { GROUP = 32, AFFINE_BYTES = 2 * PANEL * sizeof(uint16_t) };

INLINE size_t panel_bytes(Storage storage, size_t k) {
    switch (storage) {
        case BLOCKS: return (k + GROUP - 1) / GROUP * AFFINE_BYTES + k * PANEL;
        case BFLOAT16: return k * PANEL * sizeof(uint16_t);
        case INT8: return (k + 1) / 2 * 2 * PANEL;
        default: return k * PANEL * sizeof(float);
    }
}

/* ---- Expansion: eight columns, those of one half of a panel ---- */

typedef struct {
    __m256 scale, minimum;
} Affine;

INLINE __m256 load_float(const char *w, int half) { return _mm256_loadu_ps((const float *)w + 8 * half); }

INLINE __m256 load_bfloat16(const char *w, int half) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)w + half)), 16));
}

INLINE Affine load_affine(const char *w, int half) {
    const __m128i *both = (const __m128i *)w;
    return (Affine){_mm256_cvtph_ps(_mm_loadu_si128(both + half)), _mm256_cvtph_ps(_mm_loadu_si128(both + 2 + half))};
}

INLINE __m256i load_codes(const char *w, int half) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(w + 8 * half)));
}

/* The product is exact (8 bits times 11), the sum rounds once: what a multiplication and an addition give too. */
INLINE __m256 weights(__m256i codes, Affine a) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), a.scale, a.minimum);
}

/* ---- Packing ---- */

/* A group's weights, the last one repeated up to 32, and what was found for them. */
typedef struct {
    float w[GROUP];
    int32_t code[GROUP];
    uint16_t scale, minimum; /* float16 */
} Fit;

static bool fits(Fit *f, float scale, float minimum) {
    f->scale = _cvtss_sh(scale, _MM_FROUND_TO_NEAREST_INT);
    f->minimum = _cvtss_sh(minimum, _MM_FROUND_TO_NEAREST_INT);
    scale = _cvtsh_ss(f->scale);
    const Affine a = {_mm256_set1_ps(scale), _mm256_set1_ps(_cvtsh_ss(f->minimum))};
    const __m256 inverse = _mm256_set1_ps(scale == 0 ? 0 : 1 / scale);
    int same = -1;
    for (int i = 0; i < GROUP; i += 8) {
        __m256 w = _mm256_loadu_ps(f->w + i);
        __m256i code = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_sub_ps(w, a.minimum), inverse));
        code = _mm256_max_epi32(_mm256_set1_epi32(-128), _mm256_min_epi32(_mm256_set1_epi32(127), code));
        _mm256_storeu_si256((__m256i *)(f->code + i), code);
        same &= _mm256_movemask_epi8(_mm256_cmpeq_epi32(_mm256_castps_si256(weights(code, a)), _mm256_castps_si256(w)));
    }
    return same == -1;
}

/* Guesses how a group was quantised, the likely ways first. A minimum of -0 changes no product, and with a scale of the
 * right sign a code of 0 gives the right one of the two zeros. */
static bool fit(Fit *f) {
    static const float ranges[] = {15, 14, 13, 12, 11, 10, 9, 8, 7, 16, 31}, magnitudes[] = {127, 128, 8, 16, 7, 15};
    float low = f->w[0], high = f->w[0];
    for (int i = 1; i < GROUP; i++) {
        low = f->w[i] < low ? f->w[i] : low;
        high = f->w[i] > high ? f->w[i] : high;
    }
    const float top = fabsf(low) > fabsf(high) ? fabsf(low) : fabsf(high);
    if (fits(f, (high - low) / ranges[0], low)) return true;
    for (size_t i = 0; i < sizeof magnitudes / sizeof *magnitudes; i++)
        if (fits(f, top / magnitudes[i], -0.0f) || fits(f, -top / magnitudes[i], -0.0f)) return true;
    for (size_t i = 1; i < sizeof ranges / sizeof *ranges; i++)
        if (fits(f, (high - low) / ranges[i], low)) return true;
    return false;
}

/* A row of a matrix becomes a column of a panel of zeros; false if a weight would not be the same bits again. */
static bool pack_exactly(Storage storage, const float *w, size_t k, size_t column, char *panel) {
    if (storage == FLOAT32) {
        for (size_t i = 0; i < k; i++) ((float *)panel)[i * PANEL + column] = w[i];
        return true;
    }
    if (storage == BFLOAT16) {
        uint32_t bits, lost = 0;
        for (size_t i = 0; i < k; i++) {
            memcpy(&bits, w + i, sizeof bits);
            ((uint16_t *)panel)[i * PANEL + column] = (uint16_t)(bits >> 16);
            lost |= bits & 0xffff;
        }
        return lost == 0;
    }
    for (size_t from = 0; from < k; from += GROUP, panel += AFFINE_BYTES + GROUP * PANEL) {
        const size_t count = k - from < GROUP ? k - from : GROUP;
        Fit f;
        for (size_t i = 0; i < GROUP; i++) f.w[i] = w[from + (i < count ? i : count - 1)];
        if (!fit(&f)) return false;
        ((uint16_t *)panel)[column] = f.scale;
        ((uint16_t *)panel)[PANEL + column] = f.minimum;
        for (size_t i = 0; i < count; i++) panel[AFFINE_BYTES + i * PANEL + column] = (char)f.code[i];
    }
    return true;
}
