/* Weights and activations as they lie in memory, and how sixteen of them come into registers.

   A new kind of weight is a number in `enum Kind` (and in __init__.py), a function load_<KIND> with its load_first_<KIND>, and one
   line in WEIGHT_KINDS: every product takes it then. Loads return finished float32 values, scales included. */
#pragma once

#include "vectors.h"

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, FP8 = 3, INT4 = 4, MXFP4 = 5 };
#define POWER_OF_TWO 2 /* a kind of scales: a byte s is 2^(s - 127) */

#define WEIGHT_KINDS(EACH) EACH(FLOAT32) EACH(BFLOAT16)

/* A matrix, row by row. Products sum along its rows (y = W x), or add its rows up (y = x W). */
typedef struct {
    const void *data;
    int64_t kind;
    int64_t stride; /* from one row to the next, in elements */
    /* Of codes alone (packed.h), which lie without gaps; group is 0 for the others. */
    const void *scales;   /* (rows, columns / group) */
    const uint8_t *zeros; /* (rows, columns / group), or NULL: 8 */
    int64_t scale_kind, group;
} Weight;

/* Sixteen weights of a row from a column on; and the last `count` < 16 of a row, with zeros after them. */
typedef floats Load(Weight w, int64_t row, int64_t column);
typedef floats LoadFirst(Weight w, int64_t row, int64_t column, int64_t count);

ALWAYS_INLINE floats load_FLOAT32(Weight w, int64_t row, int64_t column) {
    return load((const float *)w.data + row * w.stride + column);
}

ALWAYS_INLINE floats load_first_FLOAT32(Weight w, int64_t row, int64_t column, int64_t count) {
    return load_first((const float *)w.data + row * w.stride + column, count);
}

ALWAYS_INLINE floats load_BFLOAT16(Weight w, int64_t row, int64_t column) {
    return load_bfloat16((const uint16_t *)w.data + row * w.stride + column);
}

ALWAYS_INLINE floats load_first_BFLOAT16(Weight w, int64_t row, int64_t column, int64_t count) {
    return load_first_bfloat16((const uint16_t *)w.data + row * w.stride + column, count);
}

/* Activations, biases and norms: float32 or bfloat16. */
ALWAYS_INLINE float value_at(const void *data, int64_t kind, int64_t i) {
    return kind == FLOAT32 ? ((const float *)data)[i] : from_bfloat16(((const uint16_t *)data)[i]);
}

static inline void read_floats(float *to, const void *from, int64_t kind, int64_t count) {
    if (kind == FLOAT32) memcpy(to, from, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(((const uint16_t *)from)[i]);
}

static inline void write_floats(void *to, int64_t kind, const float *from, int64_t count) {
    if (kind == FLOAT32) memcpy(to, from, count * sizeof(float));
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[i] = to_bfloat16(from[i]);
}
