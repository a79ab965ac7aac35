/* y = x W^T + b for a few rows, shared between threads. */
#pragma once

#include "products.h"

typedef struct {
    Weight weight;    /* (outputs, columns) */
    const void *bias; /* (outputs,), or NULL */
    int64_t bias_kind;
    int64_t outputs, columns;
} Linear;

#define MOST_LAYERS 3

/* x (rows, columns) and out (rows, outputs), contiguous float32; any number of rows. */
void linear(const Linear *layer, const float *x, int64_t rows, float *out, int threads);

/* The same for up to MOST_LAYERS products of one x, such as queries, keys and values, shared between the threads as one. */
void linears(const Linear *const *layers, int count, const float *x, int64_t rows, float *const *outs, int threads);
